"""First checks: every method against an fp64 SVD on a Gaussian matrix, tall, wide and batched."""

import pytest
import torch

from polargrad_dist.errors import PolarError
from polargrad_dist.polar import apply_rows, cost, gram_matrix, inverse_sqrt, polar


def exact(a):
    P, sigma, Vh = torch.linalg.svd(a.double(), full_matrices=False)
    return P @ Vh, sigma.sum(-1)


@pytest.mark.parametrize("method", ["svd", "gram", "qdwh"])
@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (3, 64, 48), (2, 2, 16, 40), (33, 33)])
def test_each_exact_method_agrees_with_an_fp64_svd(method, shape):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    U, nuclear = exact(a)
    found = polar(a, method=method, lower=1e-6)
    assert found.U.shape == a.shape
    assert (found.U - U).norm() < 1e-4
    torch.testing.assert_close(found.nuclear_norm.double(), nuclear, rtol=1e-6, atol=0)


def test_rows_can_be_split_between_ranks():
    a = torch.randn(100, 24, generator=torch.Generator().manual_seed(2))
    parts = a.split([60, 40, 0])
    root = inverse_sqrt(sum(gram_matrix(part) for part in parts))
    U, nuclear = exact(a)
    parameter = torch.ones_like(a)
    for rows, out in zip(parts, parameter.split([60, 40, 0]), strict=True):
        apply_rows(rows, root.X, out=out, scale=-0.5)
    assert (parameter - (1 - 0.5 * U)).abs().max() < 1e-6
    torch.testing.assert_close(root.nuclear_norm, nuclear, rtol=1e-10, atol=0)


def test_non_finite_input_is_refused_by_batch_index_or_passed_on():
    a = torch.randn(2, 3, 8, 4)
    a[1, 2, 0, 0] = float("nan")
    with pytest.raises(PolarError, match=r"\(1, 2\)"):
        polar(a)
    for method in ("svd", "gram", "qdwh", "newton_schulz", "polar_express"):
        found = polar(a, method=method, check=False)
        assert found.U[1, 2].isnan().all(), method
        assert found.U[:1].isfinite().all(), method


def test_cost_grows_with_the_matrix():
    assert cost((512, 512)) < cost((2048, 512)) < cost((8192, 512))
