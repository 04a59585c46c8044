"""PolarGrad: one optimizer for every role of a model, on one device or many, however its parameters are sharded.

This file has what a user calls: groups, clipping, the order of a step, the plan and the statistics. The step of a bucket
is in `bucket`, the mathematics of a rule in `matrix`, placement in `world`, saving and loading in `state`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from polargrad_dist.distributed.plan import Plan
from polargrad_dist.distributed.teams import local
from polargrad_dist.distributed.transport import Agreement, Traffic
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.alike import RATES_CHECKED, check_alike, redistribute
from polargrad_dist.optim.bucket import run
from polargrad_dist.optim.checks import (
    Watch,
    check_keys,
    check_parameter,
    check_travel,
    check_values,
)
from polargrad_dist.optim.elements import by_kind, shrinking, sum_of_squares
from polargrad_dist.optim.facts import Facts, Sums, failure_of
from polargrad_dist.optim.groups import DEFAULTS, completed, listed, routed
from polargrad_dist.optim.member import Member, Travel
from polargrad_dist.optim.replaced import ModelWatch
from polargrad_dist.optim.routing import route
from polargrad_dist.optim.rules import OptimizerConfig, Rule
from polargrad_dist.optim.state import NamedState
from polargrad_dist.optim.world import World


class PolarGrad(NamedState, torch.optim.Optimizer):
    """The PolarGrad family, Muon, AdamW and registered rules in one optimizer.

    Args:
        params: a model (routed by `route`), an iterable of parameters or of (name, parameter) pairs, or parameter groups; a
            group may set every field of `Rule`, a registered rule's options by their own names, and the last four arguments
            below.
        lr: base learning rate of groups that set none; defaults to 1e-3. See `Rule`.
        hidden, embed, head, value_embed, scalar: for a model, changes to a role's rule in `OptimizerConfig()`: a dict such as
            ``hidden={"lr": 0.02}``, or a `Rule`. A dict for head or value_embed starts from the rule of
            embed. A dict that changes algorithm or scale must set lr.
        process_group: ranks that hold copies of plain parameters. Defaults to the default group if torch.distributed is
            initialized.
        norm_group: ranks over which `clip_grad_norm_` takes the norm, for example all pipeline stages. Defaults to the
            ranks that store the parameters.
        gradients: "all_reduced", or "reduce_scatter": the optimizer reduces gradients itself; do not wrap the model in DDP.
        comm_dtype: dtype, or its name, in which momenta, directions and updates are sent. Defaults to the parameters'
            dtype; weights are then sent instead of updates.
        bucket_mb: MiB of matrices, and of weights, per collective. Defaults to 32, on a GPU to 256.
        **rule: the other fields of `Rule` in the same way, for groups that do not set it (momentum defaults to "none"), and:
        split_sizes: numbers of rows of the matrices that are stacked in a fused parameter; each is stepped on its own.
        num_heads: the same for equal blocks: the number of blocks.
        flatten: treat a 3-D parameter as a convolution (first dimension by all others), not as a stack of matrices.
        transposed: the parameter stores (in, out), as transformers' Conv1D does: it is split along columns and scaled as
            (out, in).

    Build it on every rank, after DDP, ``fully_shard``, ``parallelize_module`` or ``to(device)``. Half-precision parameters
    are stepped in fp32; for bf16 this is exact, because the low bits are kept as state.

    Raises ``ConfigError`` for parameters that it cannot step. ``step`` raises on all ranks together if a rule fails or
    returns a value that is not finite (on GPUs at the following step, so that no step waits for the device).
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        *,
        hidden: Mapping[str, Any] | Rule | None = None,
        embed: Mapping[str, Any] | Rule | None = None,
        head: Mapping[str, Any] | Rule | None = None,
        value_embed: Mapping[str, Any] | Rule | None = None,
        scalar: Mapping[str, Any] | Rule | None = None,
        process_group: dist.ProcessGroup | None = None,
        norm_group: dist.ProcessGroup | None = None,
        gradients: str = "all_reduced",
        comm_dtype: torch.dtype | str | None = None,
        bucket_mb: float | None = None,
        **rule: Any,
    ):
        if gradients not in ("all_reduced", "reduce_scatter"):
            raise ConfigError(f"gradients is {gradients!r}, expected 'all_reduced' or 'reduce_scatter'")
        rule |= {} if lr is None else {"lr": lr}
        check_keys(rule, "PolarGrad")
        roles = {"hidden": hidden, "embed": embed, "head": head, "value_embed": value_embed, "scalar": scalar}
        given = {role: changes for role, changes in roles.items() if changes is not None}
        self._model: ModelWatch | None = None
        if isinstance(params, nn.Module):
            self._model = ModelWatch(params)
            params = routed(params, gradients, given, rule)
        elif given:
            raise ConfigError(
                f"{min(given)} sets a role's rule, but parameters were given, expected a model: pass the model, or set the "
                "rule in the parameter group"
            )
        self.traffic = Traffic()
        dtype = check_travel(comm_dtype, bucket_mb)
        wish = None if bucket_mb is None else max(1, int(bucket_mb * 2**20))
        self._travel = Travel(self.traffic, dtype, wish)
        self._gradients, self._norm_group = gradients, norm_group
        self._world = self._new_world(process_group)
        self._watches: list[Watch] = []
        # The numbers of each group when it was last checked.
        self._said: dict[int, tuple[Any, ...]] = {}
        self._state_places: list[tuple[torch.Tensor, int, torch.Size, torch.dtype]] = []
        self._steps = 0
        self._keep: frozenset[int] = frozenset()
        self._facts = Facts()
        super().__init__(listed(params), DEFAULTS | rule)
        self._place(self.param_groups)

    @classmethod
    def from_config(
        cls, model: nn.Module, config: OptimizerConfig, process_group: dist.ProcessGroup | None = None
    ) -> PolarGrad:
        """Routes a model by its roles and builds the optimizer that the configuration describes."""
        if not isinstance(config, OptimizerConfig):
            raise ConfigError(f"the configuration is a {type(config).__name__}, expected an OptimizerConfig")
        optimizer = cls(
            route(model, config),
            process_group=process_group,
            gradients=config.gradients,
            comm_dtype=config.comm_dtype,
            bucket_mb=config.bucket_mb,
        )
        optimizer._model = ModelWatch(model)
        return optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, on all ranks. The owners of earlier parameters do not change."""
        where = f"parameter group {len(self.param_groups)}"
        count = sum(len(other["params"]) for other in self.param_groups)
        group = completed(param_group, self.defaults, where, count)
        taken = [name for other in self.param_groups for name in other["param_names"]]
        names = [*taken, *group["param_names"]]
        if again := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"{min(again)!r} names two parameters, expected each name once")
        check_values(group, where)
        for name, p in zip(group["param_names"], group["params"], strict=True):
            check_parameter(name, p, self._gradients)
        if self._travel.reducer is not None:
            raise ConfigError(
                "a parameter group was added with gradients='reduce_scatter', expected all groups at construction: build a "
                "new optimizer"
            )
        named = list(zip(group.pop("param_names"), group.pop("params"), strict=True))
        super().add_param_group(group | {"params": named})
        if self._world.placed:
            try:
                self._place(self.param_groups[-1:])
            except ConfigError:
                # A refused group leaves nothing behind.
                self.param_groups.pop()
                raise
        self._watches.append(Watch(len(self._watches), self.param_groups[-1]))

    def _new_world(self, process_group: dist.ProcessGroup | None) -> World:
        return World(process_group, self._travel, self._gradients)

    def _place(self, groups: Iterable[dict[str, Any]]) -> None:
        """Determines the ranks and owners of these groups' parameters, and creates their state."""
        numbers = {id(group): number for number, group in enumerate(self.param_groups)}
        self._world.add(
            [(numbers[id(group)], group, name, p) for group in groups
             for name, p in zip(group["param_names"], group["params"], strict=True)],
            self.state,
        )  # fmt: skip
        self._world.placed = [id(p) for group in self.param_groups for p in group["params"]]

    def _check_placed(self) -> ConfigError | None:
        """Adopts parameters replaced before the first step, as by Accelerate's FSDP2, and states replaced at any time.

        Returns the error for what cannot be adopted.
        """
        if self._world.placed != [id(p) for group in self.param_groups for p in group["params"]]:
            if self._steps or self._travel.reducer is not None:
                return ConfigError(
                    "the parameters of the optimizer's groups were replaced after its first step, expected the same ones: "
                    "build a new optimizer from the new ones, and load the old one's state"
                )
            self.state.clear()
            self._state_places = []
            world = self._world
            self._world = self._new_world(world.process_group)
            self._place(self.param_groups)
        now = []
        for m in self._world.members:
            here = m.p.to_local() if isinstance(m.p, DTensor) else m.p
            if not here.is_contiguous():
                return ConfigError(
                    f"{m.entry.name} is no longer contiguous in memory, as after to(memory_format=channels_last) or the "
                    "removal of a parametrization, expected it contiguous as at construction: "
                    "set its data to data.contiguous()"
                )
            group, state = self.param_groups[m.number], self.state.get(m.p)
            if group is not m.group or state is not m.state:
                if state is None or not all(
                    k in state and state[k].shape == v.shape for k, v in m.state.items()
                ):
                    return ConfigError(
                        f"the optimizer's state of {m.entry.name} was replaced by an incomplete one, expected "
                        f"{', '.join(m.state)} as at construction: load state with load_state_dict"
                    )
                m.group, m.state = group, state
                self._world.schedules.clear()
            if m.p.shape != m.shape:
                return ConfigError(
                    f"{m.entry.name} has shape {tuple(m.p.shape)}, expected {m.shape} as at construction: "
                    "build a new optimizer after you resize a parameter, such as an embedding for more tokens"
                )
            if m.p.dtype != m.entry.dtype or (not isinstance(m.p, DTensor) and m.p.device != m.device):
                return ConfigError(
                    f"{m.entry.name} is {m.p.dtype} on {m.p.device}, expected {m.entry.dtype} on {m.device} as at "
                    "construction: convert and move the model before you build the optimizer"
                )
            # Keeps the tensors themselves: an id or an address may be reused once its tensor is gone.
            parts = ((v, v.to_local() if isinstance(v, DTensor) else v) for v in m.state.values())
            now += [(v, part.data_ptr(), part.shape, part.dtype) for v, part in parts]
        before = self._state_places
        if len(now) != len(before) or any(
            a[0] is not b[0] or a[1:] != b[1:] for a, b in zip(now, before, strict=True)
        ):
            if len(now) == len(before) and any(a[2:] != b[2:] for a, b in zip(now, before, strict=True)):
                return ConfigError(
                    "a state of the optimizer was replaced by one of another shape or dtype, expected those of construction: "
                    "load state with load_state_dict"
                )
            self._world.schedules.clear()
        self._state_places = now
        return None

    def _problem(self) -> ConfigError | None:
        """The error that keeps this rank from stepping, if any; a group is checked again only if it has changed."""
        if (problem := self._check_placed()) is not None:
            return problem
        for number, group in enumerate(self.param_groups):
            said = tuple(
                float(v) if isinstance(v, torch.Tensor) and v.numel() == 1 and v.device.type == "cpu"
                else tuple(v) if isinstance(v, list) else v
                for k, v in group.items() if k not in ("params", "param_names", "initial_lr")
            )  # fmt: skip
            if said != self._said.get(number):
                if (problem := self._watches[number].complaint(group)) is not None:
                    return problem
                self._said[number] = said
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None and p.grad.layout != torch.strided:
                    return ConfigError(
                        f"the gradient of {name} is sparse, expected a dense one: build nn.Embedding with sparse=False (zero "
                        "rows stay zero, and on CPUs cost nothing)"
                    )
        if self._model is not None and self._steps % RATES_CHECKED == 0:
            return self._model.complaint(self._world.members)
        return None

    @property
    def works(self) -> list[Member]:
        """Every parameter of this rank with its plan entry, group, ranks and state."""
        return self._world.members

    def no_sync(self) -> AbstractContextManager[None]:
        """For gradients="reduce_scatter": backward passes inside accumulate without reducing. Otherwise it does nothing."""
        return self._travel.reducer.no_sync() if self._travel.reducer else nullcontext()

    def finish_reductions(self) -> None:
        """For gradients="reduce_scatter": waits until all gradients are reduced, as clipping and stepping do."""
        if self._travel.reducer:
            self._travel.reducer.finish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        # A gradient that has been sent has no memory to zero.
        super().zero_grad(set_to_none or self._travel.reducer is not None)
        if self._travel.reducer:
            self._travel.reducer.clear()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scales all gradients to a global Euclidean norm of at most ``max_norm``; returns the norm before, 0-d fp64.

        The norm is over all parameters and ranks (of ``norm_group``), counts each element once, and has the same bits on
        every rank. With an infinite ``max_norm`` gradients are not changed.
        """
        if not max_norm >= 0:
            raise ConfigError(f"max_norm is {max_norm}, expected a number >= 0")
        # On several ranks the next step() refuses on all of them together; raising here would leave the other ranks waiting.
        problem = self._problem()
        if problem is not None and self.agreement is None:
            raise problem
        self.finish_reductions()
        if self._world.meshes:
            redistribute(self._world)
        counted, grads = [], []
        for m in self.works:
            reduced = self._travel.reducer is not None
            grad = self._travel.gradient(m) if reduced else m.p.grad
            if grad is None or grad.layout != torch.strided:
                continue
            grads.append(local(grad))
            if self._world.counted(m):
                counted.append(grad if reduced else self._travel.gradient(m))
        norm = self._norm(counted)
        if max_norm < float("inf"):
            shrink = shrinking(norm, max_norm)
            if shrink.device.type != "cpu" or float(shrink) != 1.0:
                for alike in by_kind(grads):
                    torch._foreach_mul_(alike, shrink.to(alike[0].device, alike[0].dtype))
        return norm

    def _norm(self, counted: list[torch.Tensor]) -> torch.Tensor:
        """The Euclidean norm over all ranks of what each counts, with the same bits on every rank."""
        square = sum_of_squares(counted, self._travel.device)
        group = self._norm_group or self._world.group
        if group is not None and group.size() > 1:
            square = self.traffic.all_gather(square, group).wait().sum()
        return square.sqrt()

    # A compiled training step calls it as it is: Dynamo cannot trace collectives on groups of one's own.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        ok: torch.Tensor | None = None,
        shrink: torch.Tensor | None = None,
    ) -> Any:
        """Steps every parameter that has a gradient on some rank; returns the closure's loss.

        ``ok``, a 0-d bool on the device and the same on all ranks, decides on the device whether the step takes place: if it
        is false, weights and state stay unchanged, bit for bit. ``shrink``, a 0-d tensor on the device, multiplies all
        gradients as they are read, which saves the separate pass of `clip_grad_norm_`.

        All ranks must call it. Raises on all of them together if a rule fails on one, or returns a value that is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if ok is not None and not (isinstance(ok, torch.Tensor) and ok.dtype == torch.bool and ok.ndim == 0):
            raise ConfigError(f"ok is {ok!r}, expected a 0-d bool tensor, or None")
        if self._travel.reducer:
            self._travel.reducer.finish()
        present, world, travel = self._agreed(), self._world, self._travel
        if self._steps <= 2 or self._steps % RATES_CHECKED == 0:
            check_alike(world, self.param_groups, self._steps)
        sums = Sums(world.sum_rows, world.counts, travel.device) if world.sum_rows else None
        facts = self._facts = Facts(self._keep, ok, sums)
        self._keep = frozenset()
        travel.ok, travel.shrink = ok, shrink
        travel.numbers.clear()
        schedule = world.schedules.get(present) or world.schedule(present)
        with torch.autocast(travel.device.type, enabled=False):
            run(schedule, facts, self._add_up if sums is not None else None)
        if self.late:
            facts.send()
        else:
            self._raise_together()
        return loss

    def _add_up(self) -> None:
        """Sums each rank's part of the step's sums, in one order, so that all ranks get the same bits."""
        group, sums = self._world.group, self._facts.sums
        assert sums is not None
        if group is not None and group.size() > 1:
            sums.values = self.traffic.all_gather(sums.values, group).wait().sum(0)

    def _agreed(self) -> tuple[bool, ...]:
        """Which parameters have a gradient on some rank; raises, on all ranks together, what keeps one from stepping."""
        problem = self._problem()
        self._steps, self._consolidated = self._steps + 1, None
        reducer, world = self._travel.reducer, self._world
        marks = [0] * len(world.entries)
        for m in world.members:
            grad = m.p.grad
            marks[m.index] = int(reducer.present[m.p] if reducer else grad is not None)
            marks[m.index] += isinstance(grad, DTensor) and m.misplaced
        late = self._facts.sent is not None and self._facts.worst()[0] > 0
        present = torch.tensor([*marks, late, problem is not None], dtype=torch.int32, device="cpu")
        if world.agreement is not None:
            world.agreement.largest(present)
        *somewhere, failed, refused = present.tolist()
        if refused:
            raise problem or ConfigError("another rank cannot step, so no rank does: see its error")
        if failed:
            self._raise_together()
        if max(somewhere, default=0) > 1:
            redistribute(world)
        if self._steps == 1 and not any(somewhere):
            warnings.warn(
                "no parameter of the optimizer has a gradient on any rank, so its first step changes nothing: call "
                "backward() before it, and build the optimizer after fully_shard, load_state_dict(assign=True) and whatever "
                "else replaces the model's parameters",
                # The caller, beyond what torch wraps a step in.
                stacklevel=7,
            )
        return tuple(map(bool, somewhere))

    def _raise_together(self) -> None:
        """Raises the worst failure of the last step on all ranks, once."""
        facts, world = self._facts, self._world
        try:
            kind, index = facts.worst()
            worst = kind << 32 | index
            if world.agreement is not None:
                worst = int(world.agreement.largest(torch.tensor([worst], device="cpu")))
            if worst:
                kind, index = worst >> 32, worst & 0xFFFFFFFF
                own = facts.error if facts.failure == (kind, index) else None
                raise failure_of(kind, world.entries[index], own, self._travel.device) from own
        except BaseException:
            self._facts = Facts()
            raise

    @property
    def late(self) -> bool:
        """Whether a failed step raises at the following step, so that no step waits for the device: true on GPUs."""
        return self._travel.device.type != "cpu"

    def check_last_step(self) -> None:
        """Raises the last step's failure, which on a GPU the next step would raise. Waits; all ranks must call it."""
        if self.late:
            self._raise_together()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(
            "a PolarGrad was pickled or deep-copied, which its process groups do not allow: save full_state_dict(), and load "
            "it into a new optimizer"
        )

    def keep_next(self, members: Iterable[Member]) -> None:
        """Makes the owners of these keep the oracle's input and output of the next step in ``facts``."""
        self._keep = frozenset(m.index for m in members)

    @property
    def agreement(self) -> Agreement | None:
        """The small collectives over all ranks; None on one."""
        return self._world.agreement

    @property
    def facts(self) -> Facts:
        """Statistics of the last step on this rank."""
        return self._facts

    def shard_gradient(self, member: Member) -> torch.Tensor:
        """The gradient of this rank's optimizer shard of a parameter, or zeros: (slices, rows, columns)."""
        return self._travel.gradient(member)

    def plan(self) -> Plan:
        """The owners, kind and cost of every parameter, the balance over ranks, memory and expected traffic."""
        return self._world.plan

    def stats(self, by: str = "role") -> dict[str, dict[str, float]]:
        """Statistics of the last step, per role or per parameter (``by="parameter"``); nothing is recomputed.

        ``nuclear_norm`` is summed over a parameter's matrices and averaged over a role. ``condition`` (largest over smallest
        singular value above the cut-off) and ``residual`` (norm of U'U - I) are the largest of a role, NaN if the oracle
        does not compute them (Newton-Schulz and Polar Express compute only the nuclear norm). Per role there are also the
        ``seconds`` in the oracle on the busiest rank. Two small collectives: call it on all ranks.
        """
        if by not in ("role", "parameter"):
            raise ConfigError(f"stats() was called with by={by!r}, expected 'role' or 'parameter'")
        return self._facts.stats(by, self._world.entries, self.agreement)
