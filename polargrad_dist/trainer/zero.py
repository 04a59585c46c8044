"""``strategy: deepspeed``: the loop's model and optimizer under a DeepSpeed engine, and their tensors for checkpoints.

Checkpoints have the same content as under every other strategy: full names and shapes, with the rows of fp32 weights and of
state distributed over the ranks. So a run can resume under any strategy, ZeRO stage and number of ranks.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard

from polargrad_dist.distributed.layout import chunk
from polargrad_dist.distributed.plan import Plan
from polargrad_dist.distributed.teams import dtensor, local
from polargrad_dist.distributed.transport import Agreement, Traffic
from polargrad_dist.errors import TrainingError
from polargrad_dist.integrations.deepspeed import ZeroPolarGrad, without_inference_kernel
from polargrad_dist.integrations.deepspeed_checks import check_config
from polargrad_dist.integrations.fragments import FragmentPolarGrad
from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.optim.facts import Facts
from polargrad_dist.optim.matrix import rule_of
from polargrad_dist.optim.member import Member
from polargrad_dist.optim.names import cleaner
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.strategies import Placed
from polargrad_dist.trainer.world import World


def engine_configuration(config: TrainerConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration for a run. DeepSpeed clips gradients, before it calls the optimizer."""
    zero: dict[str, Any] = {"stage": config.strategy.zero_stage_or_default}
    if config.strategy.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    mixed = config.precision == "bf16-mixed"
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world.size),
        "gradient_clipping": config.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # No module is "safe": gradients are reduced in fp32, like the weights, as under the other strategies.
        "torch_autocast": {"enabled": mixed, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 2**31 - 1,
    }


def start(
    model: nn.Module, optimizer: OptimizerConfig, config: TrainerConfig, world: World
) -> tuple[Placed, ZeroRun]:
    """Wraps a model in a DeepSpeed engine; returns what the loop calls. A collective."""
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Required by DeepSpeed; launchers set it
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if world.device.type == "cpu" else "nccl", rank=0, world_size=1, store=dist.HashStore()
        )
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if world.device.type == "cpu":
        without_inference_kernel()
    deepspeed.init_distributed(dist_init_required=False)
    if config.activation_checkpointing:
        model.checkpoint_blocks()  # type: ignore[operator]
    client = ZeroPolarGrad.from_config(model, optimizer)
    settings = engine_configuration(config, world)
    check_config(settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=settings)
    run = ZeroRun(engine, client, world)
    return ZeroPlaced(engine, nullcontext, nullcontext, run), run


@dataclass
class ZeroPlaced(Placed):
    """A model in a DeepSpeed engine, which applies the configured precision itself."""

    run: ZeroRun

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        self.run.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.run.backward(loss)

    def weights(self) -> dict[str, Tensor]:
        return self.run.weights()

    def restored(self, tensors: Mapping[str, Tensor]) -> None:
        self.run.restored(tensors)


