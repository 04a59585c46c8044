"""A run whose host does not look before a step, as on a GPU: nothing is read back, and nothing is lost by it."""

import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from polargrad_dist import PolarGrad
from polargrad_dist.diagnostics import DiagnosticsConfig
from polargrad_dist.errors import TrainingError
from polargrad_dist.optim import OptimizerConfig, muon_rule, polarsgdm_rule, relative_rule
from polargrad_dist.optim.matrix import RULES
from polargrad_dist.polar import polynomial, root
from polargrad_dist.trainer import World
from polargrad_dist.trainer.config import SafetyConfig, StrategyConfig
from tests.gloo import run_ranks
from tests.models.tiny import tiny
from tests.trainer.test_health import poison, saved_steps
from tests.trainer.toy import VOCABULARY, rules, settings, trainer

NO_LOOKS = DiagnosticsConfig(every=0)


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(PolarGrad, "late", True)


def records(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: r[k] for k in ("step", "loss", "grad_norm", "skipped", "polar") if k in r} for r in lines]


def everything(t) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in t.tensors().items()}


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def without_seconds(found: list[dict]) -> list[dict]:
    for record in found:
        for figures in record.get("polar", {}).values():
            figures.pop("seconds")
    return found


def test_a_run_that_hears_of_its_steps_late_has_the_bits_and_the_metrics_of_one_that_looks(
    tmp_path, monkeypatch
):
    # Steps 2 and 7 are skipped
    options = {"poison": {13, 14, 75}, "dropout": 0.1}
    seen = trainer(settings(tmp_path / "seen"), **options)
    seen.fit()
    monkeypatch.setattr(PolarGrad, "late", True)
    late = trainer(settings(tmp_path / "late"), **options)
    late.fit()
    assert late.stepper.late
    assert not seen.stepper.late
    assert_same_bits(everything(seen), everything(late))
    assert without_seconds(records(tmp_path / "seen")) == without_seconds(records(tmp_path / "late"))
    assert seen.progress == late.progress
    assert late.progress.skipped == 2
    for folder in ("seen", "late"):
        log = (tmp_path / folder / "log.txt").read_text()
        assert "step 2 is skipped: the loss is nan; loss of rank 0\n" in log
        assert "step 7 is skipped" in log


def test_it_resumes_exactly(tmp_path, late):
    straight = trainer(settings(tmp_path / "a"))
    straight.fit()
    first = trainer(settings(tmp_path / "b"))
    take, count = first.stepper.take, []

    def interrupted(*args):
        count.append(1)
        if len(count) == 7:
            raise KeyboardInterrupt
        take(*args)

    first.stepper.take = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = trainer(settings(tmp_path / "b"))
    assert second.fit().exit_code == 0
    assert_same_bits(everything(straight), everything(second))
    assert records(tmp_path / "a")[-2]["loss"] == records(tmp_path / "b")[-2]["loss"]


def test_a_step_that_must_not_happen_changes_no_bit_and_its_gradient_is_named(tmp_path, late):
    t = trainer(settings(tmp_path, steps=3, diagnostics=NO_LOOKS))
    t.bare.head.weight.register_hook(lambda g: g * float("inf"))
    before = everything(t)
    t.fit()
    assert_same_bits(before, everything(t))
    log = (tmp_path / "log.txt").read_text()
    for step in (1, 2, 3):
        assert (
            f"step {step} is skipped: the gradient norm is nan; on rank 0 the gradient of head.weight\n"
            in log
        )


def test_too_many_of_them_end_the_run_with_the_last_checkpoint_intact(tmp_path, late):
    config = settings(tmp_path, safety=SafetyConfig(max_skipped=2))
    # From the sixth step on
    t = trainer(config, poison=set(range(60, 200)))
    with pytest.raises(
        TrainingError, match=r"2 steps in a row were skipped.*step 4 is intact.*from sample 72 on"
    ):
        t.fit()
    assert saved_steps(tmp_path) == [4]


@pytest.mark.parametrize("step", [6, 8, 12], ids=["between saves", "at a save", "the last"])
def test_weights_that_a_step_poisons_are_never_saved(tmp_path, late, step):
    t = trainer(settings(tmp_path))
    t.data.validation = None
    poison(t, "hidden", step)
    with pytest.raises(TrainingError, match="not finite"):
        t.fit()
    assert saved_steps(tmp_path) == ([4] if step <= 8 else [4, 8])


