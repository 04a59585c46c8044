"""What README, docs and CONTRIBUTING tell people to type does what it says, as far as this machine can show it.

Every command on every page is found, in blocks and in running text, and each kind is tried:

- a run of `train.py`, under whichever launcher: its dry run, so configuration, overrides and all checks before data;
- the tools and `polargrad-checkpoint`: really, on a small run that stands where the page's run would;
- benchmarks, experiments, chaos and soak: their own parsers take the arguments;
- `make`: a dry run of the target; `pytest`: its files and tests exist; `sbatch`: the script exists, and what follows is
  a run; `pip install`: the extras exist.

Pages whose commands need a network or hours are run by other tests or by their parsers alone. A command of a kind that
nobody tries fails here.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from tests.commandline import ROOT, train
from tests.tools.conftest import SMALL, arguments, corpus, trained
from tests.tools.test_evaluate import questions

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = (
    "python",
    "torchrun",
    "accelerate",
    "deepspeed",
    "polargrad-checkpoint",
    "make",
    "pytest",
    "sbatch",
    "pip",
)
WORDS = re.compile(rf"(?:[A-Z_]+=\S* +)?(?:{'|'.join(STARTS)})(?: |$)")
NETWORK = ("--tasks", "--tokenizer.name openai-community/gpt2", "data.prepare --run")
SMALL_RUNS = ("quickstart", "second", "mine", "a", "b", "adamw-0", "adamw-1", "default-0", "default-1")

__all__ = ["arguments", "corpus", "trained"]


def commands_of(text: str) -> list[str]:
    """Commands of a page: lines of its blocks and code within its sentences that begin with a program's name."""
    found, prose = [], []
    block = None
    for line in text.splitlines():
        if fence := re.match(r"\s*```(\w*)", line):
            block = None if block is not None else fence[1]
        elif block is not None:
            found += [line.strip()] if block in ("", "bash", "sh") else []
        elif re.match(r"    \S", line):
            found.append(line.strip())
        else:
            prose.append(line)
    found += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", "\n".join(prose))]
    return [plain(line) for line in found if WORDS.match(line)]


def plain(line: str) -> str:
    """Without comments and without the brackets around what may be left out."""
    line = re.sub(r"\s+#.*", "", line)
    line = re.sub(r"\[(--[\w.]+)([^]|]*)(\|[^]]*)?\]", r"\1\2", line)
    line = re.sub(r"\[(?:SECTION|runs/b|--any)[^]]*\]", "", line)
    return re.sub(r"\s*…", "", line).strip()


COMMANDS = sorted({(path.name, line) for path in PAGES for line in commands_of(path.read_text())})


def split(line: str) -> tuple[str, list[str]]:
    """What is to be run, as a program or a module's name, and its arguments."""
    words = shlex.split(re.sub(r"^[A-Z_]+=\S* +", "", line))
    if words[0] in ("python", "torchrun", "accelerate", "deepspeed"):
        if "train.py" in words:
            return "train.py", words[words.index("train.py") + 1 :]
        if "-m" in words:
            where = words.index("-m")
            return words[where + 1], words[where + 2 :]
        return words[0], words[1:]
    return words[0], words[1:]


def test_commands_are_found_in_blocks_and_in_sentences_of_every_page_that_has_some():
    assert len(COMMANDS) > 80
    pages = {name for name, _ in COMMANDS}
    assert {
        path.name for path in PAGES if re.search(r"^(python|make|torchrun) ", path.read_text(), re.M)
    } <= pages
    # An indented block
    assert ("gpu.md", "python -m benchmarks.gpu --reduced") in COMMANDS
    # In a sentence
    assert ("performance.md", "python -m benchmarks.launches") in COMMANDS
    assert commands_of("```yaml\npython: 3\n```\nSay `make train` or\n`pytest\ntests`.") == [
        "make train",
        "pytest tests",
    ]
    assert (
        plain("python -m a x [--step N] [--t beside|apart] [runs/b …]  # b")
        == "python -m a x --step N --t beside"
    )


def kind(line: str) -> str:
    program, _ = split(line)
    if program == "train.py":
        return "run"
    if program in ("polargrad-checkpoint", "polargrad_dist.trainer.checkpoint") or program.startswith(
        "tools."
    ):
        return "tool"
    if program == "data.prepare" or program.split(".")[0] in ("benchmarks", "experiments", "tests"):
        return "parser"
    return program


