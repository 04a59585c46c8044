"""Per-step statistics: spectra, times, sums that other matrices wait for, and failures.

All ranks raise a failure together, with the same message; the cause is attached on the rank where it happened.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polargrad_dist.distributed.plan import SUMS, Entry
from polargrad_dist.distributed.transport import Agreement, Late
from polargrad_dist.errors import ConfigError, PolarError
from polargrad_dist.optim.matrix import Direction
from polargrad_dist.polar import InverseSqrt

NAN = float("nan")
NOT_FINITE, FAILED, REFUSED, OUT_OF_MEMORY = range(1, 5)


class Sums:
    """|W|^2, <W, S> and |S|^2 of the matrices W, with steps S, that wait for them, and each role's sum of nuclear norms.

    ``rows`` gives positions (`plan.sum_rows`); ``counted`` the entry of each name that counts: several meshes hold copies.
    """

    def __init__(self, rows: dict[tuple[Any, int], int], counted: dict[str, Any], device: torch.device):
        self.rows, self.counted = rows, counted
        self.values = torch.zeros(len(rows), SUMS, dtype=torch.float64, device=device)

    def places(self, matrices: Sequence[tuple[Entry, int]]) -> Tensor:
        """Positions of these matrices' sums, int64. Made on the host, so keep the result."""
        found = [self.rows[e.key, i] for e, i in matrices]
        return torch.tensor(found, dtype=torch.int64, device=self.values.device)

    def add(self, places: Tensor, values: Tensor) -> None:
        """Adds this rank's part of the sums of the matrices at these places: (matrices, 3)."""
        self.values[places] += values.to(self.values)

    def add_nuclear(self, entry: Entry, norms: Tensor) -> None:
        """Adds the scaled nuclear norms of matrices that are owned here."""
        if self.counted[entry.name] == entry.key:
            self.values[self.rows[entry.role, 0], 0] += norms.sum().to(self.values)

    def nuclear(self, role: str) -> Tensor:
        """The sum of a role's scaled nuclear norms, 0-d."""
        return self.values[self.rows[role, 0], 0]