@pytest.mark.parametrize(
    ("step", "saved"), [(6, 4), (8, 4), (12, 8)], ids=["between saves", "at a save", "the last"]
)
def test_an_oracle_that_fails_is_heard_of_before_anything_is_saved(tmp_path, late, monkeypatch, step, saved):
    rule = RULES["polar"]
    direction, count = type(rule).direction, []

    def fail(A, state, group):
        if group["role"] == "embed":
            count.append(1)
            if len(count) == step:
                raise ValueError("no convergence")
        return direction(rule, A, state, group)

    monkeypatch.setattr(rule, "direction", fail, raising=False)
    t = trainer(
        settings(tmp_path), optimizer=replace(rules(), embed=polarsgdm_rule(0.02, row_sharded=False, oracle="svd"),
                                              head=muon_rule(0.02)))  # fmt: skip
    with pytest.raises(TrainingError, match=rf"^step {step}: the rule of embed.weight failed") as caught:
        t.fit()
    assert f"the checkpoint of step {saved} is intact" in str(caught.value)
    assert saved_steps(tmp_path) == [*range(4, saved + 1, 4)]


def test_a_spike_is_judged_where_the_host_looks(tmp_path, late):
    t = trainer(settings(tmp_path, steps=2, safety=SafetyConfig(spike_sigma=3.0)))
    assert not t.stepper.late


def test_a_request_to_leave_is_answered_one_step_later(tmp_path, late):
    t = trainer(settings(tmp_path))
    take = t.stepper.take

    def ask(batches, leave):
        if t.progress.step == 4:
            leave.signal = signal.SIGTERM
        take(batches, leave)

    t.stepper.take = ask
    assert t.fit().exit_code != 0
    assert saved_steps(tmp_path) == [4, 6]


def _rank(rank: int, world: int, folder: str, strategy: str, gradients: str):
    PolarGrad.late = True
    here = World(rank, world, rank, torch.device("cpu"), dist.group.WORLD)
    t = trainer(
        settings(folder, steps=5, strategy=StrategyConfig(strategy), diagnostics=NO_LOOKS),
        here,
        optimizer=replace(rules(), gradients=gradients),
    )
    calls = []

    def spoil(head, _):
        calls.append(1)
        if rank == 1 and len(calls) == 4:
            # Two micro-batches a step; FSDP2's gathered weight exists only here
            hook = head.weight.register_hook(lambda grad: (hook.remove(), grad * float("inf"))[1])

    t.bare.head.register_forward_pre_hook(spoil)
    t.fit()
    return t.progress.step, t.progress.skipped


@pytest.mark.parametrize(
    ("strategy", "gradients"),
    [("ddp", "all_reduced"), ("ddp", "reduce_scatter"), ("fsdp", "all_reduced")],
)
def test_all_ranks_skip_the_step_that_one_of_them_spoilt(tmp_path, strategy, gradients):
    assert run_ranks(_rank, 2, str(tmp_path), strategy, gradients) == [(5, 1)] * 2
    skipped = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "is skipped" in line]
    assert len(skipped) == 2
    for line in skipped:
        assert "step 2 is skipped" in line
        assert set(re.findall(r"on rank \d the gradient of ([^;]*)", line)) == {"head.weight"}, line


# One whole step, watched.

WAITS = ("_local_scalar_dense", "nonzero", "_linalg_eigh", "_linalg_svd", "linalg_eigh", "linalg_svd", "is_nonzero",
         "masked_select", "unique", "equal", "allclose")  # fmt: skip
READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__")


