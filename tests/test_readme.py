"""What the README shows works as it stands there."""

import json
import re
import tomllib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CHOOSING = (ROOT / "docs" / "choosing-rules.md").read_text()
COMPARISON = (ROOT / "docs" / "comparison.md").read_text()


def test_the_first_example_trains():
    torch.manual_seed(0)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    names: dict = {}
    exec(code.replace("range(100)", "range(20)"), names)
    assert float(names["loss"].detach()) < 6.92


def test_the_first_example_has_ten_lines():
    assert re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0].count("\n") == 10


def test_the_badges_say_what_the_project_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    badges = dict(re.findall(r"\[!\[(\w+): ([^\]]+)\]", README))
    assert badges["licence"] == project["license"]
    versions = [one.rsplit(" ", 1)[1] for one in project["classifiers"] if "Python :: 3." in one]
    assert badges["Python"] == f"{versions[0]} to {versions[-1]}"
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert badges["docs"] == "built in CI"
    assert "make docs" in workflow
    tested = re.search(r"python-version: (\[.*\])", workflow)
    assert tested is not None
    assert json.loads(tested[1]) == versions


def test_the_example_of_groups_builds_its_optimizers():
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", CHOOSING, re.DOTALL) if "split_sizes" in block
    ]
    names: dict = {}
    exec(code, names)
    assert [group["algorithm"] for group in names["optimizer"].param_groups] == ["polar", "polar", "adamw"]
    assert names["optimizer"].works[1].entry.split.runs == ((0, 1, 512), (512, 2, 128))


def test_every_page_and_configuration_it_names_exists():
    for path in re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"(configs/[\w.-]+\.yaml)", README):
        assert (ROOT / path).exists(), path


def short_answers(page: str) -> dict[str, dict[str, str]]:
    """For each feature in a page's comparison tables and each project: the text before a bracket or semicolon, plain."""
    answers: dict[str, dict[str, str]] = {}
    for table in re.findall(r"^\| \| polargrad-dist \|(?:.+\n)+", page, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        for feature, *cells in rows:
            plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell).replace("*", "") for cell in cells]
            feature = feature.replace("*", "")
            assert feature not in answers, f"two rows for {feature}"
            short = [re.split(r" \(|;", cell)[0] for cell in plain]
            answers[feature] = dict(zip(header[1:], short, strict=True))
    return answers


def test_the_comparison_table_repeats_the_short_answers_of_the_comparison_page():
    shown, page = short_answers(README), short_answers(COMPARISON)
    projects = ["polargrad-dist", "torch.optim.Muon", "dion", "authors' code", "torchtitan"]
    assert len(shown) >= 10
    for feature, answers in shown.items():
        assert list(answers) == projects
        assert page.get(feature) == answers, feature
    (checked,) = set(re.findall(r"^\|[^|]+\| (\d{4}-\d\d-\d\d) \|", COMPARISON, re.MULTILINE))
    assert f"Checked on {checked}." in README


def test_importing_the_library_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, polargrad_dist, polargrad_dist.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_does_not_import_the_compiler():
    import subprocess
    import sys

    code = "import sys, train; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
