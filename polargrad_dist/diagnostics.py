"""How well conditioned a run's gradients, momenta and updates are: exact, for sharded parameters too, and cheap.

A gradient's spectrum comes from its Gram matrix, summed over the ranks for tall matrices; that of the momentum from what the
oracle was given anyway, and the update is judged by what the oracle gave back: nothing is orthogonalized twice.
"""

from __future__ import annotations

import fnmatch
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from polargrad_dist.distributed.layout import Split, Stretches, slices, volume
from polargrad_dist.distributed.transport import Traffic, pack_triangle, unpack_triangle
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import PolarGrad
from polargrad_dist.optim.facts import NAN
from polargrad_dist.optim.member import Member
from polargrad_dist.optim.planning import split_of
from polargrad_dist.polar import InverseSqrt, apply_rows, gram_matrix, inverse_sqrt

# Of the largest singular value: below it an fp64 Gram matrix holds rounding noise
RANK_CUTOFF = 1e-7
SPECTRUM = ("condition", "nuclear_norm", "frobenius_norm", "spectral_norm", "stable_rank")
UPDATE = ("residual", "cosine")


@dataclass
class DiagnosticsConfig:
    """Which matrices are diagnosed, and how often.

    Args:
        every: steps between diagnoses, beginning with the first step; 0 for never.
        hidden: number of hidden matrices, beside embedding, head and value embeddings; spread evenly over the depth.
        parameters: names or patterns (``*.mlp.*``) of further matrices.
    """

    every: int = 100
    hidden: int = 3
    parameters: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises ``ConfigError`` for a number that makes no sense."""
        for name in ("every", "hidden"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"trainer.diagnostics.{name} is {getattr(self, name)}, expected a whole number >= 0"
                )


class Diagnostics:
    """Looks at some matrices of an optimizer around one of its steps; every method is called on all ranks."""

    def __init__(self, optimizer: PolarGrad, config: DiagnosticsConfig):
        """Raises ``ConfigError`` when a pattern of ``config.parameters`` matches no matrix."""
        config.check()
        self.optimizer, self.every = optimizer, config.every
        self.works = choose(optimizer.works, config)
        self.traffic = Traffic()
        self._gradients: dict[int, torch.Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether the step of this number, counted from 1, is looked at."""
        return bool(self.every and self.works and (step == 1 or step % self.every == 0))

    @torch.no_grad()
    def before_step(self) -> None:
        """Looks at the gradients as they are now, and has the optimizer keep what its oracle is about to see."""
        self.optimizer.finish_reductions()
        self.optimizer.keep_next(self.works)
        self._gradients = {}
        for work in self.works:
            spectra = self._gradient(work)
            if spectra is not None:
                self._gradients[work.index] = measured(spectra)

    @torch.no_grad()
    def after_step(self) -> dict[str, dict[str, dict[str, float]]]:
        """By parameter: ``gradient`` and ``momentum`` with `SPECTRUM`, ``update`` with `UPDATE`; the same on all ranks.

        ``momentum`` is what the oracle was given, and missing where that is the gradient itself or there is no oracle.
        Figures that nobody knows (of a zero matrix, say) are NaN.
        """
        here: dict[tuple[int, str], torch.Tensor] = {
            (i, "gradient"): figures for i, figures in self._gradients.items()
        }
        for work in self.works:
            if (seen := self._update(work)) is not None:
                here[work.index, "momentum"], here[work.index, "update"] = seen
        agreement, known = self.optimizer.agreement, defaultdict(list)
        for part in [here] if agreement is None else agreement.gather_objects(here):
            for key, figures in part.items():
                known[key].append(figures)
        out: dict[str, dict[str, dict[str, float]]] = {}
        for work in self.works:
            kinds: dict[str, tuple[str, ...]] = {"gradient": SPECTRUM}
            if work.entry.kind != "elementwise":
                if work.group["momentum"] in ("momentum_first", "heavy_ball"):
                    kinds["momentum"] = SPECTRUM
                kinds["update"] = UPDATE
            out[work.entry.name] = {
                kind: dict(zip(names, _together(kind, known[work.index, kind]), strict=True))
                for kind, names in kinds.items()
            }
        return out

    def _gradient(self, work: Member) -> list[InverseSqrt] | None:
        """Spectra of the gradient, at the one rank that works them out."""
        team, place = work.team, _place(work)
        mine = self.optimizer.shard_gradient(work)
        if _by_rows(work):
            S = gram_matrix(mine[0])
            if not work.entry.layout.counted(team.place):
                S.zero_()
            if team.group is None:
                return [_spectrum(S)]
            at = team.order.index(place)
            packed = self.traffic.reduce(pack_triangle(S), at, team.group).wait()
            return [_spectrum(unpack_triangle(packed, S.shape[0]))] if team.place == place else None
        whole = self._gathered(work, mine)
        if team.place != place:
            return None
        split = _split(work)
        whole = whole.reshape(split.stack, split.rows, split.cols)
        views = (whole[deep, down, across] for deep, down, across in map(slices, split.matrices))
        return [_spectrum(_small_gram(view[0])) for view in views]

    def _gathered(self, work: Member, mine: torch.Tensor) -> torch.Tensor:
        """A gradient put together on every rank that stores the parameter, as (slices, rows, columns)."""
        team, boxes = work.team, work.entry.rectangles
        if team.group is None:
            return mine
        longest = max(map(volume, boxes))
        flat = mine.new_zeros(longest)
        flat[: mine.numel()] = mine.reshape(-1)
        out = mine.new_zeros(tuple(max(box[axis][1] for box in boxes) for axis in range(3)))
        for place, part in zip(team.order, self.traffic.all_gather(flat, team.group).wait(), strict=True):
            out[slices(boxes[place])] = part[: volume(boxes[place])].view(out[slices(boxes[place])].shape)
        return out

    def _update(self, work: Member) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(spectrum of what the oracle was given, residual and cosine of what it gave), at the owner."""
        facts = self.optimizer.facts
        if work.index in facts.kept_gram:
            S, X = facts.kept_gram[work.index]
            exact = _spectrum(S.clone())
            product = S @ X
            return measured([exact]), judge(X.mT @ product, (exact.X * product).sum(), exact)[:, None]
        if work.index not in facts.kept:
            return None
        spectra, verdicts = [], []
        for A, U in facts.kept[work.index]:
            tall, factor = (A, U) if A.shape[-2] >= A.shape[-1] else (A.mT, U.mT)
            exact = _spectrum(gram_matrix(tall))
            best = apply_rows(tall.double(), exact.X, precise=True)
            inner = (best * factor).sum((-2, -1))
            spectra.append(exact)
            verdicts.append(judge(gram_matrix(factor), inner, exact))
        return measured(spectra), torch.stack(verdicts, 1)


def _together(kind: str, parts: list[torch.Tensor]) -> list[float]:
    """The figures of a parameter from those of its matrices, which several ranks may have owned; NaN where nobody knows."""
    if not parts:
        return [NAN] * len(UPDATE if kind == "update" else SPECTRUM)
    columns = torch.cat(parts, 1)
    if kind != "update":
        return summary(columns).tolist()
    residual, cosine = columns
    cosines = cosine[cosine.isfinite()]
    return [float(residual.amax()), float(cosines.amin() if len(cosines) else cosine[0])]


def check_patterns(config: DiagnosticsConfig, matrices: list[str]) -> None:
    """Raises ``ConfigError`` for a pattern that is the name of none of these matrices."""
    for pattern in config.parameters:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in matrices):
            raise ConfigError(
                f"trainer.diagnostics.parameters names {pattern!r}, expected the name of a matrix or a pattern, such as "
                f"{matrices[0] if matrices else '*'!r}"
            )


def choose(works: Sequence[Member], config: DiagnosticsConfig) -> list[Member]:
    """Embeddings and heads, ``config.hidden`` hidden matrices, and those that ``config.parameters`` names."""
    matrices = [w for w in works if len(w.entry.shape) >= 2 and w.entry.numel]
    chosen = {w.index for w in matrices if w.entry.role in ("embed", "value_embed", "head")}
    hidden = [w for w in matrices if w.entry.role == "hidden"]
    count = min(config.hidden, len(hidden))
    steps = [round(k * (len(hidden) - 1) / max(1, count - 1)) for k in range(count)]
    chosen |= {hidden[k].index for k in steps}
    check_patterns(config, [w.entry.name for w in matrices])
    for pattern in config.parameters:
        chosen |= {w.index for w in matrices if fnmatch.fnmatchcase(w.entry.name, pattern)}
    return [w for w in works if w.index in chosen]


def measured(spectra: Iterable[InverseSqrt]) -> torch.Tensor:
    """Of each matrix condition number, nuclear norm, squared Frobenius norm, spectral norm, stable rank: (5, k) fp64, CPU."""
    parts = []
    for s in spectra:
        sigma = s.sigma.reshape(-1, s.sigma.shape[-1])
        largest = sigma.amax(-1)
        square = sigma.square().sum(-1)
        smallest = torch.where(s.kept.reshape(sigma.shape), sigma, math.inf).amin(-1)
        parts.append(
            torch.stack([largest / smallest, sigma.sum(-1), square, largest, square / largest.square()])
        )
    return torch.cat(parts, -1).cpu()


def summary(figures: torch.Tensor) -> torch.Tensor:
    """`SPECTRUM` of a parameter from what was `measured` of its matrices: norms as of one block-diagonal matrix, the
    condition number of the worst, the mean stable rank."""
    condition, nuclear, square, largest, stable = figures
    # Of a zero matrix there is none
    condition = torch.where(condition > 0, condition, NAN)
    return torch.stack(
        [
            condition.nan_to_num(0.0).amax() if condition.isfinite().any() else condition[0],
            nuclear.sum(),
            square.sum().sqrt(),
            largest.amax(),
            stable.nanmean(),
        ]
    )


def judge(gram_of_update: torch.Tensor, inner: torch.Tensor, exact: InverseSqrt) -> torch.Tensor:
    """(largest ‖UᵀU − I‖_F/√n, smallest cosine between U and the polar factor) of a batch, fp64 on the CPU.

    gram_of_update: UᵀU (…, n, n). inner: ⟨U, U*⟩ (…) with the exact factor U*, whose spectrum is ``exact``.
    """
    eye = torch.eye(gram_of_update.shape[-1], dtype=torch.float64, device=gram_of_update.device)
    residual = torch.linalg.matrix_norm(gram_of_update - eye) / math.sqrt(eye.shape[0])
    lengths = gram_of_update.diagonal(dim1=-2, dim2=-1).sum(-1) * exact.kept.sum(-1)
    # A zero matrix has none
    cosine = torch.where(lengths > 0, inner / lengths.sqrt(), math.inf).amin()
    return torch.stack([residual.amax(), torch.where(cosine.isfinite(), cosine, NAN)]).cpu()


def _place(work: Member) -> int:
    """The place of the rank that works a parameter's figures out: its first owner, or one for each in turn."""
    return work.entry.owners[0] if work.entry.owners else work.index % work.entry.layout.world


def _by_rows(work: Member) -> bool:
    """Whether the Gram matrix of the gradient is summed over row shards, and the gradient never gathered."""
    if work.entry.kind == "tall":
        return True
    split, e = _split(work), work.entry
    rows = all(cut in (0, None) for cut in e.layout.state_cuts) and not isinstance(e.layout, Stretches)
    return (
        e.kind == "elementwise"
        and len(e.shape) == 2
        and rows
        and len(split.matrices) == 1
        and split.rows >= split.cols
    )


def _split(work: Member) -> Split:
    """The matrices that a parameter holds, which do not depend on the algorithm that steps it."""
    split = work.entry.split or split_of(work.group, work.entry.name, work.entry.shape)
    return replace(split, flattened=False)


def _small_gram(x: torch.Tensor) -> torch.Tensor:
    return gram_matrix(x if x.shape[-2] >= x.shape[-1] else x.mT)


def _spectrum(S: torch.Tensor) -> InverseSqrt:
    # The whole spectrum: this may wait for a GPU
    return inverse_sqrt(S, lower=RANK_CUTOFF, root="eigh")