class NoWaiting(TorchDispatchMode):
    """Refuses operations for whose result a GPU would be waited for, and copies from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in WAITS, f"{name} waits for the device"
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        device = (kwargs or {}).get("device")
        moved = name in ("_to_copy", "copy_") and (
            (device is not None and torch.device(device) != tensors[0].device)
            or len({x.device for x in tensors}) > 1
        )
        assert not moved, f"{name} copies between devices"
        return func(*args, **(kwargs or {}))


class NoReading(TorchFunctionMode):
    """Refuses what reads a tensor, or makes one of numbers of the host, but where the host's own numbers are at hand."""

    def __init__(self, allowed: set[str]):
        self.allowed, self.seen = allowed, set()
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        makes = name in ("tensor", "as_tensor") and (kwargs or {}).get("device") is not None
        where = args[1] if name in ("__getitem__", "__setitem__") else ()
        listed = any(isinstance(x, list) for x in (where if isinstance(where, tuple) else (where,)))
        if name in READS or makes or listed:
            where = caller()
            assert where in self.allowed, f"{name} in {where} reads from the device, or writes to it"
            self.seen.add(where)
        return func(*args, **(kwargs or {}))


def caller() -> str:
    """The function of the project, by file, that is nearest to the top of the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if {"polargrad_dist", "models"} & set(path.parts):
            return f"{path.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


# Host data by construction: which parameters have gradients, and what came through pinned memory one step later.
HOST = {"optimizer.py:_agreed", "transport.py:tolist"}
ORACLES = {
    "Muon and PolarSGDM": rules,
    "exact": lambda: replace(rules(), hidden=muon_rule(0.02, oracle="gram"), embed=polarsgdm_rule(0.02, oracle="gram")),
    "truncated": lambda: replace(rules(), embed=polarsgdm_rule(0.02, oracle="qdwh", steps=2)),
    "state at owners": lambda: replace(rules(), hidden=muon_rule(0.02, normalize="rows"), embed=relative_rule(0.5)),
    "Polar Express": lambda: replace(rules(), hidden=muon_rule(0.02, oracle="polar_express"),
                                     embed=polarsgdm_rule(0.02, momentum="polar_first")),
}  # fmt: skip


def as_on_a_gpu(monkeypatch) -> None:
    """The oracles choose what they choose there."""
    monkeypatch.setattr(root, "choose_root", lambda *args, **kwargs: "products")
    monkeypatch.setattr(polynomial, "may_look", lambda options: False)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_a_whole_step_reads_nothing_back(tmp_path, late, monkeypatch, name, precision):
    as_on_a_gpu(monkeypatch)
    optimizer = ORACLES[name]()
    if name != "exact":
        optimizer = replace(optimizer, hidden=replace(optimizer.hidden, oracle="newton_schulz"))
    t = trainer(settings(tmp_path, steps=6, diagnostics=NO_LOOKS, precision=precision), optimizer=optimizer)
    assert watch_third_step(t).seen == HOST
    assert t.progress.step == 6


def watch_third_step(t) -> NoReading:
    """Trains; copies are compared at the first two steps."""
    take, watched = t.stepper.take, NoReading(HOST)

    def watch(batches, leave):
        if t.progress.step == 2:
            # Drawn beforehand: the toy makes them of numbers
            batch = [next(batches) for _ in range(4)]
            with NoWaiting(), watched:
                take(iter(batch), leave)
        else:
            take(batches, leave)

    t.stepper.take = watch
    t.fit()
    return watched


@pytest.mark.parametrize("architecture", ["gpt2-small", "gpt2-medium", "qwen2.5", "gpt"])
def test_a_whole_step_of_the_models_reads_nothing_back(tmp_path, late, monkeypatch, architecture):
    as_on_a_gpu(monkeypatch)
    config = settings(tmp_path, steps=3, diagnostics=NO_LOOKS)
    model = tiny(architecture, vocab_size=VOCABULARY, end_of_text=VOCABULARY - 1)
    watched = watch_third_step(trainer(config, model=model, optimizer=OptimizerConfig()))
    assert watched.seen == HOST


def test_the_watch_sees_a_read(tmp_path):
    with NoReading(HOST), pytest.raises(AssertionError, match="item in elsewhere"):
        torch.ones(()).item()
    with NoWaiting(), pytest.raises(AssertionError, match="nonzero waits"):
        torch.ones(2).nonzero()
    with NoWaiting(), pytest.raises(AssertionError, match="_linalg_svd waits"):
        torch.linalg.svd(torch.ones(2, 2))
    with NoWaiting(), pytest.raises(AssertionError, match="between devices"):
        torch.ones(2).to("meta")
