"""Rules, which turn gradients into steps: functions of whole matrices and of shards that know nothing about ranks.

`Polar` is the rule of the paper's family and of Muon, and the base class of custom rules (docs/rules.md); `AdamW` calls
torch's function. The parts of rules come first: momenta, scales, centring, row norms, weight decay. Sources: algorithms
C.1-C.4 of Lau, Long, Su (2025); Muon's scale sqrt(max(1, m/n)) of Jordan et al. (2024), 0.2 sqrt(max(m, n)) of Liu et al.
(2025, "Moonlight"), sqrt(d_out/d_in) of Bernstein and Newhouse (2024). "The benchmark" is modded-nanoGPT's optimization
track; its figures are steps to a loss of 3.28, where tuned Muon needs 3,250.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from polargrad_dist.distributed.layout import Split
from polargrad_dist.distributed.plan import TALL_ROLES
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import soap
from polargrad_dist.polar import InverseSqrt, cost, gram_qdwh, homogenize, inverse_sqrt, polar

POLYNOMIAL = ("newton_schulz", "polar_express")
Group = Mapping[str, Any]
Momentum = Callable[[Tensor, Tensor, float, bool], Tensor]
Scale = Callable[[int, int, Tensor, float], Tensor | float]


def ema(m: Tensor, grad: Tensor, beta: float, nesterov: bool) -> Tensor:
    """M = beta M + (1 - beta) G, in place; returns M, or its look-ahead beta M + (1 - beta) G (C.2, Muon's order)."""
    m.lerp_(grad, 1 - beta)
    return grad.lerp(m, beta) if nesterov else m


def heavy_ball(m: Tensor, grad: Tensor, beta: float, nesterov: bool) -> Tensor:
    """M = beta M + G, in place; returns M, or G + beta M (C.4, Polyak's)."""
    m.mul_(beta).add_(grad)
    return grad.add(m, alpha=beta) if nesterov else m


MOMENTA: dict[str, Momentum] = {"momentum_first": ema, "heavy_ball": heavy_ball}


def muon_factor(m: int, n: int) -> float:
    """Muon's sqrt(max(1, m/n)) of an m x n matrix."""
    return math.sqrt(max(1.0, m / n))


# The factor of an m x n direction whose matrix has the given nuclear norm, to the power alpha: 1 is PolarGrad, 0 the
# direction alone (NVIDIA's Emerging-Optimizers has the same exponent; no figure is published). "nuclear_shared" gives s_l of
# lr s_l (sum_k s_k |M_k|_nuc)^alpha, whose sum, over all matrices of a role, `lengths` multiplies in: steepest descent under
# the largest of |W_l| / s_l, whose dual norm is that sum (Bernstein and Newhouse 2024, "Modular duality").
SCALES: dict[str, Scale] = {
    "nuclear": lambda m, n, nuclear, alpha: nuclear if alpha == 1 else nuclear**alpha,
    "nuclear_relative": lambda m, n, nuclear, alpha: nuclear if alpha == 1 else nuclear**alpha,
    "nuclear_shared": lambda m, n, nuclear, alpha: muon_factor(m, n),
    "muon": lambda m, n, nuclear, alpha: muon_factor(m, n),
    "moonlight": lambda m, n, nuclear, alpha: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n, nuclear, alpha: math.sqrt(m / n),
    "none": lambda m, n, nuclear, alpha: 1.0,
}


REFERENCE_STEPS = 100
# Largest relative scale: a matrix whose first gradients were tiny would otherwise move far too much.
LONGEST = 10.0


def relative(scale: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """PolarGrad's scale over its mean in the matrix's first `REFERENCE_STEPS` steps, and the updated mean.

    ``scale`` is (k,); ``seen`` (k, 2) holds the mean and the number of steps in it. Step t has weight t, because the first
    gradients say least. The quotient is at most 1 until the mean is complete, then at most `LONGEST`. Scales of zero are not
    counted: a matrix that has had no gradient yet would otherwise never move, or far too much. So the learning rate is the
    length of a typical early step for any model, batch and vocabulary, and steps shrink with the gradient, as PolarGrad's do.
    """
    mean, steps = seen.to(scale).unbind(-1)
    learning = (steps < REFERENCE_STEPS) & (scale > 0)
    mean = torch.where(learning, mean + (scale - mean) * (2 / (steps + 2)), mean)
    quotient = torch.where(mean == 0, 0.0, scale / mean)
    quotient = torch.where(learning, quotient.clamp_max(1.0), quotient.clamp_max(LONGEST))
    return quotient, torch.stack([mean, steps + learning.to(steps)], -1).to(seen)


# The width at which a head steps as far as its rate says.
HEAD_WIDTH = 64


def width_factor(shape: Sequence[int], group: Group) -> float:
    """What a relative scale is multiplied by: sqrt(64/d) for a head of d inputs, 1 for other roles; ``shape`` is as stored.

    The final norm gives a head inputs of norm sqrt(d), so a step of spectral norm s changes the logits by up to s sqrt(d):
    with this factor one rate served widths 64 to 256 (docs/choosing-rules.md). Source: Yang, Simon and Bernstein (2023),
    "A Spectral Condition for Feature Learning", for a fixed number of outputs.
    """
    inputs = shape[0] if group["transposed"] else shape[1]
    return math.sqrt(HEAD_WIDTH / inputs) if group["role"] == "head" else 1.0


def centred(A: Tensor, transposed: bool) -> Tensor:
    """Subtracts the mean row of matrices (k, m, n); for transposed ones the mean column.

    A - 1 (1'A)/m: adding one vector to every row of a head changes no probability, so the mean row of its gradient is
    noise. Applied before the oracle, and again after it, because rounding or truncation may restore a mean. Source:
    ``center_rows`` of NVIDIA's Emerging-Optimizers, for embeddings, heads and routers; no figure is published.
    """
    return A - A.mean(-1 if transposed else -2, keepdim=True)


def rows_normalized(D: Tensor, energy: Tensor, beta: float, transposed: bool) -> tuple[Tensor, Tensor]:
    """NorMuon: v = beta v + (1 - beta) mean_j D_ij^2; returns D_ij / sqrt(v_i), rescaled to D's Frobenius norm, and v.

    D is (k, m, n) and v (k, m), or (k, n) for transposed matrices. Source: Li et al. (2025), "NorMuon". The benchmark: 3,250
    steps (3.2789, n = 20) at lr 0.035 and weight decay 0.025, where Muon needed 3,325 with the same.
    """
    X, dim = D.to(energy.dtype), -2 if transposed else -1
    energy = torch.lerp(energy, X.square().mean(dim), 1 - beta)
    scaled = X / (energy.unsqueeze(dim).sqrt() + 1e-10)
    norms = [torch.linalg.matrix_norm(x) for x in (X, scaled)]
    return (scaled * (norms[0] / norms[1].clamp_min(1e-10))[:, None, None]).to(D.dtype), energy


def decay_and_step(weights: list[Tensor], steps: list[Tensor], decay: float, cautious: bool) -> None:
    """w = (1 - decay) w + step, in place; ``cautious`` decays only the entries that the step also shrinks."""
    if decay and cautious:
        for w, step in zip(weights, steps, strict=True):
            w.addcmul_(w, (w * step < 0).to(w.dtype), value=-decay)
    elif decay:
        torch._foreach_mul_(weights, 1 - decay)
    torch._foreach_add_(weights, steps)


class Direction(NamedTuple):
    """A rule's result for matrices (k, m, n): ``D`` (k, m, n), the ``scale`` (k,) of each, and the next owner state.

    ``nuclear_norm``, ``sigma_max``, ``sigma_min`` and ``residual`` (k,) are for statistics, None if unknown. A matrix is not
    stepped if its ``nuclear_norm`` is not finite, or, if that is unknown, its direction.
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

    ``options`` are the keys, with defaults, that a group may set in addition to those of `Rule`. `momentum` and `apply`
    are elementwise, on stacked shards (k, slices, rows, columns), and change their state in place; `direction` sees whole
    matrices, as on one device, and returns the next state of each.
    """

    matrices = True
    options: Mapping[str, Any] = {}

    def describe(self, group: Group) -> str:
        """A short description of the rule, for tables."""
        steps = f":{group['steps']}" if group["steps"] else ""
        nesterov = "+nesterov" if group["nesterov"] else ""
        factor = "polar" if group["spectrum"] == "polar" else "homogenized"
        factor = factor if group["algorithm"] == "polar" else group["algorithm"]
        parts = [group["precondition"], "centred" if group["center_rows"] else "none", group["normalize"]]
        extras = "".join(f"+{part}" for part in parts if part != "none")
        power = f"^{group['alpha']:g}" if group["alpha"] != 1 else ""
        bounds = f" {group['control']}" if group["control"] != "decay" else ""
        bounds += f" floor {group['floor']:g}" if group["floor"] else ""
        return f"{factor}{extras} {group['scale']}{power} {group['momentum']}{nesterov} {group['oracle']}{steps}{bounds}"

    def states(self, group: Group) -> tuple[str, ...]:
        """Names of the elementwise states; they start as zeros of the parameter's shape."""
        return () if group["momentum"] == "none" or group["precondition"] == "soap" else ("momentum",)

    def owner_states(self, group: Group) -> dict[str, Callable[[int, int], tuple[int, ...]]]:
        """Names of the states per matrix, and their shape for an m x n matrix as stored; they start as zeros."""
        states: dict[str, Callable[[int, int], tuple[int, ...]]] = {}
        if group["normalize"] == "rows":
            across = group["transposed"]
            states["row_energy"] = lambda m, n: (n if across else m,)
        if group["precondition"] == "soap":
            states |= {key: lambda m, n, key=key: soap.shapes(m, n)[key] for key in soap.shapes(1, 1)}  # type: ignore[misc]
        return states

    def pauses(self, group: Group) -> bool:
        """Whether a step waits for sums over ranks: nuclear norms of other matrices, norms of weights (`control.lengths`)."""
        return group["scale"] == "nuclear_shared" or group["control"] == "hyperball" or group["floor"] > 0

    def cost(self, shape: tuple[int, int], group: Group) -> float:
        """Flops of `direction` on one matrix, used to balance matrices over ranks."""
        whitening = soap.cost(*shape) if group["precondition"] == "soap" else 0.0
        return cost(shape, group["oracle"], group["steps"]) + whitening

    def cost_on(self, device_type: str, shape: tuple[int, int], group: Group) -> float:
        """`cost` on a kind of device; a rule that overrides `cost` has the same on all devices."""
        if type(self).cost is not Polar.cost:
            return self.cost(shape, group)
        return cost(shape, group["oracle"], group["steps"], device_type=device_type)

    def tall(self, group: Group, split: Split, dtype: torch.dtype) -> bool:
        """Whether `root` can be used: the direction is the matrix times a root of its Gram matrix, which shards can apply."""
        if type(self) is not Polar or len(split.matrices) != 1 or split.rows < split.cols:
            return False
        if (group["center_rows"] and split.transposed) or self.owner_states(group):
            return False
        truncated = self.bounded(group) and dtype != torch.float64
        if not (group["oracle"] in ("auto", "gram") or truncated) or split.stacked:
            return False
        wish = group["row_sharded"]
        return split.rows >= 8 * split.cols or group["role"] in TALL_ROLES if wish is None else wish

    def bounded(self, group: Group) -> bool:
        """Whether `root` also needs a bound on the matrix's norm: truncated QDWH starts from one."""
        return group["oracle"] == "qdwh" and group["steps"] is not None

    def momentum(self, state: dict[str, Tensor], grad: Tensor, group: Group) -> Tensor:
        """The input of `direction`, from a block of the gradient; must not change ``grad``."""
        # SOAP updates the momentum in `direction`, where it has the gradient.
        if group["precondition"] == "soap":
            return grad
        move = MOMENTA.get(group["momentum"])
        return grad if move is None else move(state["momentum"], grad, group["beta"], group["nesterov"])

    def direction(self, A: Tensor, state: dict[str, Tensor], group: Group) -> Direction:
        """The polar factor of each matrix of A (k, m, n), or its homogenized factor, and its scale."""
        if group["precondition"] == "soap":
            A, whitening = soap.whitened(A, state, group, MOMENTA[group["momentum"]])
            state = {**state, **whitening}
        if group["center_rows"]:
            A = centred(A, group["transposed"])
        # These work in bf16 and do not compute the spectrum.
        polynomial = group["oracle"] in POLYNOMIAL
        if group["oracle_dtype"] is not None:
            A = A.to(getattr(torch, group["oracle_dtype"]))
        elif polynomial and A.dtype != torch.float64:
            A = A.to(torch.bfloat16)
        if group["spectrum"] == "homogenized":
            D, nuclear, *found = homogenize(A, lower=group["lower"])
            known: tuple[Tensor | None, ...] = tuple(found)
        else:
            D, _, nuclear, info = polar(
                A,
                method=group["oracle"],
                steps=group["steps"],
                lower=group["lower"],
                check=False,
                info=not polynomial,
            )
            known = info[2:] if info else (None,) * 3
        if group["center_rows"]:
            D = centred(D, group["transposed"])
        if group["normalize"] == "rows":
            D, energy = rows_normalized(D, state["row_energy"], group["betas"][1], group["transposed"])
            state = {**state, "row_energy": energy}
        return Direction(D, self.scale(A.shape[-2:], nuclear, group), state, nuclear, *known)

    def root(self, S: Tensor, m: int, group: Group, bound: Tensor | None) -> tuple[InverseSqrt, Tensor]:
        """From the Gram matrix S (n, n) of a tall m x n matrix A: X (n, n) with A X the direction, and the scale (1,).

        ``bound`` (0-d fp64) bounds the spectral norm of A; given if `bounded`.
        """
        if bound is not None:
            root = gram_qdwh(S, bound, group["steps"])
        else:
            root = inverse_sqrt(S, lower=group["lower"], homogenized=group["spectrum"] == "homogenized")
        return root, self.scale((m, S.shape[-1]), root.nuclear_norm.view(1), group)

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
        """The step of a block of the weights; ``scale`` is broadcast against it. Must not change ``direction``.

        ``direction`` has the dtype in which it was sent, possibly bf16; the step is in at least fp32.
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
        """Whether `momentum` is the plain moving average of gradients, so that a larger kernel may contain it."""
        return type(self).momentum is Polar.momentum and group["momentum"] == "momentum_first"

    def is_plain(self, group: Group) -> bool:
        """Whether `apply` is just the product of direction and scale, so that a larger kernel may contain it."""
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
        """Steps the weights, all of one dtype, in place; if ``found_inf`` (0-d fp32) is 1, nothing changes."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        # The fused function reads memory in order whatever the strides; a shard of some columns has gaps.
        grads = [grad.contiguous() for grad in grads]
        adamw(
            weights, grads, states["exp_avg"], states["exp_avg_sq"], [], steps, fused=True, found_inf=found_inf,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip


RULES: dict[str, Any] = {"polar": Polar(), "adamw": AdamW()}


def register_rule(name: str) -> Callable[[type[Polar]], type[Polar]]:
    """Registers a subclass of `Polar` as the algorithm ``name`` of parameter groups: ``@register_rule("normuon")``.

    Raises ``ConfigError`` if the name is taken, or if this is not a subclass of `Polar`.
    """

    def register(rule: type[Polar]) -> type[Polar]:
        if not (isinstance(rule, type) and issubclass(rule, Polar)):
            raise ConfigError(f"the rule {name!r} is {rule!r}, expected a subclass of polargrad_dist.Polar")
        taken = RULES.get(name)
        if taken is not None and type(taken).__qualname__ != rule.__qualname__:
            raise ConfigError(f"the rule name {name!r} is taken, expected a new name")
        RULES[name] = rule()
        return rule

    return register


def rule_of(group: Group) -> Any:
    """The rule that steps a parameter group."""
    return RULES[group["algorithm"]]


def kept_states(group: Group) -> dict[str, Callable[[int, int], tuple[int, ...]]]:
    """All states per matrix, as `Polar.owner_states`: the rule's own, and the mean of `relative`."""
    rule = rule_of(group)
    if not rule.matrices:
        return {}
    seen = {"nuclear_mean": lambda m, n: (2,)} if group["scale"] == "nuclear_relative" else {}
    return seen | rule.owner_states(group)
