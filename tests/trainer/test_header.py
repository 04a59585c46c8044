"""What a run says of itself when it starts, on the console and in run.json."""

import json

import pytest
import torch

from polargrad_dist import PolarGrad
from polargrad_dist.optim.matrix import RULES, Polar
from polargrad_dist.trainer.header import (
    describe_expected,
    describe_rule,
    header,
    note,
    read_facts,
    write_facts,
)
from tests.trainer.toy import settings, trainer


def facts(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_a_start_writes_what_the_run_is(tmp_path):
    trainer(settings(tmp_path, steps=3)).fit()
    found = facts(tmp_path)
    assert found["model"] == {
        "name": "ToyModel",
        "parameters": 48 * 16 * 2 + 2 * (32 + 16 * 32 * 2 + 32 + 16),
    }
    assert {role: one["parameters"] for role, one in found["roles"].items()} == {
        "hidden": 2 * 2 * 16 * 32,
        "embed": 48 * 16,
        "head": 48 * 16,
        "scalar": 2 * (32 + 32 + 16),
    }
    assert (
        found["roles"]["hidden"]["rule"]
        == "polar, lr 0.02, momentum_first 0.95 nesterov, scale muon, oracle svd"
    )
    training = found["training"]
    assert (training["tokens_per_step"], training["tokens"], training["accumulation"]) == (192, 576, 4)
    assert found["ranks"]["world"] == 1
    assert set(found["versions"]) >= {"python", "torch", "numpy"}
    assert [start["step"] for start in found["starts"]] == [0]
    logged = (tmp_path / "log.txt").read_text()
    assert "model     ToyModel, 3,744 parameters" in logged
    shown = [line for line in logged.splitlines() if not line[:2].isdigit()]
    assert max(map(len, shown)) <= 120


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ({"normalize": "rows", "precondition": "soap"}, "oracle auto, precondition soap, normalize rows"),
        (
            {"alpha": 0.5, "center_rows": True, "floor": 0.35},
            "oracle auto, alpha 0.5, center_rows, floor 0.35",
        ),
        ({"scale": "none", "control": "hyperball", "lr": 0.1}, "oracle auto, control hyperball"),
        ({"algorithm": "of_my_own", "beta2": 0.9}, "oracle auto, beta2 0.9"),
    ],
)
def test_a_rule_in_short_names_the_parts_and_options_that_make_it_another_rule(monkeypatch, parts, shown):
    mine = type("Mine", (Polar,), {"options": {"beta2": 0.95}})
    monkeypatch.setitem(RULES, "of_my_own", mine())
    group = {
        "params": [torch.nn.Parameter(torch.ones(4, 3))],
        "momentum": "momentum_first",
        "lr": 0.1,
    } | parts
    assert describe_rule(PolarGrad([group]).param_groups[0]).endswith(shown)


def test_a_resume_is_another_start_of_the_same_run_and_keeps_its_notes(tmp_path):
    trainer(settings(tmp_path, steps=4)).fit()
    note(tmp_path, bigram={"loss": 3.5})
    trainer(settings(tmp_path, steps=6)).fit()
    found = facts(tmp_path)
    assert [start["step"] for start in found["starts"]] == [0, 4]
    assert found["bigram"] == {"loss": 3.5}
    assert found["training"]["steps"] == 6
    assert "resumed at step 4" in (tmp_path / "log.txt").read_text()


def test_a_start_with_nothing_to_do_leaves_the_description_of_the_one_that_trained(tmp_path):
    trainer(settings(tmp_path, steps=4)).fit()
    before = facts(tmp_path)
    trainer(settings(tmp_path, steps=4, micro_batch=1)).fit()
    assert facts(tmp_path) == before
    (tmp_path / "run.json").unlink()
    trainer(settings(tmp_path, steps=4)).fit()
    assert facts(tmp_path)["training"]["first"] == 4


def test_a_damaged_file_is_written_anew(tmp_path):
    (tmp_path / "run.json").write_text('{"starts": [1, {"step"')
    assert read_facts(tmp_path) == {}
    trainer(settings(tmp_path / "other", steps=1)).fit()
    write_facts(tmp_path, read_facts(tmp_path / "other"))
    assert len(facts(tmp_path)["starts"]) == 1


def test_a_header_of_many_ranks_fits_on_a_screen(tmp_path):
    trainer(settings(tmp_path, steps=1)).fit()
    found = facts(tmp_path)
    found["ranks"] |= {
        "world": 64,
        "hosts": [f"gpu-node-{i:03}.cluster.example" for i in range(8)],
        "devices": ["64 x NVIDIA H100 80GB HBM3"],
        "strategy": "hsdp",
    }
    found["data"] = {
        "source": "HuggingFaceFW/fineweb/sample-10BT",
        "train_tokens": 10**10,
        "vocab_size": 50257,
    }
    found["training"] |= {"epochs": 0.123, "first": 2000}
    lines = header(found).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 120
    shown = " ".join(" ".join(lines).split())
    for text in ("64 x NVIDIA H100 80GB HBM3", "8 hosts", "10,000,000,000 training tokens", "0.12 epochs"):
        assert text in shown


def test_one_of_a_thing_is_no_plural(tmp_path):
    trainer(settings(tmp_path, steps=1)).fit()
    found = facts(tmp_path)
    found["training"] |= {"steps": 1, "global_batch": 1}
    found["data"] = {"train_tokens": 1, "validation_targets": 1}
    shown = header(found)
    for text in ("1 step x 192 tokens", "1 sequence of", "1 rank x", "1 training token, 1 validation target"):
        assert text in shown
    found["data"] = {"train_tokens": 3000, "validation_targets": 278}
    assert "3,000 training tokens, 278 validation targets" in header(found)


EXPECTED = {
    "device": "H100 SXM",
    "available": 80 * 2**30,
    "memory": {"parameters": 2**30, "total": 63 * 2**30},
    "seconds_per_step": 0.2926,
    "seconds": 1463.0,
}


def test_what_a_run_is_expected_to_need_is_in_its_header_and_in_run_json(tmp_path):
    made = trainer(settings(tmp_path, steps=1))
    made.expect = lambda: EXPECTED
    made.fit()
    assert facts(tmp_path)["expected"] == EXPECTED
    shown = " ".join((tmp_path / "log.txt").read_text().split())
    text = "63.0 of 80.0 GiB per rank (17.0 GiB left), 293 ms per step, 0:24:23 for the whole run on H100 SXM, estimated"
    assert f"expected {text}" in shown


def test_a_run_on_a_device_that_is_not_known_expects_nothing(tmp_path):
    trainer(settings(tmp_path, steps=1)).fit()
    assert facts(tmp_path)["expected"] == {}
    assert "expected" not in header(facts(tmp_path))


def test_a_run_that_will_not_fit_says_how_much_is_missing():
    total = EXPECTED["memory"] | {"total": 90 * 2**30}
    assert "90.0 of 80.0 GiB per rank (10.0 GiB too much)" in describe_expected(EXPECTED | {"memory": total})
    assert describe_expected({"device": "H200", "available": 1, "memory": {}}) == (
        "memory not known on H200, estimated"
    )
