"""The pages made from the code are those of this code, their links lead somewhere, and the first run works as told."""

import json
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from polargrad_dist.optim.schedules import RoleSchedule
from tools.configuration_page import page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_configuration_keys_is_that_of_the_code():
    assert (ROOT / "docs" / "configuration.md").read_text() == page(), (
        "run python -m tools.configuration_page > docs/configuration.md"
    )


def test_a_key_of_the_page_is_an_option_unless_it_is_that_of_an_item_of_a_list():
    from train import parse_run

    keys = re.findall(r"^\| `([^`]+)` \|", page(), re.MULTILINE)
    assert {key.partition("[]")[0] for key in keys if "[]" in key} == {"data.sources"}
    of_roles = [key.replace("ROLE", "embed") for key in keys if key.startswith("trainer.schedule.ROLE.")]
    assert len(of_roles) == 9
    schedule = parse_run([f"--{key}=null" for key in of_roles])[0].trainer.schedule
    assert schedule.embed == RoleSchedule()


def test_every_page_is_on_the_site_and_every_relative_link_and_picture_exists():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in PAGES[1:]:
        assert f": {path.name}\n" in navigation, path.name
    for path in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_source_distribution_is_the_whole_checkout(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    copy = tmp_path / "checkout"
    for name in tracked:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    program = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=copy, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    assert {name for name in tracked if (ROOT / name).is_file()} - inside == set()


CHECKPOINTS = """
import sys
import torch, torch._dynamo

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[2].split(","):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Nothing())
from polargrad_dist.trainer.checkpoint.__main__ import main
sys.exit(main(["list", sys.argv[1]]))
"""


def test_looking_at_checkpoints_needs_torch_and_numpy_alone(tmp_path):
    import torch

    from polargrad_dist.trainer.checkpoint import CheckpointStore

    store = CheckpointStore(tmp_path)
    store.save(3, {"model/w": torch.zeros(2)})
    assert store.close()
    missing = "filelock,tqdm,jsonargparse,yaml,transformers,datasets,tokenizers,psutil,fsspec,safetensors"
    command = [sys.executable, "-c", CHECKPOINTS, str(tmp_path), missing]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step-00000003" in done.stdout


def test_showing_a_checkpoint_to_a_reader_who_leaves_ends_quietly(tmp_path):
    import torch

    from polargrad_dist.trainer.checkpoint import CheckpointStore

    store = CheckpointStore(tmp_path)
    store.save(3, {f"model/{i}": torch.zeros(2) for i in range(3000)})
    assert store.close()
    show = subprocess.Popen(
        [sys.executable, "-m", "polargrad_dist.trainer.checkpoint", "show", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    show.stdout.readline()
    show.stdout.close()
    assert show.stderr.read() == ""
    assert show.wait(timeout=60) == 0


def test_the_first_run_works_as_its_page_says(tmp_path, monkeypatch):
    """Each command of docs/first-run.md in its order, with a smaller model, fewer steps and another working directory."""
    from pydoc_data.topics import topics

    text = "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[:40])
    (tmp_path / "my.jsonl").write_text(text)
    for name in ("configs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = (
        "--model.width 64 --model.layers 2 --model.heads 1 --model.max_sequence_length 64 --trainer.steps 2 "
        "--trainer.sequence_length 64 --trainer.global_batch 2 --trainer.micro_batch 2 --trainer.precision fp32 "
        "--trainer.compile false --trainer.schedule.momentum_warmup_steps 0 --trainer.device cpu"
    )
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    page_of = (ROOT / "docs" / "first-run.md").read_text()
    lines = re.findall(r"^python .*", page_of, re.MULTILINE)
    assert [line.split()[1 + (line.split()[1] == "-m")] for line in lines] == [
        *(
            "data.prepare",
            "train.py",
            "train.py",
            "tools.report",
            "tools.evaluate",
            "tools.generate",
            "tools.export",
        )
    ]
    for line in lines:
        words = shlex.split(
            line.replace("vocab_size 32000", "vocab_size 400").replace("fraction 0.01", "fraction 0.1")
        )
        words += small.split() if words[1] == "train.py" else []
        words += ["--tokens", "8"] if "tools.generate" in words else []
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    assert (tmp_path / "runs" / "mine" / "report.html").stat().st_size > 20_000
    assert "bigram" in json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())
    assert (tmp_path / "exported" / "config.json").exists()


test_the_first_run_works_as_its_page_says = pytest.mark.slow(test_the_first_run_works_as_its_page_says)
