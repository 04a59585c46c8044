"""What a parameter group may say: the rule by which its parameters are stepped, and one rule per role for a model.

Sources: PolarGrad family, algorithms C.1-C.4 of Lau, Long, Su (2025); Muon's scale sqrt(max(1, m/n)) of Jordan et al.
(2024), 0.2 sqrt(max(m, n)) of Liu et al. (2025, "Moonlight"), sqrt(d_out/d_in) of Bernstein and Newhouse (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

from torch import Tensor

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.matrix import RULES

Momentum = Literal["none", "momentum_first", "polar_first", "heavy_ball"]
Scale = Literal["nuclear", "muon", "moonlight", "spectral", "none"]
TAKES_STEPS = ("qdwh", "newton_schulz", "polar_express")
Spectrum = Literal["polar", "homogenized"]
Oracle = Literal["auto", "gram", "svd", "qdwh", "zolo", "newton", "newton_schulz", "polar_express"]


@dataclass
class Rule:
    """How the parameters of one role are stepped.

    Args:
        lr: base learning rate; with scale "nuclear" it multiplies the nuclear norm, so values near 1e-3 x Muon's are usual.
        algorithm: "polar" for matrices, "adamw" for anything, or the name of a registered rule.
        momentum: "none" (C.1), "momentum_first" (C.2, Muon's order), "polar_first" (C.3) or "heavy_ball" (C.4).
        beta: momentum coefficient of the polar algorithm, in [0, 1).
        nesterov: take the polar factor of (1 - beta) G + beta M instead of M, as Muon does.
        scale: factor of the polar factor: "nuclear" (PolarGrad), "muon", "moonlight", "spectral" or "none".
        spectrum: "polar" makes all singular values of the step equal; "homogenized" draws them together as the isotropic
            curvature model's quartic case does, at the same Frobenius norm.
        oracle: how polar factors are computed; "auto" is exact, "newton_schulz" is Muon's.
        steps: inner steps of the oracle; null for as many as it needs (5 for Muon's Newton-Schulz).
        oracle_dtype: type in which the oracle works; null for bf16 in the polynomial oracles, as Muon does (fp64 stays
            fp64), and for that of the momentum in the others.
        lower: singular values below this fraction of the largest count as zero, in the exact oracles.
        weight_decay: decoupled decay, per unit of learning rate.
        cautious: decay only the entries that the step also shrinks.
        betas: AdamW's coefficients of the first and second moment.
        eps: AdamW's epsilon.
        row_sharded: compute a tall matrix from the Gram matrices of its row shards; null decides by shape (m >= 8n)
            and role.
    """

    lr: float = 0.02
    algorithm: str = "polar"
    momentum: Momentum = "momentum_first"
    beta: float = 0.95
    nesterov: bool = False
    scale: Scale = "nuclear"
    spectrum: Spectrum = "polar"
    oracle: Oracle = "auto"
    steps: int | None = None
    oracle_dtype: Literal["float32", "bfloat16"] | None = None
    lower: float = 1e-4
    weight_decay: float = 0.0
    cautious: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    row_sharded: bool | None = None

    def check(self, where: str) -> None:
        """Raises ``ConfigError`` naming ``where`` and the field for a value that makes no sense."""
        for name in ("lr", "beta", "eps", "lower", "weight_decay", "steps"):
            value = getattr(self, name)
            if value is None and name == "steps":
                continue
            kind = Integral if name == "steps" else Real
            scalar = isinstance(value, Tensor) and value.numel() == 1 and name != "steps"
            if not (isinstance(value, kind) or scalar) or isinstance(value, bool):
                what = "null or a whole number" if name == "steps" else "a number"
                raise ConfigError(f"{where}.{name} is {value!r}, expected {what}")
        if not (isinstance(self.betas, list | tuple) and all(isinstance(beta, Real) for beta in self.betas)):
            raise ConfigError(f"{where}.betas is {self.betas!r}, expected two numbers in [0, 1)")
        for name in ("nesterov", "cautious"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{where}.{name} is {getattr(self, name)!r}, expected true or false")
        choices = {
            "momentum": Momentum,
            "scale": Scale,
            "spectrum": Spectrum,
            "oracle": Oracle,
        }
        if self.algorithm not in RULES:
            raise ConfigError(f"{where}.algorithm is {self.algorithm!r}, expected one of: {', '.join(RULES)}")
        for name, literal in choices.items():
            if getattr(self, name) not in literal.__args__:  # type: ignore[attr-defined]
                known = ", ".join(literal.__args__)  # type: ignore[attr-defined]
                raise ConfigError(f"{where}.{name} is {getattr(self, name)!r}, expected one of: {known}")
        ranges = {
            "lr": (0 <= self.lr < math.inf, "a finite number >= 0"),
            "beta": (0 <= self.beta < 1, "a number in [0, 1)"),
            "betas": (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"),
            "eps": (self.eps > 0, "a number > 0"),
            "lower": (0 < self.lower < 1, "a number in (0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a finite number >= 0"),
            "steps": (self.steps is None or self.steps >= 1, "null or a whole number >= 1"),
            "oracle_dtype": (self.oracle_dtype in (None, "float32", "bfloat16"), "null, float32 or bfloat16"),
        }
        for name, (good, expected) in ranges.items():
            if not good:
                raise ConfigError(f"{where}.{name} is {getattr(self, name)}, expected {expected}")
        if self.steps is not None and self.algorithm != "adamw" and self.oracle not in TAKES_STEPS:
            raise ConfigError(
                f"{where}.steps is {self.steps} with oracle {self.oracle!r}, which runs to convergence: set steps to null, "
                f"or take one of the oracles {', '.join(TAKES_STEPS)}"
            )
        if self.spectrum == "homogenized" and (
            self.algorithm != "polar" or self.oracle not in ("auto", "gram")
        ):
            raise ConfigError(
                f"{where}.spectrum is 'homogenized' with algorithm {self.algorithm!r} and oracle {self.oracle!r}, expected "
                "algorithm 'polar' and oracle 'auto' or 'gram', which know the singular values"
            )
        if self.cautious and self.algorithm == "adamw":
            raise ConfigError(
                f"{where}.cautious is true with algorithm 'adamw', expected false: it is for the polar rules"
            )
        if self.nesterov and self.momentum not in ("momentum_first", "heavy_ball"):
            raise ConfigError(
                f"{where}.nesterov is true with momentum {self.momentum!r}, expected momentum_first or heavy_ball: "
                "there is no momentum to look ahead along before the polar factor"
            )


def muon_rule(lr: float = 0.02, **changes: Any) -> Rule:
    """Muon as in its reference implementation: Nesterov momentum 0.95, five Newton-Schulz steps, scale sqrt(max(1, m/n))."""
    return replace(Rule(lr, nesterov=True, scale="muon", oracle="newton_schulz"), **changes)


def polarsgdm_rule(lr: float = 1e-3, **changes: Any) -> Rule:
    """PolarSGDM as the paper trains embeddings and heads (table D.9): momentum-first, beta 0.5, nuclear-norm scale."""
    return replace(Rule(lr, beta=0.5, scale="nuclear"), **changes)


def adamw_rule(lr: float = 1e-3, **changes: Any) -> Rule:
    """AdamW with betas (0.9, 0.95)."""
    return replace(Rule(lr, algorithm="adamw"), **changes)


@dataclass
class OptimizerConfig:
    """One rule per role, and how gradients and updates travel.

    Args:
        hidden: weights of the hidden layers.
        embed: token embedding.
        scalar: norms, biases, and everything else that is not a matrix.
        head: output embedding; null takes the rule of ``embed``.
        value_embed: value embeddings; null takes the rule of ``embed``.
        gradients: "all_reduced" where DDP or FSDP reduces the gradients; "reduce_scatter" where the optimizer itself
            reduces each into the shards that need it, during backward (replicated parameters only).
        comm_dtype: type in which momenta, directions and the updates of fp32 weights travel between ranks; null for that of
            the parameters, and whole weights.
        bucket_mb: size of the pieces in which they travel, in MiB; null for 32, on a GPU 256.
    """

    hidden: Rule = field(default_factory=muon_rule)
    embed: Rule = field(default_factory=polarsgdm_rule)
    scalar: Rule = field(default_factory=adamw_rule)
    head: Rule | None = None
    value_embed: Rule | None = None
    gradients: Literal["all_reduced", "reduce_scatter"] = "all_reduced"
    comm_dtype: Literal["float32", "bfloat16"] | None = None
    bucket_mb: float | None = None

    def rule(self, role: str) -> Rule:
        """The rule of a role."""
        rule = getattr(self, role)
        return self.embed if rule is None else rule

    def check(self) -> None:
        """Raises ``ConfigError`` for the first rule that makes no sense."""
        for role in ROLES:
            self.rule(role).check(f"optimizer.{role}")
        if self.bucket_mb is not None and not 0 < self.bucket_mb < math.inf:
            raise ConfigError(f"optimizer.bucket_mb is {self.bucket_mb}, expected a size in MiB > 0")
        if self.scalar.algorithm != "adamw":
            raise ConfigError(
                f"optimizer.scalar.algorithm is {self.scalar.algorithm!r}, expected 'adamw': scalars and vectors are no "
                "matrices"
            )


ROLES = ("hidden", "embed", "value_embed", "head", "scalar")