class ZeroRun:
    """A `ZeroPolarGrad` and its engine as the loop's optimizer: `PolarGrad`'s methods on ZeRO's gradients and weights."""

    # The engine checks every step on the host, so a failure is raised in the step itself
    late = False

    def __init__(self, engine: Any, client: ZeroPolarGrad, world: World):
        self.engine, self.client, self.world = engine, client, world
        self.zero = engine.optimizer
        self.inner = client.bound()
        self.sharded = isinstance(self.inner, FragmentPolarGrad)
        self.stage3 = self.sharded and hasattr(client.named[0][0][1], "ds_id")
        self.mesh: DeviceMesh | None = None
        self._pending = False

    # Stepping

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.client.param_groups

    @property
    def works(self) -> list[Member]:
        return self.inner.works

    @property
    def facts(self) -> Facts:
        return self.inner.facts

    @property
    def agreement(self) -> Agreement | None:
        return self.inner.agreement

    def plan(self) -> Plan:
        return self.inner.plan()

    def stats(self, by: str = "role") -> dict[str, dict[str, float]]:
        return self.inner.stats(by)

    def keep_next(self, members: Iterable[Member]) -> None:
        self.inner.keep_next(members)

    def finish_reductions(self) -> None:
        """Does nothing: ZeRO has reduced all gradients by the end of the last backward pass."""

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a loss that is already divided by the number of micro-batches; ZeRO reduces in the last one."""
        self.engine.backward(loss, scale_wrt_gas=False)
        self._pending = True

    def zero_grad(self) -> None:
        """Discards the gradients of a skipped step: a step of the engine in which the optimizer does nothing."""
        if self._pending:
            self.client.idle = True
            try:
                self.engine.step()
            finally:
                self.client.idle, self._pending = False, False

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The global norm, 0-d fp64. The engine clips to the configured ``max_norm`` itself, just before its step."""
        if not self.sharded:
            return self.inner.clip_grad_norm_(math.inf)
        return self.inner._norm(list(self._gradients().values()))

    def step(self) -> None:
        """Raises ``TrainingError`` if DeepSpeed finds a norm non-finite that is finite in fp64."""
        self._pending = False
        self.engine.step()
        if not self.engine.was_step_applied():
            raise TrainingError(
                "DeepSpeed did not make the step, since the gradient norm overflows fp32: lower the learning rates"
            )
        self.inner.check_last_step()

    def check_last_step(self) -> None:
        """Does nothing: errors are raised in the step."""

    def _gradients(self) -> dict[Tensor, Tensor]:
        """This rank's interval of each parameter's reduced gradient, flat."""
        params = [p for named in self.client.named for _, p in named]
        if self.stage3:
            partitions = self.zero.get_fp32_grad_partitions()
            found = {}
            for number, group in enumerate(self.zero.fp16_groups):
                for i, p in enumerate(group):
                    found[p] = partitions[number][i][: self.client.wholes[p].elements]
            return found
        held = [(p, p._hp_mapping) for p in params if getattr(p, "_hp_mapping", None) is not None]
        return {p: m.get_lp_grad_fragment(p._index_in_param_group).flatten() for p, m in held}

    def shard_gradient(self, member: Member) -> Tensor:
        """See `PolarGrad.shard_gradient`."""
        if not isinstance(self.inner, FragmentPolarGrad):
            return self.inner.shard_gradient(member)
        fragment = self.inner.fragments[member.p]
        if not fragment.elements:
            return torch.zeros_like(member.canonical(member.p, member.shard))
        p, first = self.client.source[fragment]
        return member.canonical(
            self._gradients()[p].narrow(0, first, fragment.elements).to(member.state_dtype)
        )

    # Saving and resuming

    def weights(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, as this rank stores them; at stage 3 its rows, and a collective."""
        module = self.engine.module
        clean = cleaner(module)
        persistent = module.state_dict() if not self.stage3 else dict(module.named_buffers())
        named = {clean(n): b.detach() for n, b in module.named_buffers() if n in persistent}
        if not self.stage3:
            return {clean(n): p.detach() for n, p in module.named_parameters()} | named
        for name, p in module.named_parameters():
            if p in self.client.wholes:
                whole = self.client.wholes[p]
                named[clean(name)] = self._as_rows(whole.of(whole.flat), p)  # type: ignore[arg-type]
        return named

    def named_state(self) -> dict[str, Tensor]:
        """`PolarGrad.named_state`; flat vectors are copied, and `restored` writes them back. A collective."""
        if not self.sharded:
            return self.inner.named_state()
        out = {}
        for name, p, group, states in self._states():
            whole = self.client.wholes[p]
            for key in rule_of(group).states(group):
                here = torch.zeros(0, device=self._device) if states is None else whole.of(states[key])
                out[f"{name}.{key}"] = self._as_rows(here, p)
            if not rule_of(group).matrices:
                out[f"{name}.step"] = self._count(group).clone()
        return out

    @torch.no_grad()
    def restored(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes back what was loaded into `weights` and `named_state`. A collective."""
        if not isinstance(self.inner, FragmentPolarGrad):
            return
        if self.stage3:
            self.zero.checkpoint_event_prologue()
        for name, p, group, states in self._states():
            whole = self.client.wholes[p]
            if self.stage3:
                whole.of(whole.flat).copy_(self._as_stretch(tensors[f"model/{name}"], p))  # type: ignore[arg-type]
            for key in rule_of(group).states(group):
                here = self._as_stretch(tensors[f"optim/{name}.{key}"], p)
                if states is not None:
                    whole.of(states[key]).copy_(here)
            if not rule_of(group).matrices and states is not None:
                states["step"].copy_(tensors[f"optim/{name}.step"])
        self.inner.follow(reload=True)
        for m in self.works:
            # Also on ranks that store none of its elements
            if "step" in m.state:
                m.state["step"].copy_(tensors[f"optim/{m.entry.name}.step"])
        if not self.stage3:
            self.zero.refresh_fp32_params()
            return
        for number in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        self.zero.checkpoint_event_epilogue()

    def _states(self) -> Iterable[tuple[str, Any, dict[str, Any], dict[str, Tensor] | None]]:
        """Of every parameter: name, group, and the states of the flat vector that holds its elements on this rank."""
        for group, named in zip(self.client.param_groups, self.client.named, strict=True):
            for name, p in named:
                flat = self.client.wholes[p].flat
                yield name, p, group, None if flat is None else self.client.state[flat]

    @property
    def _device(self) -> torch.device:
        return self.inner._travel.device

    def _count(self, group: dict[str, Any]) -> Tensor:
        """The step count of an elementwise group, the same on every rank."""
        return next(m.state["step"] for m in self.works if m.entry.group == self.param_groups.index(group))

    def _exchanged(self, x: Tensor, mine: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> Tensor:
        """Redistributes from intervals ``mine`` of each rank to intervals ``theirs``; ``x`` is this rank's ``mine``."""
        if self.world.size == 1:
            return x
        rank = self.world.rank

        def common(a: tuple[int, int], b: tuple[int, int]) -> int:
            return max(0, min(a[1], b[1]) - max(a[0], b[0]))

        sent = [common(mine[rank], other) for other in theirs]
        received = [common(other, theirs[rank]) for other in mine]
        assert dist.group.WORLD is not None
        x = x.to(self._device)[: sum(sent)]
        return Traffic().all_to_all(x, sent, received, dist.group.WORLD).wait()

    def _rows(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Each rank's rows as an interval of elements; a scalar belongs to rank 0."""
        length, size = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        cuts = [chunk(length, self.world.size, rank) for rank in range(self.world.size)]
        return [(first * size, last * size) for first, last in cuts]

    def _as_rows(self, x: Tensor, p: Any) -> Tensor:
        """An interval of elements on every rank, as a DTensor sharded by rows."""
        whole = self.client.wholes[p]
        rows = self._rows(whole.shape) if whole.shape else [(0, 1)] * self.world.size
        here = self._exchanged(x, list(whole.bounds), rows)
        if self.world.size == 1 or not whole.shape:
            return here.view(whole.shape).clone()
        self.mesh = self.mesh or init_device_mesh(self._device.type, (self.world.size,))
        return dtensor(here.view(-1, *whole.shape[1:]), self.mesh, [Shard(0)], whole.shape)

    def _as_stretch(self, x: Tensor, p: Any) -> Tensor:
        """This rank's interval of a tensor from `_as_rows`, possibly loaded since."""
        whole = self.client.wholes[p]
        return self._exchanged(local(x).reshape(-1), self._rows(whole.shape), list(whole.bounds))
