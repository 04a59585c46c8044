"""What a person sees of a run: lines that fit, a bar that figures and log lines leave whole."""

import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from polargrad_dist.trainer.console import Console, duration, line
from polargrad_dist.trainer.output import start_log
from tests.commandline import ROOT

ROW = {
    "step": 5960,
    "loss": 2.9198,
    "grad_norm": 0.12345,
    "lr": {"embed": 0.3, "hidden": 0.02},
    "tokens_per_second": 2_130_000.0,
    "mfu": 0.512,
    "memory_gib": 62.129,
    "skipped": 3,
    "share": {"data": 0.01},
}


def test_a_line_holds_what_is_known_in_120_characters():
    text = line(ROW, 5960, 754)
    assert text == (
        "step 5960/5960  loss 2.9198  norm 0.123  lr 2.00e-02  2,130,000 tok/s  mfu 51.2%  62.13 GiB  skipped 3  eta 0:12:34"
    )
    assert len(text) <= 120


def test_rows_that_are_longer_are_folded_between_figures():
    named = {f"a_long_name_of_a_set_{i}": {"loss": 1.0 + i} for i in range(9)}
    samples = [{"prompt": "def ", "text": "x = 1\n" + "many words " * 40}]
    row = {"step": 7, "validation_loss": math.nan, "validation": named, "samples": samples}
    lines = line(row, 10).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("step  7/10  validation loss nan  a_long_name_of_a_set_0 1.0000")
    joined = " ".join(lines)
    assert all(f"a_long_name_of_a_set_{i} {1.0 + i:.4f}" in joined for i in range(9))
    assert "x = 1\\n" in joined


def test_durations_are_hours_minutes_and_seconds():
    assert [duration(s) for s in (0, 59.9, 3600, 90_061)] == ["0:00:00", "0:00:59", "1:00:00", "25:01:01"]


def test_lines_go_to_stderr_with_the_time_that_is_left(capsys):
    console = Console("lines", steps=10, first=0)
    console.tick({"step": 5, "loss": 1.0})
    console.show({"step": 5, "loss": 1.25})
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"step  5/10  loss 1.2500  eta \d:\d\d:\d\d\n", err)


PROGRAM = """
import logging, sys
from pathlib import Path
from polargrad_dist.trainer.console import Console
from polargrad_dist.trainer.output import start_log

start_log(Path(sys.argv[1]), 0)
console = Console("auto", 40, 0)
for step in range(1, 41):
    console.tick({"step": step, "loss": 4.0, "grad_norm": 0.5})
    if step % 10 == 0:
        console.show({"step": step, "loss": 4.0, "tokens_per_second": 1234.0, "mfu": 0.25})
        logging.getLogger("polargrad_dist.trainer").info("saved number %d", step)
console.close()
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Where the program above keeps its log."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def screen(run_dir) -> list[str]:
    """What a terminal of 100 columns shows of a run: its lines as they were at every return or new line."""
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-c", PROGRAM, str(run_dir)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=other_end, stderr=other_end)
    os.close(other_end)
    seen = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
    assert run.wait(timeout=60) == 0
    return re.split(r"[\r\n]+", seen.decode())


def test_on_a_terminal_a_line_of_each_interval_stays_beside_the_bar(screen):
    kept = [text for text in screen if text.startswith("step ")]
    assert [text.split("  ")[0] for text in kept] == ["step 10/40", "step 20/40", "step 30/40", "step 40/40"]
    bars = [text for text in screen if "%|" in text]
    for figure in ("loss 4.000", "smooth 4.000", "norm 0.5", "1,234 tok/s", "mfu 25%", "eta "):
        assert figure in bars[-1], bars[-1]


def test_the_lines_that_stay_are_in_the_log_too_and_the_bar_is_not(screen, run_dir):
    logged = (run_dir / "log.txt").read_text().splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d rank 0 INFO ", "", text) for text in logged] == [
        text
        for step in (10, 20, 30, 40)
        for text in (f"step {step}/40  loss 4.0000  1,234 tok/s  mfu 25.0%", f"saved number {step}")
    ]


def test_each_line_is_printed_once_and_logged_once_where_there_is_no_terminal(tmp_path, capsys):
    start_log(tmp_path, 0)
    for mode in ("lines", "off"):
        console = Console(mode, steps=10, first=0)
        console.show({"step": 5, "loss": 1.25, "samples": [{"prompt": "def", "text": " x"}]})
    printed, logged = capsys.readouterr().err, (tmp_path / "log.txt").read_text()
    assert (
        printed.count("step  5/10  loss 1.2500  eta ") == logged.count("step  5/10  loss 1.2500  eta ") == 1
    )
    assert printed.count("'def' -> ' x'") == logged.count("'def' -> ' x'") == 1


def test_log_lines_never_share_a_line_with_the_bar(screen):
    logged = [text for text in screen if "saved number" in text]
    assert [text[-2:] for text in logged] == ["10", "20", "30", "40"]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d rank 0 INFO saved number \d0", text) for text in logged)
