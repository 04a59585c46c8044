"""First guesses at the tools' command lines: each is answered in one sentence, with the option that was meant."""

import subprocess
import sys

import pytest

from polargrad_dist.errors import ConfigError
from tests.commandline import ROOT
from tools import evaluate, export, generate
from tools.report import __main__ as report

MAINS = {"generate": generate.main, "evaluate": evaluate.main, "export": export.main, "report": report.main}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["generate", "r", "def "],
            "unexpected argument 'def ', expected one run: a prompt is --prompt 'def '",
        ),
        (["generate"], "no RUN is given, expected a run directory, or one of its checkpoints"),
        (
            ["generate", "r", "--max-new-tokens", "5"],
            "there is no option --max-new-tokens: did you mean --tokens?",
        ),
        (["generate", "r", "--promt=x"], "there is no option --promt: did you mean --prompt?"),
        (["generate", "r", "--wholly-other"], "there is no option --wholly-other: --help lists the options"),
        (["generate", "r", "--tokens", "x"], "--tokens is 'x', expected a whole number"),
        (["generate", "r", "--top_p", "x"], "--top_p is 'x', expected a number"),
        (
            ["generate", "r", "--prompt", "-x"],
            "--prompt has no value, expected one after it; if that begins with a dash",
        ),
        (
            ["evaluate", "r", "my.txt"],
            "unexpected argument 'my.txt', expected one run: a text is --text NAME=PATH",
        ),
        (["evaluate", "r", "--bs", "4"], "there is no option --bs: did you mean --batch_size?"),
        (["evaluate", "r", "--device", "gpu"], "--device is 'gpu', expected one of: auto, cpu, cuda"),
        (["export", "r"], "no OUT is given, expected a folder to write, which must not exist or be empty"),
        (
            ["export", "r", "o", "100"],
            "unexpected argument '100', expected a run and a folder: a checkpoint is --step N",
        ),
        (["export", "r", "--output", "o"], "did you mean the folder as the second argument: RUN OUT?"),
        (
            ["export", "r", "o", "--dtype", "half"],
            "--dtype is 'half', expected one of: float32, bfloat16, float16",
        ),
        (["report"], "no RUN is given, expected a run's directory"),
        (["report", "r", "--output", "x.html"], "there is no option --output: did you mean --out FILE?"),
    ],
)
def test_a_first_guess_is_answered_with_what_was_meant(monkeypatch, command, said):
    tool, *args = command
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *args])
    with pytest.raises(ConfigError) as refused:
        MAINS[tool]()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_tool_prints_that_sentence_alone_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "tools.generate", "run", "def "],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    said = "generate.py: error: unexpected argument 'def ', expected one run: a prompt is --prompt 'def '\n"
    assert done.stderr == said