def of(*kinds: str) -> list[tuple[str, str]]:
    return [command for command in COMMANDS if kind(command[1]) in kinds]


TRIED = (
    "run",
    "tool",
    "parser",
    "make",
    "pytest",
    "sbatch",
    "pip",
    "python",
    "torchrun",
    "accelerate",
    "deepspeed",
)


def test_every_command_is_of_a_kind_that_is_tried():
    assert [command for command in COMMANDS if kind(command[1]) not in TRIED] == []
    # A launcher alone, or a script of another project: nothing of this one is named.
    assert {line.split()[0] for _, line in of("python", "torchrun", "accelerate", "deepspeed")} <= {
        *("python", "torchrun", "accelerate", "deepspeed")
    }
    for _, line in of("python"):
        assert line in ("python", "python data/cached_fineweb10B.py 20"), line


@cache
def dry(line: str, shown: bool) -> tuple[int, str]:
    """Exit code and errors of a run's dry run; its tables are worked out only where the page shows them."""
    with pytest.MonkeyPatch.context() as patch:
        if not shown:
            patch.setattr("train.dry_run", lambda *_: 0)
        done = train(*shlex.split(line))
    return done.returncode, done.stderr


@pytest.mark.parametrize(("page", "line"), of("run", "sbatch"), ids=lambda text: str(text)[:70])
def test_every_run_passes_the_checks_before_data_on_the_ranks_that_it_names(
    page, line, trained, tmp_path_factory
):
    program, words = split(line)
    if program == "sbatch":
        scripts = [word for word in words if word.endswith(".sbatch")]
        for script in scripts:
            assert (ROOT / script).is_file(), f"{page}: {script}"
        words = words[words.index(scripts[0]) + 1 :] if scripts else []
        if not scripts or scripts[0].endswith("bench_gpu.sbatch"):
            return
    if "--help" in words:
        assert "--trainer.steps" in train("--help").stdout
        return
    if not words:
        return
    shown = [word for word in words if word.startswith("--dry_run")]
    ranks = re.search(r"--nproc_per_node (\d+)", line)
    text = f"{shlex.join(words)} ".replace("configs/NAME.yaml", "configs/quickstart.yaml")
    text = re.sub(r"--config (?=--|$)", "--config configs/gpt2-small-fineweb.yaml ", text)
    if "--config" not in words:
        text = f"--config configs/quickstart.yaml {text}"
    if "my.yaml" in words:
        (block,) = re.findall(r"```yaml\n(model:.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
        (own := tmp_path_factory.mktemp("own") / "my.yaml").write_text(block)
        text = text.replace("my.yaml", str(own))
    if "init_from" in text:
        # The configuration's sizes are then those of the run that weights come from.
        text = text.replace("FOLDER_OR_HUB_NAME", str(trained("qwen2.5")))
        text += " --trainer.sequence_length 64 " + " ".join(SMALL[:8])
    text = text.replace(" --any.key value", "")
    text += f" --trainer.run_dir {tmp_path_factory.getbasetemp() / 'none'}"
    code, errors = dry(text if shown else f"{text} --dry_run {ranks[1] if ranks else 1}", bool(shown))
    assert code == 0, f"{page}: {line}\n{errors}"


class ParsedError(Exception):
    """A parser has taken a command's arguments."""


@contextlib.contextmanager
def only_parsed(loaded, words: list[str], monkeypatch):
    """``python -m MODULE WORDS`` up to the moment when its arguments are read."""
    parser = getattr(loaded, "Arguments", argparse.ArgumentParser)
    method = "parse_known_args" if "parse_known_args(" in Path(loaded.__file__).read_text() else "parse_args"
    method = "read" if hasattr(parser, "read") else method
    real = getattr(parser, method)

    def parse(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(parser, method, parse)
        patch.setattr(sys, "argv", ["python", *words])
        yield


def program_of(module: str):
    """The module that ``python -m`` runs."""
    assert importlib.util.find_spec(module) is not None, module
    loaded = importlib.import_module(module)
    return importlib.import_module(f"{module}.__main__") if hasattr(loaded, "__path__") else loaded


@pytest.mark.parametrize(("page", "line"), of("parser"), ids=lambda text: str(text)[:70])
def test_every_benchmark_and_experiment_takes_its_arguments(page, line, monkeypatch):
    module, words = split(line)
    loaded = program_of(module)
    if not words:
        return
    if module == "data.prepare":
        known = help_of(loaded, monkeypatch)
        for word in words:
            if word.startswith("--"):
                assert f"{word} " in known or f"{word}\n" in known or f"{word}," in known, f"{page}: {word}"
        return
    words = ["3" if word == "N" else "file.json" if word == "FILE" else word for word in words]
    source = Path(loaded.__file__).read_text()
    if "parse_args" not in source and "parse_known_args" not in source:
        assert not any(word.startswith("-") for word in words), f"{page}: {line}"
        return
    with only_parsed(loaded, words, monkeypatch), pytest.raises(ParsedError):
        loaded.main()


def help_of(loaded, monkeypatch) -> str:
    out = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", ["python", "--help"])
        loaded.main()
    return out.getvalue()


@pytest.fixture(scope="module")
def desk(tmp_path_factory, trained) -> Path:
    """A working directory in which the pages' runs have been made: each a copy of one small run."""
    folder = tmp_path_factory.mktemp("desk")
    for name in SMALL_RUNS:
        shutil.copytree(trained("qwen2.5"), folder / "runs" / name)
    questions(folder / "hellaswag_val.jsonl")
    return folder


@pytest.mark.parametrize(("page", "line"), of("tool"), ids=lambda text: str(text)[:70])
def test_every_tool_does_what_the_page_asks_of_it(page, line, desk, monkeypatch, capsys):
    module, words = split(line)
    if module == "polargrad-checkpoint":
        module = "polargrad_dist.trainer.checkpoint"
    loaded = program_of(module)
    if not words:
        return
    if any(word in line for word in NETWORK) or "--text" in words:
        with only_parsed(loaded, words, monkeypatch), pytest.raises(ParsedError):
            loaded.main()
        return
    words = ["runs/a" if word == "RUN" else word for word in words]
    words = [word.replace("step-00001000", "step-00000004") for word in words]
    words = ["4" if word == "N" else word for word in words]
    if module == "tools.generate":
        words += ["--tokens", "4"]
    monkeypatch.chdir(desk)
    # As a shell does
    words = [
        name for word in words for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    shutil.rmtree(desk / "exported", ignore_errors=True)
    monkeypatch.setattr(sys, "argv", [module, *words])
    assert (loaded.main() or 0) == 0, f"{page}: {line}"
    printed = capsys.readouterr().out
    assert printed.strip()
    if module == "tools.export":
        assert any((desk / "exported").iterdir())
    if module == "tools.report":
        several = len(words) > 1 and not words[1].startswith("-")
        default = "report.html" if several else f"{words[0]}/report.html"
        written = desk / (words[words.index("--out") + 1] if "--out" in words else default)
        assert written.stat().st_size > 20_000


@pytest.mark.parametrize(("page", "line"), of("make"), ids=lambda text: str(text)[:70])
def test_every_make_target_names_programs_that_are_there(page, line, monkeypatch):
    target = line.split()[1]
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{page}: {done.stderr}"
    for module in re.findall(r"python3? -m ([\w.]+)", done.stdout):
        assert importlib.util.find_spec(module) is not None, f"{page}: {line}: {module}"
    for script in re.findall(r"python3? ([\w/]+\.py)", done.stdout):
        assert (ROOT / script).is_file(), f"{page}: {line}: {script}"


@pytest.mark.parametrize(("page", "line"), of("pytest"), ids=lambda text: str(text)[:70])
def test_every_pytest_command_names_tests_that_are_there(page, line):
    words = shlex.split(line)[1:]
    paths = [word for word in words if word.startswith("tests")]
    assert all((ROOT / path).exists() for path in paths), f"{page}: {line}"
    if "-k" in words:
        files = [
            f
            for path in paths
            for f in ([ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("*.py"))
        ]
        names = [name for f in files for name in re.findall(r"def (test_\w+)", f.read_text())]
        assert any(words[words.index("-k") + 1] in name for name in names), f"{page}: {line}"


@pytest.mark.parametrize(("page", "line"), of("pip"), ids=lambda text: str(text)[:70])
def test_every_extra_that_is_installed_exists(page, line):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"\[([\w,-]+)\]", line):
        assert set(named.split(",")) <= set(extras), f"{page}: {line}"