@dataclass
class Facts:
    """Statistics of this rank's own matrices: nuclear norm, largest and smallest singular value, residual ||U'U - I||.

    For the parameters in ``keep`` the owner also keeps the oracle's input and output: pairs (A, U), each (k, m, n), in
    ``kept``, or (A'A, X) with U = A X, for a tall matrix, in ``kept_gram``.
    """

    keep: frozenset[int] = frozenset()
    ok: Tensor | None = None
    sums: Sums | None = None
    kept: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    kept_gram: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    error: Exception | None = None
    failure: tuple[int, int] = (0, 0)
    sent: list[tuple[list[int], Late]] | None = None
    _spectra: list[tuple[list[int], Tensor]] = field(default_factory=list)
    _flags: list[tuple[list[int], Tensor]] = field(default_factory=list)
    _events: list[tuple[str, Any, Any]] = field(default_factory=list)

    def absorb(self, earlier: Facts) -> None:
        """Adds the statistics of an earlier part of the same step."""
        self.kept.update(earlier.kept)
        self.kept_gram.update(earlier.kept_gram)
        for role, seconds in earlier.seconds.items():
            self.seconds[role] += seconds
        self._spectra += earlier._spectra
        self._flags += earlier._flags
        self._events += earlier._events

    def timed(self, role: str, device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
        """Calls the function; adds the time of its work on the device to a role, without waiting for a GPU."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = function(*args)
            end.record()
            self._events.append((role, start, end))
        else:
            began = time.perf_counter()
            out = function(*args)
            self.seconds[role] += time.perf_counter() - began
        return out

    def total_seconds(self, role: str) -> float:
        """Time of the rules' matrix work for a role on this rank."""
        for its_role, start, end in self._events:
            end.synchronize()
            self.seconds[its_role] += start.elapsed_time(end) / 1e3
        self._events.clear()
        return self.seconds[role]

    def learnt(self, numbers: list[int], answer: Direction, ok: Tensor, A: Tensor) -> None:
        """Records what a rule returned for the matrices A (k, m, n), each of one of the ``members``."""
        known = (answer.nuclear_norm, answer.sigma_max, answer.sigma_min, answer.residual)
        nothing = torch.full_like(answer.scale, NAN)
        columns = [nothing if x is None else x.to(nothing.dtype) for x in known]
        self._spectra.append((numbers, torch.stack(columns, 1)))
        self._flags.append((numbers, ok))
        if self.keep.intersection(numbers):
            for i, number in enumerate(numbers):
                if number in self.keep:
                    self.kept[number].append((A[i : i + 1].clone(), answer.D[i : i + 1].clone()))

    def learnt_root(self, number: int, root: InverseSqrt, ok: Tensor, S: Tensor | None) -> None:
        """Records the root of a tall matrix's Gram matrix S; S is given only if it is to be kept."""
        known = torch.stack(
            [root.nuclear_norm, root.sigma_max, root.sigma_min, torch.full_like(root.nuclear_norm, NAN)]
        )
        self._spectra.append(([number], known[None]))
        self._flags.append(([number], ok[None]))
        if S is not None:
            self.kept_gram[number] = (S, root.X)

    def finite(self, numbers: list[int], ok: Tensor) -> None:
        """Records whether the gradients of elementwise parameters are finite: ok (members,)."""
        self._flags.append((numbers, ok))

    def failed(self, number: int, error: Exception) -> None:
        """Records an error of a rule, which all ranks will raise together."""
        kind = FAILED
        if isinstance(error, torch.OutOfMemoryError):
            kind = OUT_OF_MEMORY
        elif isinstance(error, ConfigError):
            kind = REFUSED
        if self.failure[0] < kind:
            self.failure, self.error = (kind, number), error

    def send(self) -> None:
        """Starts copying what `worst` reads to the host, one copy per device."""
        self.sent = []
        for device in dict.fromkeys(ok.device for _, ok in self._flags):
            flags = [(numbers, ok.reshape(-1)) for numbers, ok in self._flags if ok.device == device]
            good = torch.cat([ok for _, ok in flags])
            if self.ok is not None:
                good |= ~self.ok.to(device)
            self.sent.append(([number for numbers, _ in flags for number in numbers], Late(good)))

    def worst(self) -> tuple[int, int]:
        """(kind, parameter) of the worst failure on this rank; (0, 0) if there is none, or if the step was skipped.

        Waits for the device's work up to `send`, and no further.
        """
        idle = self.sent is None and self.ok is not None and not self.ok
        if self.failure[0] == 0 and not idle:
            for numbers, flags in self._flags if self.sent is None else self.sent:
                bad = [number for number, ok in zip(numbers, flags.tolist(), strict=True) if not ok]
                if bad and self.failure[0] == 0:
                    self.failure = (NOT_FINITE, bad[0])
        return self.failure

    def table(self, count: int) -> tuple[Tensor, Tensor]:
        """Statistics of ``count`` parameters, fp64 on the CPU.

        (count, 2) sums of nuclear norms and numbers of matrices that have one, and (count, 2) largest condition numbers and
        residuals, -1 where unknown.
        """
        sums, largest = (
            torch.zeros(count, 2, dtype=torch.float64, device="cpu"),
            torch.full((count, 2), -1.0, dtype=torch.float64, device="cpu"),
        )
        for numbers, columns in self._spectra:
            nuclear, high, low, residual = columns.double().cpu().unbind(1)
            at = torch.tensor(numbers, device="cpu")
            sums.index_add_(0, at, torch.stack([nuclear, torch.ones_like(nuclear)], 1))
            condition = torch.where(low > 0, high / low, -1.0).nan_to_num(-1.0)
            figures = torch.stack([condition, residual.nan_to_num(-1.0)], 1)
            largest.scatter_reduce_(0, at[:, None].expand(-1, 2), figures, "amax")
        return sums, largest

    def stats(
        self, by: str, entries: Sequence[Entry], agreement: Agreement | None
    ) -> dict[str, dict[str, float]]:
        """`PolarGrad.stats`, from the facts of all ranks. Two small collectives."""
        sums, largest = self.table(len(entries))
        roles = list(dict.fromkeys(e.role for e in entries))
        seconds = torch.tensor(
            [self.total_seconds(role) for role in roles], dtype=torch.float64, device="cpu"
        )
        if agreement is not None:
            agreement.total(sums)
            both = agreement.largest(torch.cat([largest.flatten(), seconds]))
            largest, seconds = both[: largest.numel()].view_as(largest), both[largest.numel() :]
        rows: dict[str, dict[str, float]] = {}
        for e, (nuclear, known), (condition, residual) in zip(
            entries, sums.tolist(), largest.tolist(), strict=True
        ):
            if known:
                figures = {"condition": condition, "residual": residual}
                rows[e.name] = {"nuclear_norm": nuclear} | {
                    k: NAN if v < 0 else v for k, v in figures.items()
                }
        if by == "parameter":
            return rows
        out = {}
        for role, spent in zip(roles, seconds.tolist(), strict=True):
            mine = [rows[e.name] for e in entries if e.role == role and e.name in rows]
            if mine:
                worst = {
                    key: max((row[key] for row in mine if row[key] == row[key]), default=NAN)
                    for key in ("condition", "residual")
                }
                nuclear = sum(row["nuclear_norm"] for row in mine) / len(mine)
                out[role] = {"nuclear_norm": nuclear, **worst, "seconds": spent}
        return out


def failure_of(kind: int, entry: Entry, cause: Exception | None, device: torch.device) -> Exception:
    """The error for a failure of this kind at a parameter; ``cause`` is the original error, on the rank where it occurred."""
    name, rest = entry.name, "its weights are unchanged; the other parameters have been stepped"
    if entry.kind == "elementwise" and any(cut is not None for cut in entry.layout.state_cuts):
        rest = "that shard of it is unchanged; the rest has been stepped"
    if kind == NOT_FINITE:
        return PolarError(
            f"the gradient or momentum of {name} is not finite, so {rest}: restore the model and this optimizer from a "
            "checkpoint, and step only if clip_grad_norm_ returns a finite norm"
        )
    words = (
        f"{type(cause).__name__}: {cause}"
        if cause is not None
        else "see the error of the rank where it happened"
    )
    if kind == OUT_OF_MEMORY:
        return torch.OutOfMemoryError(
            f"the polar decomposition of {name} ran out of memory on {device.type}, so {rest} ({words}): lower "
            "bucket_mb or the batch"
        )
    if kind == REFUSED:
        return ConfigError(f"{name} was not stepped; the other parameters have been ({words})")
    return PolarError(f"the rule of {name} failed, so {rest} ({words})")
