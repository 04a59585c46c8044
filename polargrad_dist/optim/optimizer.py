"""PolarGrad: one optimizer for every role of a model, on one device, under DDP, FSDP2 and HSDP.

What lives here is what a user touches: groups, clipping, the order of a step, the plan and the facts. The mathematics
of a step is in `update`, what travels between ranks in `pipeline`, saving and loading in `state`.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from polargrad_dist.distributed.gradients import OwnerReducer
from polargrad_dist.distributed.grid import Grid, Grids
from polargrad_dist.distributed.plan import Plan, entry
from polargrad_dist.distributed.transport import Agreement, Traffic
from polargrad_dist.errors import ConfigError, PolarError
from polargrad_dist.optim.checks import (
    check_keys,
    check_parameter,
    check_travel,
    check_values,
    complaint,
    fixed_part,
)
from polargrad_dist.optim.pipeline import Travel, solve_tall, start_tall, step_grid
from polargrad_dist.optim.routing import route
from polargrad_dist.optim.rules import OptimizerConfig
from polargrad_dist.optim.state import NamedState
from polargrad_dist.optim.update import NAN, Facts, Work, local, make_state, step_adamw

NUMBERS = (
    "lr",
    "beta",
    "betas",
    "eps",
    "weight_decay",
    "lower",
    "steps",
    "nesterov",
    "cautious",
    "scale",
    "spectrum",
)
COPIES_CHECKED = 1000  # steps between looks at whether copies are still equal


class PolarGrad(NamedState, torch.optim.Optimizer):
    """The PolarGrad family, Muon and AdamW in one optimizer.

    Args:
        params: a model (routed by `route` with the default rules), an iterable of parameters or of (name, parameter)
            pairs, or parameter groups; a group may set every field of `Rule` and the three keywords after it.
        lr, algorithm, momentum, beta, nesterov, scale, spectrum, oracle, steps, oracle_dtype, lower, weight_decay, cautious,
            betas, eps, row_sharded: see `Rule`; numbers are read from the group at every step.
        split_sizes: rows of the matrices that a fused parameter holds one below the other, each stepped on its own.
        num_heads: likewise, for equal blocks.
        flatten: treat a 3-D parameter as a convolution (first dimension against the rest), not as a stack of matrices.
        process_group: ranks that hold copies of plain parameters; the default group where torch.distributed is set up.
        gradients: "all_reduced", or "to_owner": the optimizer reduces gradients itself, the model stays out of DDP.
        comm_dtype: type in which momenta and updates travel, as a dtype or its name; None for that of the parameters.
        bucket_mb: MiB of matrices, and of updates, per collective.

    Build it after DDP, ``fully_shard`` or ``to(device)``, on all ranks alike. Half-precision parameters are stepped in
    fp32, bf16 ones exactly: the bits that bf16 lacks are kept as state.

    Raises ``ConfigError`` for parameters that it cannot step. ``step`` raises ``PolarError``, on all ranks together,
    when a polar factor is not finite (on GPUs at the following step, so that no step waits for the device).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        algorithm: str = "polar",
        momentum: str = "none",
        beta: float = 0.95,
        nesterov: bool = False,
        scale: str = "nuclear",
        spectrum: str = "polar",
        oracle: str = "auto",
        steps: int | None = None,
        oracle_dtype: str | None = None,
        lower: float = 1e-4,
        weight_decay: float = 0.0,
        cautious: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        row_sharded: bool | None = None,
        split_sizes: tuple[int, ...] | None = None,
        num_heads: int | None = None,
        flatten: bool = False,
        process_group: dist.ProcessGroup | None = None,
        gradients: str = "all_reduced",
        comm_dtype: torch.dtype | str | None = None,
        bucket_mb: float = 32.0,
    ):
        if gradients not in ("all_reduced", "to_owner"):
            raise ConfigError(f"gradients is {gradients!r}, expected 'all_reduced' or 'to_owner'")
        defaults = dict(
            lr=lr, algorithm=algorithm, momentum=momentum, beta=beta, nesterov=nesterov, scale=scale, spectrum=spectrum,
            oracle=oracle, steps=steps, oracle_dtype=oracle_dtype, lower=lower, weight_decay=weight_decay, cautious=cautious,
            betas=betas, eps=eps, row_sharded=row_sharded, split_sizes=split_sizes, num_heads=num_heads,
            flatten=flatten, role=None,
        )  # fmt: skip
        self.traffic = Traffic()
        dtype = check_travel(comm_dtype, bucket_mb)
        self._travel = Travel(self.traffic, dtype, max(1, int(bucket_mb * 2**20)))
        self._gradients = gradients
        self._grids = Grids(process_group)
        self._works: list[Work] = []
        self._plan: Plan | None = None
        self._agreement: Agreement | None = None
        self._reducer: OwnerReducer | None = None
        self._fixed: list[tuple[Any, ...]] = []
        self._steps = 0
        self._keep: frozenset[int] = frozenset()
        self._facts = Facts()
        if gradients == "to_owner" and isinstance(params, nn.parallel.DistributedDataParallel):
            raise ConfigError(
                "gradients='to_owner' was given a model in DistributedDataParallel, which reduces gradients itself: give "
                "the bare model, or use gradients='all_reduced'"
            )
        groups = route(params) if isinstance(params, nn.Module) else params
        super().__init__(groups, defaults)
        self._place_and_deal()

    @classmethod
    def from_config(
        cls, model: nn.Module, config: OptimizerConfig, process_group: dist.ProcessGroup | None = None
    ) -> PolarGrad:
        """Routes a model by its roles and builds the optimizer that the configuration describes."""
        return cls(
            route(model, config),
            process_group=process_group,
            gradients=config.gradients,
            comm_dtype=config.comm_dtype,
            bucket_mb=config.bucket_mb,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; on several ranks all of them must. Owners of earlier parameters stay as they are."""
        number = len(self.param_groups)
        where = f"parameter group {number}"
        group = self._completed(param_group, where)
        taken = [name for other in self.param_groups for name in other["param_names"]]
        names = [*taken, *group["param_names"]]
        if again := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"{min(again)!r} names two parameters, expected each name once")
        check_values(group, where)
        for name, p in zip(group["param_names"], group["params"], strict=True):
            check_parameter(name, p, self._gradients)
            entry(group, name, p)
        if self._reducer is not None:
            raise ConfigError("gradients='to_owner' cannot take further parameter groups after construction")
        named = list(zip(group.pop("param_names"), group.pop("params"), strict=True))
        super().add_param_group(group | {"params": named})
        self._fixed.append(fixed_part(self.param_groups[-1]))
        if self._plan is not None:
            self._place_and_deal()

    def _completed(self, given: dict[str, Any], where: str) -> dict[str, Any]:
        """A copy of a group with every key, its parameters a list and named."""
        check_keys(given, where)
        params = [given["params"]] if isinstance(given["params"], torch.Tensor) else list(given["params"])
        if not params:
            raise ConfigError("a parameter group is empty, expected at least one parameter in each")
        names = given.get("param_names")
        named = [isinstance(p, tuple) and len(p) == 2 for p in params]
        for i, p in enumerate(params):
            tensor = p[1] if named[i] else p
            if not isinstance(tensor, torch.Tensor) or named[i] != named[0]:
                raise ConfigError(
                    f"{where} holds a {type(p).__name__} at place {i}, expected parameters only,"
                    " or pairs (name, parameter) only"
                )
        if named[0]:
            names, params = [name for name, _ in params], [p for _, p in params]
        if names is None:
            count = sum(len(other["params"]) for other in self.param_groups)
            names = [f"param.{count + i}" for i in range(len(params))]
        if len(names) != len(params):
            raise ConfigError(f"{where} has {len(names)} names for {len(params)} parameters")
        if len(set(map(id, params))) < len(params):
            raise ConfigError(f"{where} holds a parameter twice, expected each once")
        group = self.defaults | given | {"params": params, "param_names": list(names)}
        group["role"] = group["role"] or ("scalar" if group["algorithm"] == "adamw" else "hidden")
        return group

    def _place_and_deal(self) -> None:
        """Finds the grid and the owner of every parameter that has none yet, and makes its state."""
        new: list[Work] = []
        known = {work.entry.name for work in self._works}
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if name not in known:
                    e, grid = entry(group, name, p), self._grids.of(name, p)
                    e.shards = grid.shards
                    new.append(Work(e, p, group, grid, self.state[p], len(self._works) + len(new)))
        self._works += new
        if len(kinds := {local(work.p).device.type for work in self._works}) > 1:
            raise ConfigError(
                f"parameters are on {' and '.join(sorted(kinds))}, expected all on one kind of device"
            )
        world = max(work.grid.world for work in self._works)
        if world > 1:
            self._agreement = self._agreement or Agreement([w.grid for w in self._works], self._device)
            self._agree_on_construction()
        self._plan = self._plan or Plan(world, self._gradients)
        self._plan.add([work.entry for work in new])
        for work in new:
            make_state(work, work.grid.world, work.grid.rank)
        if self._gradients == "to_owner":
            entries = [w.entry for w in self._works]
            self._reducer = OwnerReducer(
                [w.p for w in self._works], entries, self._works[0].grid, self.traffic
            )

    def _agree_on_construction(self) -> None:
        assert self._agreement is not None
        facts = [
            f"{w.entry.name} {w.entry.shape} {w.entry.rule} {w.p.dtype} {w.grid.shards}" for w in self._works
        ]
        digest = torch.tensor([len(facts), zlib.crc32("\n".join(facts).encode())], dtype=torch.int64)
        if not self._agreement.same(digest).all():
            raise ConfigError(
                "the ranks were given different parameters, shapes or rules, expected the same on all: build the same "
                "model and groups on every rank"
            )

    @property
    def _device(self) -> torch.device:
        return local(self._works[0].p).device

    @property
    def works(self) -> list[Work]:
        """Every parameter with its plan entry, group, grid and state."""
        return self._works

    def no_sync(self) -> AbstractContextManager[None]:
        """For gradients="to_owner": backward passes inside accumulate without reducing. Elsewhere it does nothing."""
        return self._reducer.no_sync() if self._reducer else nullcontext()

    def finish_reductions(self) -> None:
        """For gradients="to_owner": waits until each gradient is where it is needed, as clipping and stepping do."""
        if self._reducer:
            self._reducer.finish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._reducer:
            self._reducer.clear()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scales all gradients to a global Euclidean norm of at most ``max_norm``; returns the norm before, 0-d fp64.

        The norm is over all parameters and ranks, each element counted once, and has the same bits on every rank. With
        an infinite ``max_norm`` it only measures.
        """
        if not max_norm >= 0:
            raise ConfigError(f"max_norm is {max_norm}, expected a number >= 0")
        # On several ranks the next step() refuses on all of them together; here one would leave the others waiting.
        if self._agreement is None and (problem := complaint(self.param_groups, self._fixed)):
            raise problem
        if self._reducer:
            self._reducer.finish()
        parts: dict[Grid, list[torch.Tensor]] = defaultdict(list)
        grads = []
        for work in self._works:
            mine = parts[work.grid]
            if work.p.grad is not None and work.p.grad.layout == torch.strided:
                grads.append(grad := local(work.p.grad))
                mine.append(self._reduced_here(work, grad) if self._reducer else grad)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for grid, mine in parts.items():
            mine = [x.float() if x.element_size() < 4 else x for x in mine if x.numel()]
            norms = (
                torch._foreach_norm(mine) if mine else []
            )  # nothing here still takes part in the sum below
            square = sum((norm.double().square() for norm in norms), torch.zeros_like(total))
            for group in grid.groups if self._reducer else [grid.sharding]:
                if group is not None:
                    self.traffic.all_reduce(square, group).wait()
            total += square
        norm = total.sqrt()
        # A non-finite norm must not spread to gradients that are well: who looks for the culprit finds only it.
        coefficient = torch.where(norm.isfinite(), torch.clamp(max_norm / (norm + 1e-6), max=1.0), 1.0)
        for grad in grads:
            grad.mul_(coefficient.to(grad.dtype))
        return norm

    def _reduced_here(self, work: Work, grad: torch.Tensor) -> torch.Tensor:
        """The part of a gradient that was reduced to this rank; elementwise ones are counted by the first."""
        if work.entry.kind == "rows":
            first, last = work.grid.my_rows(grad.shape[0])
            return grad[first:last]
        counted = work.grid.rank == (work.entry.owner if work.entry.kind == "owner" else 0)
        return grad if counted else grad.new_zeros(0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient on some rank; returns the closure's loss.

        Each rank must call it. Raises ``PolarError`` on all of them when a polar factor was not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = self._active()
        self._check_copies()
        facts = self._facts = Facts(keep=self._keep)
        self._keep = frozenset()
        talls = [start_tall(w, self._travel, facts) for w in active if w.entry.kind == "rows"]
        step_adamw(w for w in active if w.entry.kind == "everywhere")
        for tall in talls:
            solve_tall(tall, self._travel, facts)
        matrices = [w for w in active if w.entry.kind != "everywhere"]
        for grid in dict.fromkeys(w.grid for w in matrices):
            whole = [w for w in matrices if w.grid is grid and w.entry.kind == "owner"]
            step_grid(grid, whole, [t for t in talls if t.work.grid is grid], self._travel, facts)
        if self._device.type == "cpu":
            self._raise_together(self._failure())
        return loss

    def _active(self) -> list[Work]:
        """The parameters that have a gradient on some rank; raises the last step's failure where that is still owed."""
        if self._reducer:
            self._reducer.finish()
        here = [self._reducer.present[w.p] if self._reducer else w.p.grad is not None for w in self._works]
        late = self._failure() if self._device.type != "cpu" else 0
        problem = complaint(self.param_groups, self._fixed)
        somewhere = torch.tensor([*here, late, problem is not None], dtype=torch.int32)
        if self._agreement is not None:
            self._agreement.largest(somewhere)
        *present, failed, refused = somewhere.tolist()
        if refused:
            raise problem or ConfigError("another rank cannot step, so no rank does: see its error")
        if failed:
            self._facts = Facts()
            raise self._not_finite(failed)
        return [w for w, has_gradient in zip(self._works, present, strict=True) if has_gradient]

    def _failure(self) -> int:
        """1 + the number of a parameter whose step this rank found not finite, else 0."""
        return 0 if self._facts.failed is None else int(self._facts.failed)

    def _raise_together(self, failure: int) -> None:
        if self._agreement is not None:
            failure = int(self._agreement.largest(torch.tensor([failure])))
        if failure:
            raise self._not_finite(failure)

    def _not_finite(self, failure: int) -> PolarError:
        name = self._works[failure - 1].entry.name
        return PolarError(
            f"the polar factor of {name} is not finite, and so are its weights now: restore them from a checkpoint, and "
            "step only when clip_grad_norm_ returns a finite norm"
        )

    def _check_copies(self) -> None:
        """At the first two steps and every thousand: what differs between copies would go on doing so in silence."""
        self._steps += 1
        if self._agreement is None or (self._steps > 2 and self._steps % COPIES_CHECKED):
            return
        copied = [w for w in self._works if w.grid.replicas > 1]
        weights = [_digest(w.flat) for w in copied]
        grads = [0 if self._reducer or w.p.grad is None else _digest(w.grad) for w in copied]
        whole = torch.tensor([w.grid.shards == 1 for w in copied] * 2, dtype=torch.bool)
        same = self._agreement.same_copies(torch.tensor([*weights, *grads], dtype=torch.int64), whole)
        numbers = [zlib.crc32(repr([group[key] for key in NUMBERS]).encode()) for group in self.param_groups]
        agreed = self._agreement.same(torch.tensor(numbers))
        if not agreed.all():
            number = int((~agreed).nonzero()[0])
            raise ConfigError(
                f"the learning rate or another number of parameter group {number} differs between ranks, expected the same "
                "on all: step the same scheduler on every rank"
            )
        if same.all():
            return
        number = int((~same).nonzero()[0])
        name = copied[number % len(copied)].entry.name
        if number < len(copied):
            raise ConfigError(
                f"{name} differs between ranks that should hold copies of it: give them the same weights before the first "
                "step (DistributedDataParallel does so when it wraps the model, fully_shard does not)"
            )
        raise ConfigError(
            f"the gradient of {name} differs between ranks that hold copies of it: wrap the model in "
            "DistributedDataParallel, average the gradients before step(), or use gradients='to_owner'; where only some "
            "ranks train together, give their process_group"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(
            "a PolarGrad cannot be pickled or deep-copied, since it holds process groups: save full_state_dict(), and load "
            "it into a new optimizer"
        )

    def keep_next(self, works: Iterable[Work]) -> None:
        """Has the owners of these keep in ``facts``, for one step, what the next step's oracle is given and gives."""
        self._keep = frozenset(work.index for work in works)

    @property
    def agreement(self) -> Agreement | None:
        """The small reductions over all ranks; None on one."""
        return self._agreement

    @property
    def facts(self) -> Facts:
        """What the last step learnt on this rank."""
        return self._facts

    def plan(self) -> Plan:
        """Owner, kind and cost of every parameter, the balance over ranks, memory and expected traffic."""
        assert self._plan is not None
        return self._plan

    def stats(self, by: str = "role") -> dict[str, dict[str, float]]:
        """What the last step learnt, per role or per parameter (``by="parameter"``); nothing is computed again.

        ``nuclear_norm`` (summed over a parameter's matrices, averaged over a role), ``condition`` (largest over smallest
        singular value above the cut-off) and ``residual`` (norm of U'U - I), both the largest of a role and NaN where
        the oracle does not know them; per role also ``seconds`` in the oracle on the busiest rank and ``bytes`` of steps
        handed on by this rank. One small collective: call it on all ranks.
        """
        if by not in ("role", "parameter"):
            raise ConfigError(f"stats(by={by!r}), expected 'role' or 'parameter'")
        table = torch.zeros(len(self._works), 5, dtype=torch.float64)
        if known := self._facts.values:
            table[list(known), :4] = torch.stack([values.double() for values in known.values()]).cpu()
            table[list(known), 4] = 1
        roles = list(dict.fromkeys(w.entry.role for w in self._works))
        seconds = torch.tensor([self._facts.total_seconds(role) for role in roles], dtype=torch.float64)
        if self._agreement is not None:
            self._agreement.total(table)
            self._agreement.largest(seconds)
        rows = {}
        for work, (nuclear, largest, smallest, residual, known) in zip(
            self._works, table.tolist(), strict=True
        ):
            if known:
                condition = largest / smallest if smallest > 0 else NAN
                rows[work.entry.name] = {
                    "nuclear_norm": nuclear,
                    "condition": condition,
                    "residual": residual,
                }
        if by == "parameter":
            return rows
        out = {}
        for role, spent in zip(roles, seconds.tolist(), strict=True):
            mine = [rows[w.entry.name] for w in self._works if w.entry.role == role and w.entry.name in rows]
            if mine:
                out[role] = {
                    "nuclear_norm": sum(row["nuclear_norm"] for row in mine) / len(mine),
                    "condition": max(
                        (row["condition"] for row in mine if row["condition"] == row["condition"]),
                        default=NAN,
                    ),
                    "residual": max(
                        (row["residual"] for row in mine if row["residual"] == row["residual"]), default=NAN
                    ),
                    "seconds": spent,
                    "bytes": float(self._facts.bytes[role]),
                }
        return out


def _digest(x: torch.Tensor) -> int:
    """A sum over the bits of a tensor, the same in whatever order it is taken."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return int(x.view(words).sum(dtype=torch.int64)) % (1 << 62)
