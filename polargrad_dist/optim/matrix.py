"""Rules: what turns gradients into steps, as functions of whole matrices and of shards that know no rank.

`Polar` is the family of the paper and Muon, and the base of rules of one's own (docs/rules.md); `AdamW` is torch's function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from polargrad_dist.distributed.layout import Split
from polargrad_dist.distributed.plan import TALL_ROLES
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import soap
from polargrad_dist.optim.parts import MOMENTA, SCALES, centred, relative, rows_normalized
from polargrad_dist.polar import InverseSqrt, cost, gram_qdwh, homogenize, inverse_sqrt, polar

POLYNOMIAL = ("newton_schulz", "polar_express")
Group = Mapping[str, Any]


class Direction(NamedTuple):
    """What a rule makes of matrices (k, m, n): ``D`` (k, m, n), the ``scale`` (k,) of each, and the next owner state.

    ``nuclear_norm``, ``sigma_max``, ``sigma_min`` and ``residual`` (k,) are for statistics, None where not known. A matrix
    whose ``nuclear_norm``, or else whose direction, is not finite is not stepped.
    """

    D: Tensor
    scale: Tensor
    state: dict[str, Tensor]
    nuclear_norm: Tensor | None = None
    sigma_max: Tensor | None = None
    sigma_min: Tensor | None = None
    residual: Tensor | None = None


class Polar:
    """Step = -lr · scale · U, with M = U H the polar decomposition of the momentum; the base class of matrix rules.

    ``options`` are the keys, with defaults, that a group may set for this rule beside those of `Rule`. `momentum` and `apply`
    are elementwise, on stacked shards (k, slices, rows, columns), and change their state in place; `direction` sees whole
    matrices, as on one device, and returns the next state of each.
    """

    matrices = True
    options: Mapping[str, Any] = {}

    def describe(self, group: Group) -> str:
        """The rule in a few words, for tables."""
        steps = f":{group['steps']}" if group["steps"] else ""
        nesterov = "+nesterov" if group["nesterov"] else ""
        factor = "polar" if group["spectrum"] == "polar" else "homogenized"
        factor = factor if group["algorithm"] == "polar" else group["algorithm"]
        parts = [group["precondition"], "centred" if group["center_rows"] else "none", group["normalize"]]
        extras = "".join(f"+{part}" for part in parts if part != "none")
        control = f" {group['control']}" if group["control"] == "hyperball" else ""
        return f"{factor}{extras} {group['scale']} {group['momentum']}{nesterov} {group['oracle']}{steps}{control}"

    def states(self, group: Group) -> tuple[str, ...]:
        """Names of the elementwise states, which begin as zeros of the parameter's shape."""
        return () if group["momentum"] == "none" or group["precondition"] == "soap" else ("momentum",)

    def owner_states(self, group: Group) -> dict[str, Callable[[int, int], tuple[int, ...]]]:
        """Names of the states kept with whole matrices, and their shape for an m x n matrix as stored; zeros at first."""
        states: dict[str, Callable[[int, int], tuple[int, ...]]] = {}
        if group["scale"] == "nuclear_relative":
            states["nuclear_mean"] = lambda m, n: (2,)
        if group["normalize"] == "rows":
            across = group["transposed"]
            states["row_energy"] = lambda m, n: (n if across else m,)
        if group["precondition"] == "soap":
            states |= {key: lambda m, n, key=key: soap.shapes(m, n)[key] for key in soap.shapes(1, 1)}  # type: ignore[misc]
        return states

    def pauses(self, group: Group) -> bool:
        """Whether steps wait for sums over ranks: nuclear norms of other matrices, norms of weights (`parts.lengths`)."""
        return group["scale"] == "nuclear_shared" or group["control"] == "hyperball" or group["floor"] > 0

    def cost(self, shape: tuple[int, int], group: Group) -> float:
        """Flops of `direction` on one matrix, by which matrices are dealt to ranks."""
        whitening = soap.cost(*shape) if group["precondition"] == "soap" else 0.0
        return cost(shape, group["oracle"], group["steps"]) + whitening

    def cost_on(self, device_type: str, shape: tuple[int, int], group: Group) -> float:
        """`cost` on a kind of device; that of a rule which says its own is the same on all."""
        if type(self).cost is not Polar.cost:
            return self.cost(shape, group)
        return cost(shape, group["oracle"], group["steps"], device_type=device_type)

    def tall(self, group: Group, split: Split, dtype: torch.dtype) -> bool:
        """Whether `root` serves: the direction is the matrix times a root of its Gram matrix, which shards can apply."""
        if type(self) is not Polar or len(split.matrices) != 1 or split.rows < split.cols:
            return False
        if (group["center_rows"] and split.transposed) or self.owner_states(group).keys() - {"nuclear_mean"}:
            return False
        truncated = self.bounded(group) and dtype != torch.float64
        if not (group["oracle"] in ("auto", "gram") or truncated) or split.stacked:
            return False
        wish = group["row_sharded"]
        return split.rows >= 8 * split.cols or group["role"] in TALL_ROLES if wish is None else wish

    def bounded(self, group: Group) -> bool:
        """Whether `root` needs a bound of the matrix's norm beside its Gram matrix: truncated QDWH starts from one."""
        return group["oracle"] == "qdwh" and group["steps"] is not None

    def momentum(self, state: dict[str, Tensor], grad: Tensor, group: Group) -> Tensor:
        """What `direction` is given, from a stretch of the gradient; must not change ``grad``."""
        if group["precondition"] == "soap":  # which keeps the momentum where it has the gradient
            return grad
        move = MOMENTA.get(group["momentum"])
        return grad if move is None else move(state["momentum"], grad, group["beta"], group["nesterov"])

    def direction(self, A: Tensor, state: dict[str, Tensor], group: Group) -> Direction:
        """The polar factor of each matrix of A (k, m, n), or its homogenized factor, and its scale."""
        if group["precondition"] == "soap":
            A, whitening = soap.whitened(A, state, group)
            state = {**state, **whitening}
        if group["center_rows"]:
            A = centred(A, group["transposed"])
        A = A.to(oracle_dtype(group, A.dtype))
        if group["spectrum"] == "homogenized":
            D, nuclear, *found = homogenize(A, lower=group["lower"])
            known: tuple[Tensor | None, ...] = tuple(found)
        else:
            free = group["oracle"] not in POLYNOMIAL  # which know nothing of the spectrum for free
            D, _, nuclear, info = polar(
                A, method=group["oracle"], steps=group["steps"], lower=group["lower"], check=False, info=free
            )
            known = info[2:] if info else (None,) * 3
        if group["center_rows"]:
            D = centred(D, group["transposed"])
        if group["normalize"] == "rows":
            D, energy = rows_normalized(D, state["row_energy"], group["betas"][1], group["transposed"])
            state = {**state, "row_energy": energy}
        scale, state = self.scaled(A.shape[-2:], nuclear, state, group)
        return Direction(D, scale, state, nuclear, *known)

    def root(
        self, S: Tensor, m: int, group: Group, bound: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[InverseSqrt, Tensor, dict[str, Tensor]]:
        """Of a tall m x n matrix, from its Gram matrix S (n, n): X (n, n) so that A X is its direction; scale; next state.

        ``bound`` (0-d fp64) bounds its spectral norm, where `bounded`; the scale is (1,), the state of one matrix.
        """
        if bound is not None:
            root = gram_qdwh(S, bound, group["steps"])
        else:
            root = inverse_sqrt(S, lower=group["lower"], homogenized=group["spectrum"] == "homogenized")
        scale, state = self.scaled((m, S.shape[-1]), root.nuclear_norm.view(1), state, group)
        return root, scale, state

    def scaled(
        self, shape: Sequence[int], nuclear: Tensor, state: dict[str, Tensor], group: Group
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`scale`, over its mean of the first steps where the group says so, and the next state."""
        scale = self.scale(shape, nuclear, group)
        if group["scale"] != "nuclear_relative":
            return scale, state
        scale, seen = relative(scale, state["nuclear_mean"])
        return scale, {**state, "nuclear_mean": seen}

    def scale(self, shape: Sequence[int], nuclear: Tensor, group: Group) -> Tensor:
        """The factor of each direction, in fp64; ``shape`` is (rows, columns) as stored."""
        m, n = reversed(shape) if group["transposed"] else shape
        factor = SCALES[group["scale"]](m, n, nuclear, group["alpha"])
        return (
            factor.double()
            if isinstance(factor, Tensor)
            else torch.full_like(nuclear, factor, dtype=torch.float64)
        )

    def apply(self, state: dict[str, Tensor], direction: Tensor, scale: Tensor, group: Group) -> Tensor:
        """The step of a stretch of the weights; ``scale`` is broadcast against it. Must not change ``direction``.

        ``direction`` is as it travelled, in bf16 say; the step is in at least fp32.
        """
        if group["momentum"] == "polar_first":
            m = state["momentum"]
            direction = m.lerp_(direction.to(m.dtype), 1 - group["beta"])
            return direction * (scale * -group["lr"]).to(m.dtype)
        wide = torch.promote_types(direction.dtype, torch.float32)
        factor = (scale * -group["lr"]).to(wide)
        step = direction.to(wide, memory_format=torch.contiguous_format)
        return step * factor if step is direction else step.mul_(factor)

    def has_plain_momentum(self, group: Group) -> bool:
        """Whether `momentum` is the moving average of gradients, which a larger kernel may then contain."""
        return type(self).momentum is Polar.momentum and group["momentum"] == "momentum_first"

    def is_plain(self, group: Group) -> bool:
        """Whether `apply` is nothing but the product of direction and scale, which a larger kernel may then contain."""
        return type(self).apply is Polar.apply and group["momentum"] != "polar_first"


class AdamW:
    """AdamW of Loshchilov and Hutter (2019) on every element, by torch's fused function."""

    matrices = False
    options: Mapping[str, Any] = {}

    def describe(self, group: Group) -> str:
        return "adamw"

    def pauses(self, group: Group) -> bool:
        """Never: no element needs another's norm."""
        return False

    def states(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def update(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        states: dict[str, list[Tensor]],
        steps: list[Tensor],
        group: Group,
        found_inf: Tensor | None,
    ) -> None:
        """Steps the weights in place, all of one dtype; where ``found_inf`` (0-d fp32) is 1, nothing changes."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        adamw(
            weights, grads, states["exp_avg"], states["exp_avg_sq"], [], steps, fused=True, found_inf=found_inf,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip


RULES: dict[str, Any] = {"polar": Polar(), "adamw": AdamW()}


def register_rule(name: str) -> Callable[[type[Polar]], type[Polar]]:
    """Makes a subclass of `Polar` the algorithm ``name`` of parameter groups: ``@register_rule("normuon")``.

    Raises ``ConfigError`` for a name that is taken, or something that is no matrix rule.
    """

    def register(rule: type[Polar]) -> type[Polar]:
        if not (isinstance(rule, type) and issubclass(rule, Polar)):
            raise ConfigError(f"the rule {name!r} is {rule!r}, expected a subclass of polargrad_dist.Polar")
        taken = RULES.get(name)
        if taken is not None and type(taken).__qualname__ != rule.__qualname__:
            raise ConfigError(f"a rule named {name!r} exists already, expected another name")
        RULES[name] = rule()
        return rule

    return register


def rule_of(group: Group) -> Any:
    """What steps a parameter group."""
    return RULES[group["algorithm"]]


def oracle_dtype(group: Group, dtype: torch.dtype) -> torch.dtype:
    """The type in which a group's oracle is given matrices of ``dtype``."""
    if group["oracle_dtype"] is not None:
        return getattr(torch, group["oracle_dtype"])
    return torch.bfloat16 if group["oracle"] in POLYNOMIAL and dtype != torch.float64 else dtype
