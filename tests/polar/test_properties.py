"""What holds for every matrix: invariance to scale, equivariance to rotations and to transposition, batching."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polargrad_dist.polar import polar

from .spectra import generator

METHODS = ["auto", "svd", "gram", "qdwh", "zolo", "newton", "newton_schulz", "polar_express"]

seeds = st.integers(0, 2**31)
# Away from square: there a Gaussian is ill-conditioned and rounding alone rotates its weakest direction.
shapes = st.integers(1, 12).flatmap(lambda n: st.tuples(st.integers(3 * n, 3 * n + 20), st.just(n)))
methods = st.sampled_from(METHODS)


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def rotation(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(matrix((n, n), seed))[0]


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, methods, st.floats(1e-12, 1e12))
def test_positive_scaling_changes_nothing_but_the_norm(shape, seed, method, factor):
    a = matrix(shape, seed)
    plain, scaled = polar(a, method=method), polar(factor * a, method=method)
    close(scaled.U, plain.U)
    torch.testing.assert_close(scaled.nuclear_norm, factor * plain.nuclear_norm, rtol=1e-10, atol=0)


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, methods)
def test_rotations_on_either_side_pass_through(shape, seed, method):
    a = matrix(shape, seed)
    P, Q = rotation(shape[0], seed + 1), rotation(shape[1], seed + 2)
    close(polar(P @ a @ Q, method=method).U, P @ polar(a, method=method).U @ Q)


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, methods)
def test_the_polar_factor_of_the_transpose_is_the_transpose(shape, seed, method):
    a = matrix(shape, seed)
    close(polar(a.mT, method=method).U, polar(a, method=method).U.mT)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 4), seeds, methods)
def test_a_batch_is_its_matrices(shape, count, seed, method):
    a = torch.randn(count, *shape, dtype=torch.float64, generator=generator(seed))
    together = polar(a, method=method, hermitian=True)
    for k in range(count):
        alone = polar(a[k], method=method, hermitian=True)
        close(together.U[k], alone.U)
        close(together.H[k], alone.H)


@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans(), seeds, st.sampled_from(METHODS[:6]))
def test_a_is_u_times_a_symmetric_positive_h(shape, wide, seed, method):
    a = matrix(shape, seed)
    a = a.mT if wide else a
    U, H, nuclear_norm, _ = polar(a, method=method, hermitian=True)
    close(U @ H, a)
    assert torch.equal(H, H.mT) or (H - H.mT).abs().max() < 1e-14 * H.abs().max()
    assert torch.linalg.eigvalsh(H).min() > -1e-12
    torch.testing.assert_close(H.trace(), nuclear_norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
def test_conventions_are_scipys(shape):
    linalg = pytest.importorskip("scipy.linalg")
    a = matrix(shape, 5)
    U, H = linalg.polar(a.numpy())
    found = polar(a, lower=0, hermitian=True)
    close(found.U, torch.from_numpy(U))
    close(found.H, torch.from_numpy(H))
