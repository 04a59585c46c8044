"""PolarGrad as DeepSpeed's client optimizer, ZeRO stages 0 to 3: ``deepspeed.initialize(optimizer=ZeroPolarGrad(…))``.

ZeRO clips, accumulates, shards and shares; the optimizer finds at its first step which stretch of which parameter lies in
this rank's fp32 vectors, and steps them as `FragmentPolarGrad`. Known to work with DeepSpeed 0.19: it reads
``_hp_mapping`` (stages 1, 2), ``_z3_optimizer``, ``grad_position`` and ``fp32_partitioned_groups_flat`` (stage 3).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polargrad_dist.distributed.plan import Plan
from polargrad_dist.errors import CheckpointError, ConfigError
from polargrad_dist.integrations.deepspeed_checks import WAY_OUT, check_version, refuse_unknown
from polargrad_dist.integrations.fragments import Fragment, FragmentPolarGrad, fragments_of
from polargrad_dist.optim.checks import check_travel, check_values
from polargrad_dist.optim.facts import Facts
from polargrad_dist.optim.groups import DEFAULTS, completed, routed
from polargrad_dist.optim.member import Member
from polargrad_dist.optim.optimizer import PolarGrad
from polargrad_dist.optim.routing import route
from polargrad_dist.optim.rules import OptimizerConfig, Rule


class ZeroPolarGrad(torch.optim.Optimizer):
    """`PolarGrad` for ``deepspeed.initialize(model=model, optimizer=ZeroPolarGrad(model, embed={…}), config=…)``.

    Args:
        params: the model, also one that was built under ``deepspeed.zero.Init``; or parameter groups as `route` gives them.
        hidden, embed, head, value_embed, scalar: of a model, what a role's rule has otherwise, see `PolarGrad`. Under stages
            1 to 3 ``embed`` needs a scale and a rate of its own, such as ``{"scale": "nuclear", "lr": 0.2}``: the default
            "nuclear_relative" keeps state with whole matrices.
        comm_dtype, bucket_mb: see `PolarGrad`.
        **rule: every other field of `Rule` for groups that do not set it.

    Construct it before ``deepspeed.initialize``, with ``"zero_allow_untested_optimizer": true`` in DeepSpeed's
    configuration; ``gradient_clipping`` there comes before the oracle, and defaults to 1.0. State lies in vectors like
    ZeRO's own (``momentum``, ``exp_avg``, ``exp_avg_sq``), so that ``save_checkpoint`` and ``load_checkpoint`` keep it.
    Under stages 1 to 3 a parameter without a gradient counts as one with a gradient of zeros, and no rule may keep state with
    whole matrices: give ``embed`` (and ``head``) a scale other than their default "nuclear_relative".

    Raises ``ConfigError`` for a version of DeepSpeed that was not tested and, at its first step on all ranks, for what of
    DeepSpeed does not fit: NVMe offload, mixtures of experts, pipelines, tensor parallelism, hpZ, MiCS, ZenFlow, and under
    stages 1 to 3 for rules that keep state with whole matrices.
    """

    def __init__(
        self,
        params: nn.Module | Sequence[dict[str, Any]],
        *,
        hidden: Mapping[str, Any] | Rule | None = None,
        embed: Mapping[str, Any] | Rule | None = None,
        head: Mapping[str, Any] | Rule | None = None,
        value_embed: Mapping[str, Any] | Rule | None = None,
        scalar: Mapping[str, Any] | Rule | None = None,
        comm_dtype: torch.dtype | str | None = None,
        bucket_mb: float | None = None,
        **rule: Any,
    ):
        check_version()
        check_travel(comm_dtype, bucket_mb)
        roles = {"hidden": hidden, "embed": embed, "head": head, "value_embed": value_embed, "scalar": scalar}
        given = {role: changes for role, changes in roles.items() if changes is not None}
        self._model = params if isinstance(params, nn.Module) else None
        if isinstance(params, nn.Module):
            with whole_shapes(params) as originals:
                params = [
                    group | {"params": [originals.get(p, p) for p in group["params"]]}
                    for group in routed(params, "all_reduced", given, rule)
                ]
            rule = {}
        elif given:
            raise ConfigError(
                f"{min(given)} is a role's rule, which belongs to a model, but parameter groups were given: set it there"
            )
        groups: list[dict[str, Any]] = []
        for number, group in enumerate(params):
            where, count = f"parameter group {number}", sum(len(other["params"]) for other in groups)
            groups.append(completed(group, DEFAULTS | rule, where, count))
            check_values(groups[-1], where)
        self.named = [list(zip(g["param_names"], g["params"], strict=True)) for g in groups]
        """Group by group the names and parameters of the model."""
        self.wholes: dict[nn.Parameter, Fragment] = {}
        """Under stages 1 to 3, once `bound`: of each parameter this rank's stretch."""
        self.source: dict[Fragment, tuple[nn.Parameter, int]] = {}
        """And of each matrix its parameter, and where in that stretch its own begins."""
        # Here, and not in the groups: whoever shards later takes the parameters out of them.
        self._shapes = {p: tuple(getattr(p, "ds_shape", p.shape)) for named in self.named for _, p in named}
        self._travel: dict[str, Any] = {"comm_dtype": comm_dtype, "bucket_mb": bucket_mb}
        self._inner: PolarGrad | None = None
        self._home: Any = None
        self._saving = self._checked = False
        self.idle = False
        """Set, a step does nothing: DeepSpeed then discards its gradients and leaves weights and state as they are."""
        super().__init__(
            [g | {"params": n} for g, n in zip(groups, self.named, strict=True)], DEFAULTS | rule
        )
        self._groups = list(self.param_groups)

    @classmethod
    def from_config(cls, model: nn.Module, config: OptimizerConfig) -> ZeroPolarGrad:
        """Routes a model by its roles and builds the optimizer that the configuration describes."""
        if config.gradients != "all_reduced":
            raise ConfigError(
                f"optimizer.gradients is {config.gradients!r} under DeepSpeed, which reduces gradients itself, expected "
                "'all_reduced'"
            )
        with whole_shapes(model) as originals:
            groups = [
                g | {"params": [originals.get(p, p) for p in g["params"]]} for g in route(model, config)
            ]
        made = cls(groups, comm_dtype=config.comm_dtype, bucket_mb=config.bucket_mb)
        made._model = model
        return made

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_groups"):
            raise ConfigError(
                "ZeRO takes no further parameter groups after construction: give all of them at once"
            )
        names = param_group.pop("param_names", None)
        super().add_param_group(param_group)
        if names is not None:
            self.param_groups[-1]["param_names"] = list(names)

    # Stepping

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Steps what lies in the vectors that DeepSpeed has put into the groups; DeepSpeed calls it, once per group.

        Raises on all ranks together when a rule failed on one, or gave something that is not finite.
        """
        if closure is not None:
            raise ConfigError(
                "a closure was given, expected none: DeepSpeed computes gradients before the step"
            )
        if self.idle:
            return
        inner = self.bound()
        if not self._checked:
            self._check_weights(inner)
        if isinstance(inner, FragmentPolarGrad):
            inner.take(self._groups)
            inner.step_vectors(p for group in self.param_groups for p in group["params"])
        else:
            self._share_rates(inner)
            inner.step()

    def _share_rates(self, inner: PolarGrad) -> None:
        for mine, theirs in zip(inner.param_groups, self._groups, strict=True):
            mine.update({k: v for k, v in theirs.items() if k in mine and k not in ("params", "param_names")})

    def bound(self) -> PolarGrad:
        """The optimizer that does the work, once DeepSpeed has sharded the model; the first call is a collective."""
        home = self._find_home()
        if self._inner is None or home != self._home:
            self._inner, self._home, self._checked = self._bind(home[0]), home, False
        return self._inner

    def _find_home(self) -> tuple[Any, ...]:
        """The stage (0, 1 for both 1 and 2, or 3), and what tells one set of vectors from another."""
        first = self.named[0][0][1]
        if (zero3 := getattr(first, "_z3_optimizer", None)) is not None:
            return 3, id(zero3)
        if any(getattr(p, "_hp_mapping", None) is not None for named in self.named for _, p in named):
            return 1, *[id(group["params"][0]) for group in self._groups]
        if [id(p) for g in self._groups for p in g["params"]] == [id(p) for n in self.named for _, p in n]:
            return (0,)
        raise ConfigError(
            "DeepSpeed put other parameters in place of the model's without ZeRO, as in stage 0 with bf16 or fp16 enabled: "
            "set zero_optimization.stage to 1, or leave bf16 and fp16 out (torch_autocast computes in bf16 too)"
        )

    def _bind(self, stage: int) -> PolarGrad:
        params = [p for named in self.named for _, p in named]
        refuse_unknown(self._model, stage, params, self._groups)
        if stage == 0:
            groups = [g | {"params": n} for g, n in zip(self._groups, self.named, strict=True)]
            return PolarGrad(
                [{k: v for k, v in g.items() if k != "param_names"} for g in groups], **self._travel
            )
        found = [self._located(p, stage) for p in params]
        stretches = [(start, count) for start, count, _, _ in found]
        everywhere: list[Any] = [stretches]
        if dist.get_world_size() > 1:
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, stretches)
        at, made = 0, []
        device = next((flat.device for _, _, flat, _ in found if flat is not None), torch.device("cpu"))
        for group, named in zip(self._groups, self.named, strict=True):
            fragments: list[Fragment] = []
            for name, p in named:
                bounds = tuple((rank[at][0], rank[at][0] + rank[at][1]) for rank in everywhere)
                shape, (_, _, flat, place) = self._shapes[p], found[at]
                whole = Fragment(name, shape, bounds, dist.get_rank(), flat, place)
                self._check_complete(whole)
                self.wholes[p], matrices = whole, list(fragments_of(group, name, shape, whole))
                self.source |= {matrix: (p, matrix.at - whole.at) for matrix in matrices}
                fragments += matrices
                at += 1
            made.append((group, fragments))
        return FragmentPolarGrad(made, self.state, _device_kind(), device, **self._travel)

    def _located(self, p: nn.Parameter, stage: int) -> tuple[int, int, Tensor | None, int]:
        """Of a parameter the first of its elements here, how many are, the vector that holds them, and where."""
        if stage == 3:
            zero: Any = p._z3_optimizer  # type: ignore[attr-defined]
            number, at, count = zero.grad_position[zero.get_param_id(p)]
            total, start = p.ds_numel, dist.get_rank() * count  # type: ignore[attr-defined]
            start = min(start, total)
            return start, min(count, total - start), zero.fp32_partitioned_groups_flat[number], at
        mapping: Any = p._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return 0, 0, None, 0
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = self._groups[mapping.param_group_index]["params"][0]
        return here.start, here.numel, flat, there.start

    def _check_weights(self, inner: PolarGrad) -> None:
        """Raises ``ConfigError`` on all ranks where a stretch does not hold the weights that it should."""
        differ = False
        for p in (p for named in self.named for _, p in named):
            # Stage 3 has no second copy
            if getattr(p, "_hp_mapping", None) is not None:
                start, count, flat, at = self._located(p, 1)
                assert flat is not None
                stored = p.detach().flatten()[start : start + count]
                held = flat.detach().narrow(0, at, count).to(stored.device, stored.dtype)
                differ |= not torch.equal(stored, held)
        if inner.agreement is not None:
            differ = bool(inner.agreement.largest(torch.tensor([differ], dtype=torch.int32, device="cpu")))
        if differ:
            raise ConfigError(
                "ZeRO's fp32 weights are not those of the model: leave zero_optimization.round_robin_gradients out, and "
                "after changing weights by hand call engine.optimizer.refresh_fp32_params()"
            )
        self._checked = True

    @staticmethod
    def _check_complete(whole: Fragment) -> None:
        total = 1
        for size in whole.shape:
            total *= size
        if sum(last - first for first, last in whole.bounds) != total:
            raise ConfigError(
                f"the ranks hold {sum(last - first for first, last in whole.bounds)} elements of {whole.name}, expected "
                f"{total}: {WAY_OUT}"
            )

    # What it knows

    def plan(self) -> Plan:
        """See `PolarGrad.plan`; of what lies in the vectors once DeepSpeed has sharded the model. Every rank calls it."""
        return self.bound().plan()

    def stats(self, by: str = "role") -> dict[str, dict[str, float]]:
        """See `PolarGrad.stats`; of all groups, which DeepSpeed steps one after the other."""
        return self.bound().stats(by)

    @property
    def facts(self) -> Facts:
        """What the last step learnt on this rank."""
        return self.bound().facts

    @property
    def works(self) -> list[Member]:
        """Every fragment of this rank with its plan entry, group, ranks and state."""
        return self.bound().works

    # Saving and loading: DeepSpeed calls these, in stages 1 to 3 on every rank, each with its own vectors

    def checkpoint_event_prologue(self) -> None:
        """DeepSpeed calls it on every rank before it saves or loads, in stage 0."""
        self._saving = True

    def checkpoint_event_epilogue(self) -> None:
        """And this after."""
        self._saving = False

    def state_dict(self) -> dict[str, Any]:
        """Torch's form: of this rank's vectors; in stage 0, while DeepSpeed saves, whole state, and so a collective."""
        inner = self.bound()
        if not isinstance(inner, FragmentPolarGrad):
            return inner.full_state_dict() if self._saving else inner.state_dict()
        return super().state_dict() | {"place": self._place(inner)}

    def _place(self, inner: FragmentPolarGrad) -> list[int]:
        table = repr([(f.name, f.shape, f.bounds) for f in inner.fragments.values()])
        return [dist.get_world_size(), dist.get_rank(), zlib.crc32(table.encode())]

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` of the same rank gave, in place. On several ranks all must call it.

        Raises ``CheckpointError``, on all of them and before anything is changed, for state of another world size, stage,
        model or rank.
        """
        inner = self.bound()
        if not isinstance(inner, FragmentPolarGrad):
            inner.load_state_dict(state_dict)
            for mine, theirs in zip(self._groups, inner.param_groups, strict=True):
                mine.update({k: v for k, v in theirs.items() if k not in ("params", "param_names")})
            return
        problem, pairs = None, []
        try:
            pairs = self._matched(state_dict, inner)
        except CheckpointError as error:
            problem = error
        if inner.agreement is not None and int(
            inner.agreement.largest(torch.tensor([problem is not None], device="cpu").int())
        ):
            problem = problem or CheckpointError(
                "another rank could not load its optimizer state: see its error"
            )
        if problem is not None:
            raise problem
        for here, there in pairs:
            here.copy_(there)
        for group, saved in zip(self._groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})
        inner.follow(reload=True)

    def _matched(self, saved: Mapping[str, Any], inner: FragmentPolarGrad) -> list[tuple[Tensor, Tensor]]:
        place = saved.get("place")
        mine = self._place(inner)
        if place != mine:
            if not isinstance(place, list):
                where = "not that of a ZeroPolarGrad under ZeRO stages 1 to 3"
            elif place[:2] == mine[:2]:
                where = "that of another ZeRO stage or other parameters"
            else:
                where = f"that of rank {place[1]} of {place[0]}"
            raise CheckpointError(
                f"the saved optimizer state is {where}, expected that of this stage and model on rank {mine[1]} of "
                f"{mine[0]}: go on with the same ranks and stage, or load weights only with load_optimizer_states=False"
            )
        pairs = []
        for group, theirs in zip(self._groups, saved["param_groups"], strict=True):
            try:
                check_values(group | {k: v for k, v in theirs.items() if k != "params"}, "a saved group")
            except ConfigError as error:
                raise CheckpointError(str(error)) from error
            for flat, number in zip(group["params"], theirs["params"], strict=True):
                for key, mine in self.state[flat].items():
                    if key not in saved["state"].get(number, {}):
                        raise CheckpointError(
                            f"the saved optimizer state has no {key!r}, expected the same rules"
                        )
                    pairs.append((mine, saved["state"][number][key]))
        return pairs


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[dict[Tensor, nn.Parameter]]:
    """While parameters that ZeRO 3 has partitioned are replaced by meta tensors of their whole shapes: which are whose."""
    stands_for: dict[nn.Parameter, nn.Parameter] = {}
    homes = [(m, leaf, p) for m in model.modules() for leaf, p in m._parameters.items() if p is not None]
    cut = [(m, leaf, p) for m, leaf, p in homes if hasattr(p, "ds_shape")]
    for _, _, p in cut:
        whole = torch.empty(p.ds_shape, dtype=p.dtype, device="meta")
        stands_for.setdefault(p, nn.Parameter(whole, requires_grad=p.requires_grad))
    try:
        for module, leaf, p in cut:
            module._parameters[leaf] = stands_for[p]
        yield {whole: p for p, whole in stands_for.items()}
    finally:
        for module, leaf, p in cut:
            module._parameters[leaf] = p


def without_inference_kernel() -> None:
    """On CPUs, keeps DeepSpeed from compiling at its start an all-reduce that only inference uses (71 s of CPU)."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _device_kind() -> str:
    """The kind of device on which DeepSpeed computes."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name()
