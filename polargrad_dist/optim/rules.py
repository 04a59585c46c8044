"""The settings of a parameter group's rule, and one rule per role for a model.

Sources: PolarGrad family, algorithms C.1-C.4 of Lau, Long, Su (2025); Muon's scale sqrt(max(1, m/n)) of Jordan et al.
(2024), 0.2 sqrt(max(m, n)) of Liu et al. (2025, "Moonlight"), sqrt(d_out/d_in) of Bernstein and Newhouse (2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

from torch import Tensor

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.matrix import RULES

Momentum = Literal["none", "momentum_first", "polar_first", "heavy_ball"]
Scale = Literal["nuclear", "nuclear_relative", "nuclear_shared", "muon", "moonlight", "spectral", "none"]
Precondition = Literal["none", "soap"]
Normalize = Literal["none", "rows"]
Control = Literal["decay", "cautious", "hyperball"]
TAKES_STEPS = ("qdwh", "newton_schulz", "polar_express")
Spectrum = Literal["polar", "homogenized"]
Oracle = Literal["auto", "gram", "svd", "qdwh", "zolo", "newton", "newton_schulz", "polar_express"]


@dataclass
class Rule:
    """How the parameters of one role are stepped.

    Args:
        lr: base learning rate. With scale "nuclear" it multiplies the nuclear norm of the momentum, which differs by orders
            of magnitude between models; with "nuclear_relative" one rate serves both model families at widths 64 to 256
            (docs/choosing-rules.md). A role that changes algorithm or scale must set it.
        algorithm: "polar" for matrices, "adamw" for anything, or the name of a registered rule.
        momentum: "none" (C.1), "momentum_first" (C.2, Muon's order), "polar_first" (C.3) or "heavy_ball" (C.4).
        beta: momentum coefficient of the polar algorithm, in [0, 1).
        nesterov: take the polar factor of (1 - beta) G + beta M instead of M, as Muon does.
        scale: what the polar factor is multiplied by: "nuclear" (PolarGrad), "nuclear_relative" (the nuclear norm over its
            mean in the first 100 steps; for a head of d inputs times sqrt(64/d)), "nuclear_shared" (one sum of nuclear norms
            for all matrices of a role), "muon", "moonlight", "spectral" or "none".
        alpha: exponent of the nuclear norm: 1 gives PolarGrad, 0 the direction alone.
        precondition: "soap" whitens the momentum in the eigenbasis of the gradient's covariance, before the polar factor.
        center_rows: subtract the mean row before the polar factor and after it, for embeddings and heads.
        normalize: "rows" divides each row of the polar factor by its running root mean square, as NorMuon does.
        spectrum: "polar" makes all singular values of the step equal; "homogenized" moves them closer together, as in the
            quartic case of the isotropic curvature model, at the same Frobenius norm.
        oracle: how polar factors are computed; "auto" is exact, "newton_schulz" is Muon's.
        steps: inner steps of the oracle. Defaults to 5 for newton_schulz and polar_express (whose `lower` of 1e-4 needs about
            10), and to as many as it needs for the others.
        oracle_dtype: dtype in which the oracle works. Defaults to bf16 for the polynomial oracles, as in Muon (fp64 stays
            fp64), and to the momentum's dtype for the others.
        lower: exact oracles treat singular values below this fraction of the largest as zero; polar_express is made for those
            above it.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        control: "decay"; "cautious" decays only the entries that the step also shrinks; "hyperball" keeps each matrix's
            Frobenius norm and makes the step lr times as long.
        floor: minimum ratio of the update's Frobenius norm, before the learning rate, to the weight's; 0 disables it.
        betas: AdamW's coefficients of the first and second moment; the second is also that of soap's and the rows' averages.
        eps: epsilon of AdamW and of soap.
        row_sharded: compute a tall matrix from the Gram matrices of its row shards. Defaults to a choice by shape (m >= 8n)
            and role.
        options: a registered rule's own options, by name.
    """

    lr: float = 0.02
    algorithm: str = "polar"
    momentum: Momentum = "momentum_first"
    beta: float = 0.95
    nesterov: bool = False
    scale: Scale = "nuclear"
    alpha: float = 1.0
    precondition: Precondition = "none"
    center_rows: bool = False
    normalize: Normalize = "none"
    spectrum: Spectrum = "polar"
    oracle: Oracle = "auto"
    steps: int | None = None
    oracle_dtype: Literal["float32", "bfloat16"] | None = None
    lower: float = 1e-4
    weight_decay: float = 0.0
    control: Control = "decay"
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    row_sharded: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, where: str) -> None:
        """Raises ``ConfigError``, naming ``where`` and the field, for an invalid value."""
        for name in ("lr", "beta", "eps", "lower", "weight_decay", "alpha", "floor", "steps"):
            value = getattr(self, name)
            if value is None and name == "steps":
                continue
            kind = Integral if name == "steps" else Real
            scalar = isinstance(value, Tensor) and value.ndim == 0 and name != "steps"
            if not (isinstance(value, kind) or scalar) or isinstance(value, bool):
                what = (
                    "null or a whole number"
                    if name == "steps"
                    else "a number, or a tensor without dimensions"
                )
                raise ConfigError(f"{where}.{name} is {value!r}, expected {what}")
        if not (isinstance(self.betas, list | tuple) and all(isinstance(beta, Real) for beta in self.betas)):
            raise ConfigError(f"{where}.betas is {self.betas!r}, expected two numbers in [0, 1)")
        for name in ("nesterov", "center_rows"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{where}.{name} is {getattr(self, name)!r}, expected true or false")
        choices = {
            "momentum": Momentum,
            "scale": Scale,
            "spectrum": Spectrum,
            "oracle": Oracle,
            "precondition": Precondition,
            "normalize": Normalize,
            "control": Control,
        }
        if self.algorithm not in RULES:
            meant = NAMES.get(str(self.algorithm).lower())
            raise ConfigError(
                f"{where}.algorithm is {self.algorithm!r}, expected one of: {', '.join(RULES)}"
                + (f"; {self.algorithm} is {meant}" if meant else "")
            )
        known_options = getattr(RULES[self.algorithm], "options", {})
        if strange := sorted(set(self.options) - set(known_options)):
            raise ConfigError(
                f"{where}.options has {strange[0]!r}, expected an option of the rule {self.algorithm!r}: "
                f"{', '.join(known_options) or 'it has none'}"
            )
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
            "alpha": (0 <= self.alpha < math.inf, "a finite number >= 0"),
            "floor": (0 <= self.floor < math.inf, "a finite number >= 0"),
            "steps": (self.steps is None or self.steps >= 1, "null or a whole number >= 1"),
            "oracle_dtype": (self.oracle_dtype in (None, "float32", "bfloat16"), "null, float32 or bfloat16"),
        }
        for name, (good, expected) in ranges.items():
            if not good:
                raise ConfigError(f"{where}.{name} is {getattr(self, name)}, expected {expected}")
        for clashes, found, expected in self._combinations():
            if clashes:
                raise ConfigError(f"{where}.{found}, expected {expected}")

    def _combinations(self) -> Iterator[tuple[bool, str, str]]:
        """(whether it applies, what was found, what was expected) for invalid combinations of fields."""
        adamw, hyperball = self.algorithm == "adamw", self.control == "hyperball"
        steps = "steps set to null, or one of the oracles " + ", ".join(TAKES_STEPS)
        yield (
            self.steps is not None and not adamw and self.oracle not in TAKES_STEPS,
            f"steps is {self.steps} with oracle {self.oracle!r}, which runs to convergence",
            steps,
        )
        yield (
            self.spectrum == "homogenized"
            and (self.algorithm != "polar" or self.oracle not in ("auto", "gram")),
            f"spectrum is 'homogenized' with algorithm {self.algorithm!r} and oracle {self.oracle!r}",
            "algorithm 'polar' and oracle 'auto' or 'gram', which know the singular values",
        )
        yield (
            adamw and float(self.lr) >= 1,
            f"lr is {float(self.lr)} with algorithm 'adamw'",
            "a rate below 1",
        )
        for name, nothing in PARTS.items():
            value = getattr(self, name)
            yield (
                adamw and value != nothing,
                f"{name} is {value!r} with algorithm 'adamw'",
                f"{nothing!r}: only the polar rules use it",
            )
        yield (
            self.nesterov and self.momentum not in ("momentum_first", "heavy_ball"),
            f"nesterov is true with momentum {self.momentum!r}",
            "momentum_first or heavy_ball, which have a momentum before the polar factor to look ahead along",
        )
        yield (
            self.precondition == "soap" and self.momentum not in ("momentum_first", "heavy_ball"),
            f"precondition is 'soap' with momentum {self.momentum!r}",
            "momentum_first or heavy_ball, whose momentum is whitened",
        )
        yield (
            self.alpha != 1 and not self.scale.startswith("nuclear"),
            f"alpha is {self.alpha} with scale {self.scale!r}, which has no nuclear norm",
            "alpha 1, or scale 'nuclear', 'nuclear_relative' or 'nuclear_shared'",
        )
        yield (
            self.weight_decay != 0 and hyperball,
            f"weight_decay is {self.weight_decay} with control 'hyperball', which keeps the weight's norm",
            "weight_decay 0",
        )
        yield (
            (self.scale != "none" or self.floor != 0) and hyperball,
            f"scale is {self.scale!r} and floor {self.floor} with control 'hyperball', which sets the step's length itself",
            "scale 'none' and floor 0",
        )


# Fields that only the polar rules read, with the values that a rule of AdamW has by default.
PARTS = {
    "alpha": 1.0,
    "precondition": "none",
    "center_rows": False,
    "normalize": "none",
    "control": "decay",
    "floor": 0.0,
}


def muon_rule(lr: float | None = None, **changes: Any) -> Rule:
    """Muon as in its reference implementation: Nesterov momentum 0.95, five Newton-Schulz steps, scale sqrt(max(1, m/n)).

    lr: defaults to 0.02; another algorithm or scale needs a rate of its own.
    """
    default = Rule(0.02, nesterov=True, scale="muon", oracle="newton_schulz")
    return _changed("muon_rule", "hidden", default, lr, changes)


def polarsgdm_rule(lr: float | None = None, **changes: Any) -> Rule:
    """PolarSGDM as the paper trains embeddings and heads (table D.9): momentum-first, beta 0.5, nuclear-norm scale.

    lr: defaults to 1e-3, where a sweep begins; another algorithm or scale needs a rate of its own.
    """
    return _changed("polarsgdm_rule", "embed", Rule(1e-3, beta=0.5, scale="nuclear"), lr, changes)


def relative_rule(lr: float | None = None, **changes: Any) -> Rule:
    """PolarSGDM with the nuclear norm over its mean in the first steps, so that the rate is the typical length of a step.

    A head's step is also multiplied by sqrt(64/d), d its inputs.

    lr: defaults to 1.0; another algorithm or scale needs a rate of its own.
    """
    return _changed("relative_rule", "embed", Rule(1.0, beta=0.5, scale="nuclear_relative"), lr, changes)


def adamw_rule(lr: float | None = None, **changes: Any) -> Rule:
    """AdamW with betas (0.9, 0.95).

    lr: defaults to 0.05, a rate for vectors and scalars; hidden matrices need a tenth of it or less.
    """
    return _changed("adamw_rule", "embed", Rule(0.05, algorithm="adamw"), lr, changes)


def _changed(where: str, role: str, default: Rule, lr: float | None, changes: dict[str, Any]) -> Rule:
    """A rule with changes, at ``lr`` or at the default's rate; raises ``ConfigError`` where that is another rule's."""
    rule = replace(default, **changes)
    if lr is None:
        expect_rate(where, role, rule, default)
        return rule
    return replace(rule, lr=lr)


# What is called an algorithm elsewhere, and the fields that make it here.
NAMES = {
    "adam": "'adamw' with weight_decay 0",
    "muon": "'polar' with scale 'muon', nesterov true and oracle 'newton_schulz'",
    "normuon": "'polar' with scale 'muon', nesterov true, oracle 'newton_schulz' and normalize 'rows'",
    "polargrad": "'polar' with scale 'nuclear'",
    "polarsgdm": "'polar' with scale 'nuclear' or 'nuclear_relative', and beta 0.5",
}

# Rates to start at for hidden matrices and for tables, by algorithm or scale: docs/choosing-rules.md, "Another rule".
STARTS = {
    "adamw": ("0.003", "0.03"),
    "moonlight": ("0.003", "0.03"),
    "muon": ("0.02", None),
    "nuclear_relative": ("0.02", "1.0"),
    "nuclear": ("0.5 over the nuclear norm of its momentum", "0.5 over the nuclear norm of its momentum"),
}


def expect_rate(where: str, role: str, rule: Rule, rated: Rule) -> None:
    """Raises ``ConfigError`` if ``rule``, which has the rate of ``rated``, is of another algorithm or scale.

    What has no rate at all is left to `OptimizerConfig.check`: an algorithm or scale that does not exist, and for scalars
    any algorithm but AdamW.
    """
    exists = rule.algorithm in RULES and rule.scale in Scale.__args__  # type: ignore[attr-defined]
    other = rule.algorithm != rated.algorithm
    if not exists or role == "scalar" or not (other or _scale_of(rule) != _scale_of(rated)):
        return
    key = "algorithm" if other else "scale"
    start = STARTS.get(rule.scale if rule.algorithm == "polar" else rule.algorithm, (None, None))
    number = start[0 if role == "hidden" else 1]
    raise ConfigError(
        f"{where} has {key} {getattr(rule, key)!r} but no lr of its own, expected one, since {float(rated.lr):g} is a rate "
        f"for {key} {getattr(rated, key)!r}: "
        + (f"start at lr {number}" if number else "docs/rules.md, Rates, converts known ones")
    )


def _scale_of(rule: Rule) -> str:
    """The scale that a rate belongs to: AdamW has none."""
    return "" if rule.algorithm == "adamw" else rule.scale


@dataclass
class OptimizerConfig:
    """One rule per role, and how gradients and updates are communicated.

    Args:
        hidden: weights of the hidden layers.
        embed: token embedding.
        scalar: norms, biases, and everything else that is not a matrix.
        head: output embedding. Defaults to the rule of ``embed``; so does every field that is left out.
        value_embed: value embeddings. Defaults are as for ``head``.
        gradients: "all_reduced" if DDP or FSDP reduces the gradients; "reduce_scatter" if the optimizer itself reduces
            each into the shards that need it, during backward (replicated parameters only).
        comm_dtype: dtype in which momenta, directions and the updates of fp32 weights are sent between ranks. Defaults to
            the parameters' dtype, with weights sent instead of updates.
        bucket_mb: MiB per collective. Defaults to 32, on a GPU to 256.
    """

    hidden: Rule = field(default_factory=muon_rule)
    embed: Rule = field(default_factory=relative_rule)
    scalar: Rule = field(default_factory=adamw_rule)
    head: Rule | None = field(default=None, metadata={"rest_from": "embed"})
    value_embed: Rule | None = field(default=None, metadata={"rest_from": "embed"})
    gradients: Literal["all_reduced", "reduce_scatter"] = "all_reduced"
    comm_dtype: Literal["float32", "bfloat16"] | None = None
    bucket_mb: float | None = None

    def rule(self, role: str) -> Rule:
        """The rule of a role."""
        rule = getattr(self, role)
        return self.embed if rule is None else rule

    def check(self) -> None:
        """Raises ``ConfigError`` for the first invalid setting."""
        for role in ROLES:
            self.rule(role).check(f"optimizer.{role}")
        if self.bucket_mb is not None and not 0 < self.bucket_mb < math.inf:
            raise ConfigError(f"optimizer.bucket_mb is {self.bucket_mb}, expected a size in MiB > 0")
        if self.scalar.algorithm != "adamw":
            raise ConfigError(
                f"optimizer.scalar.algorithm is {self.scalar.algorithm!r}, expected 'adamw': scalars and vectors are not "
                "matrices"
            )


ROLES = ("hidden", "embed", "value_embed", "head", "scalar")
