"""The homogenized factor solves the isotropic curvature model's quartic case, and does what its theorem says."""

import pytest
import torch

from polargrad_dist.polar import gram_matrix, homogenize, homogenized_spectrum, inverse_sqrt, polar
from tests.optim.reference import homogenized_svd


def matrix(m: int, n: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def minimizer(G: torch.Tensor, c: float) -> torch.Tensor:
    """argmin over all Q of -tr(Q'G) + E c |Qu|^4, u uniform on the sphere, whose fourth moments give the expectation."""
    n = G.shape[1]
    Q = torch.zeros_like(G).add_(G, alpha=0.1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [Q], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        S = Q.T @ Q
        value = -(Q * G).sum() + c / (n * (n + 2)) * (S.trace() ** 2 + 2 * (S * S).sum())
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(loss)
    return Q.detach()


@pytest.mark.parametrize("c", [0.1, 30.0])
def test_it_is_the_models_minimizer_up_to_a_factor(c):
    G = matrix(6, 4) @ torch.diag(torch.tensor([3.0, 1.0, 0.3, 0.05], dtype=torch.float64))
    best, Q = minimizer(G, c), homogenize(G).Q
    cosine = (best * Q).sum() / best.norm() / Q.norm()
    assert float(1 - cosine) < 1e-10


@pytest.mark.parametrize("shape", [(6, 6), (40, 5), (5, 40), (1, 7)])
def test_it_agrees_with_a_root_search_on_the_svd(shape):
    a = matrix(*shape)
    found = homogenize(a)
    expected, nuclear = homogenized_svd(a)
    assert float((found.Q - expected).abs().max()) < 1e-9
    assert float(found.nuclear_norm) == pytest.approx(float(nuclear), rel=1e-12)


def test_vectors_and_order_stay_and_ratios_shrink_but_not_to_one():
    a = matrix(12, 8)
    u, sigma, vh = torch.linalg.svd(a, full_matrices=False)
    inside = u.T @ homogenize(a).Q @ vh.T
    s = inside.diagonal()
    assert float((inside - s.diag()).abs().max()) < 1e-10
    ratios, before = s[:-1] / s[1:], sigma[:-1] / sigma[1:]
    assert (ratios > 1).all()
    assert (ratios < before).all()


def test_it_is_as_long_as_the_polar_factor_also_where_directions_are_null():
    a = matrix(9, 3) @ matrix(3, 6, seed=1)
    assert float(homogenize(a).Q.norm()) == pytest.approx(3**0.5, rel=1e-9)
    assert float(polar(a, method="svd").U.norm()) == pytest.approx(3**0.5, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e30])
def test_the_scale_of_the_matrix_does_not_matter(scale):
    a = matrix(9, 5, dtype=torch.float32)
    assert float((homogenize(a * scale).Q - homogenize(a).Q).abs().max()) < 1e-5


def test_zero_gives_zero_nan_gives_nan_and_batches_are_independent():
    a = torch.stack(
        [
            matrix(4, 3),
            torch.zeros(4, 3, dtype=torch.float64),
            torch.full((4, 3), torch.nan, dtype=torch.float64),
        ]
    )
    found = homogenize(a)
    assert torch.allclose(found.Q[0], homogenize(a[0]).Q, atol=1e-14)
    assert not found.Q[1].any()
    assert found.Q[2].isnan().all()
    assert found.nuclear_norm[2].isnan()


def test_the_residual_is_that_of_the_factor():
    a = matrix(10, 6)
    found = homogenize(a)
    eye = torch.eye(6, dtype=torch.float64)
    assert float(found.residual) == pytest.approx(
        float((found.Q.T @ found.Q - eye).norm()) / 6**0.5, rel=1e-9
    )


def test_row_shards_give_the_same_factor_from_the_sum_of_their_gram_matrices():
    a = matrix(50, 4)
    S = gram_matrix(a[:17]) + gram_matrix(a[17:])
    assert float((a @ inverse_sqrt(S, homogenized=True).X - homogenize(a).Q).abs().max()) < 1e-10


def test_equal_singular_values_are_left_equal():
    s = homogenized_spectrum(torch.full((5,), 0.3, dtype=torch.float64), torch.ones(5, dtype=torch.bool))
    assert s.tolist() == pytest.approx([1.0] * 5, rel=1e-12)
