"""The three matrix problems of sections 5.1-5.3 of Lau, Long, Su (2025), sizes and data as in its appendix D.

Each has its data, its parameters and closed-form gradients; none knows an optimizer. The formulas are those of the paper,
in particular labels in {0, 1} for the logistic problem. Objectives are evaluated in fp64, whatever the parameters' dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Problem(ABC):
    """A function of one or two matrices.

    Attributes: ``params`` by name; ``optimum``, the minimum of the objective, or None if it is unknown.
    """

    name: str
    params: dict[str, nn.Parameter]
    optimum: float | None

    @abstractmethod
    def gradients(self) -> None:
        """Sets ``grad`` of every parameter; a stochastic problem draws a minibatch."""

    @abstractmethod
    def loss(self) -> float:
        """The objective over all data."""

    @abstractmethod
    def gap(self) -> float | None:
        """Objective minus optimum, without cancellation; None if the optimum is unknown."""

    def residual(self) -> Tensor | None:
        """The residual matrix whose condition number the paper shows; None if it shows none."""
        return None


class Quadratic(Problem):
    """f(X) = ½‖AXB − C‖², X (m, n), A (p, m), B (n, q), C (p, q): example 3.1 and section 5.1.

    A, B, C standard Gaussian, X₀ uniform on (−1, 1). Strongly convex for p ≥ m, q ≥ n: the minimum is
    X* = (AᵀA)⁻¹AᵀCBᵀ(BBᵀ)⁻¹ and f(X) − f* = ½‖A(X − X*)B‖², both found through QR factors in fp64.
    ``smoothness`` L and ``convexity`` μ are the extreme eigenvalues of the Hessian BBᵀ ⊗ AᵀA.
    """

    name = "quadratic"

    def __init__(
        self,
        seed: int,
        size: tuple[int, int, int, int] = (500, 100, 1000, 250),
        dtype: torch.dtype = torch.float32,
    ):
        m, n, p, q = size
        draw = torch.Generator().manual_seed(seed)
        self.X = nn.Parameter(_uniform((m, n), draw, dtype))
        self.A, self.B, self.C = (
            torch.randn(shape, generator=draw, dtype=dtype) for shape in ((p, m), (n, q), (p, q))
        )
        self.params = {"X": self.X}
        A, B, C = self.A.double(), self.B.double(), self.C.double()
        # A = Qa Ra, B = Rbᵀ Qbᵀ, and core = Ra X* Rbᵀ.
        Qa, self._Ra = torch.linalg.qr(A)
        Qb, self._Rb = torch.linalg.qr(B.mT)
        core = Qa.mT @ C @ Qb
        left = torch.linalg.solve_triangular(self._Ra, core, upper=True)
        self.minimizer = torch.linalg.solve_triangular(self._Rb.mT, left, upper=False, left=False)
        self.optimum = 0.5 * float(C.square().sum() - core.square().sum())
        a, b = torch.linalg.svdvals(self._Ra), torch.linalg.svdvals(self._Rb)
        self.smoothness = float((a[0] * b[0]) ** 2)
        self.convexity = float((a[-1] * b[-1]) ** 2)

    def residual(self) -> Tensor:
        """E = AXB − C, (p, q)."""
        return self.A @ self.X.detach() @ self.B - self.C

    def gradients(self) -> None:
        """AᵀEBᵀ."""
        self.X.grad = self.A.mT @ (self.residual() @ self.B.mT)

    def gap(self) -> float:
        distance = self.X.detach().double() - self.minimizer
        return 0.5 * float((self._Ra @ distance @ self._Rb.mT).square().sum())

    def loss(self) -> float:
        assert self.optimum is not None
        return self.optimum + self.gap()

    def newton(self, G: Tensor) -> Tensor:
        """(AᵀA)⁻¹G(BBᵀ)⁻¹ for a gradient G (m, n): the inverse Hessian times G."""
        left = torch.cholesky_solve(G.double(), self._Ra, upper=True)
        return torch.cholesky_solve(left.mT, self._Rb, upper=True).mT.to(G.dtype)


class Logistic(Problem):
    """f(X) = Σ_i Σ_j log(1 + exp(−c_ij (a_i X B)_j)), X (m, n), A (N, m), B (n, q), C (N, q): section 5.2.

    A and B are standard Gaussian; c_ij is 1 where a standard Gaussian exceeds 0.5 and 0 elsewhere, as printed, so an
    entry with label 0 costs log 2 whatever X is. Gradients are sums over ``batch`` rows drawn with replacement.
    """

    name = "logistic"

    def __init__(
        self,
        seed: int,
        size: tuple[int, int, int, int] = (1000, 100, 10000, 400),
        batch: int | None = 1000,
        dtype: torch.dtype = torch.float32,
    ):
        m, n, N, q = size
        draw = torch.Generator().manual_seed(seed)
        self.X = nn.Parameter(_uniform((m, n), draw, dtype))
        self.A = torch.randn((N, m), generator=draw, dtype=dtype)
        self.B = torch.randn((n, q), generator=draw, dtype=dtype)
        self.C = (torch.randn((N, q), generator=draw, dtype=dtype) > 0.5).to(dtype)
        self.params = {"X": self.X}
        self.optimum = None
        self._batch = batch
        self._rows = torch.Generator().manual_seed(seed + 1)

    def gradients(self) -> None:
        """Aᵀ(−C ⊙ σ(−C ⊙ AXB))Bᵀ over the rows of a minibatch, or over all rows if ``batch`` is None."""
        A, C = self.A, self.C
        if self._batch is not None:
            rows = torch.randint(len(A), (self._batch,), generator=self._rows)
            A, C = A[rows], C[rows]
        slope = -C * torch.sigmoid(-C * (A @ self.X.detach() @ self.B))
        self.X.grad = A.mT @ (slope @ self.B.mT)

    def loss(self) -> float:
        total = 0.0
        for A, C in zip(self.A.split(1000), self.C.split(1000), strict=True):
            margin = C * (A @ self.X.detach() @ self.B)
            total += float(nn.functional.softplus(-margin).sum(dtype=torch.float64))
        return total

    def gap(self) -> None:
        return None


class Completion(Problem):
    """f(X, Y) = ‖mask ⊙ (XYᵀ − M)‖² / ‖mask‖², X (m, r), Y (n, r), M = UVᵀ of rank r: section 5.3.

    U and V standard Gaussian, 30 % of the entries observed, X₀ and Y₀ uniform on (−1, 1). The minimum is 0.
    """

    name = "completion"

    def __init__(
        self, seed: int, size: tuple[int, int, int] = (500, 250, 5), dtype: torch.dtype = torch.float32
    ):
        m, n, r = size
        draw = torch.Generator().manual_seed(seed)
        self.X = nn.Parameter(_uniform((m, r), draw, dtype))
        self.Y = nn.Parameter(_uniform((n, r), draw, dtype))
        self.mask = (torch.rand((m, n), generator=draw, dtype=dtype) < 0.3).to(dtype)
        U = torch.randn((m, r), generator=draw, dtype=dtype)
        V = torch.randn((n, r), generator=draw, dtype=dtype)
        self.target = U @ V.mT
        self.observed = float(self.mask.sum(dtype=torch.float64))
        self.params = {"X": self.X, "Y": self.Y}
        self.optimum = 0.0

    def residual(self) -> Tensor:
        """mask ⊙ (XYᵀ − M), (m, n)."""
        return self.mask * (self.X.detach() @ self.Y.detach().mT - self.target)

    def gradients(self) -> None:
        """2EY/‖mask‖² and 2EᵀX/‖mask‖² for the residual E."""
        E = self.residual() * (2 / self.observed)
        self.X.grad = E @ self.Y.detach()
        self.Y.grad = E.mT @ self.X.detach()

    def loss(self) -> float:
        E = self.X.detach().double() @ self.Y.detach().double().mT - self.target.double()
        return float((self.mask * E).square().sum()) / self.observed

    def gap(self) -> float:
        return self.loss()


def _uniform(shape: tuple[int, int], draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Independent entries, uniform on (−1, 1)."""
    return 2 * torch.rand(shape, generator=draw, dtype=dtype) - 1


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "quadratic": Quadratic,
    "logistic": Logistic,
    "completion": Completion,
}


def condition_number(matrix: Tensor) -> tuple[float, float]:
    """(κ₂, nuclear norm) of a matrix (m, n), from its singular values in fp64; κ₂ is inf for a singular matrix."""
    sigma = torch.linalg.svdvals(matrix.double())
    smallest = float(sigma[-1])
    return (float(sigma[0]) / smallest if smallest > 0 else math.inf), float(sigma.sum())
