"""The examples run as they stand."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.commandline import ROOT

LOSS = re.compile(r"validation loss (\d+\.\d+) after (\d+) steps")


def ran(command: list[str], folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_module_of_ones_own_trains(tmp_path):
    example = [sys.executable, "-m", "examples.own_model", str(tmp_path / "run")]
    first = LOSS.search(ran(example, tmp_path))
    assert first is not None
    # A uniform guess has ln 512 = 6.24, the frequencies of the tokens alone give 5.2.
    assert float(first[1]) < 4.5
    assert len((ROOT / "examples" / "own_model.py").read_text().splitlines()) <= 60
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").exists()


def test_data_of_ones_own_train_on_two_ranks(tmp_path):
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = LOSS.search(
        ran([sys.executable, *ranks, "-m", "examples.own_data", str(tmp_path / "run")], tmp_path)
    )
    assert found is not None
    # The results of all sums but a few are known.
    assert float(found[1]) < 0.1


@pytest.mark.parametrize("code", [0, 75])
@pytest.mark.parametrize("name", ["own_data", "own_model"])
def test_a_run_without_a_loss_to_show_ends_with_its_exit_code(tmp_path, monkeypatch, capsys, name, code):
    class Finished:
        def __init__(self, *_):
            pass

        def fit(self):
            return SimpleNamespace(validation={}, step=40, exit_code=code)

    monkeypatch.setattr("polargrad_dist.trainer.Trainer", Finished)
    monkeypatch.setattr("data.open_data", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"examples.{name}")
    assert ended.value.code == code
    assert "validation loss" not in capsys.readouterr().out
