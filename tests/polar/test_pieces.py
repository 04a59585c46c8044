"""The pieces an optimizer uses by themselves, and what it may rely on: no waiting for a device, compilation, costs."""

import pytest
import torch

from polargrad_dist.errors import PolarError
from polargrad_dist.polar import (
    apply_rows,
    choose_method,
    compress_rows,
    cost,
    expand_rows,
    gram_matrix,
    inverse_sqrt,
    polar,
    root_cost,
)
from polargrad_dist.polar.oracle import full_precision

from .spectra import direction_error, exact, gaussian, log_spaced

METHODS = ["svd", "gram", "qdwh", "zolo", "newton", "newton_schulz", "polar_express"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(700, 300), (3, 50, 20), (0, 20), (5000, 400)])
def test_the_gram_matrix_is_exact_to_fp64_rounding_and_symmetric(shape, dtype):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    S = gram_matrix(a)
    expected = a.double().mT @ a.double()
    assert S.dtype == torch.float64
    assert torch.equal(S, S.mT)
    torch.testing.assert_close(S, expected, rtol=1e-12, atol=1e-11)


def test_a_matrix_split_by_rows_is_updated_as_the_whole():
    a = gaussian(3000, 64).float()
    sizes = [1400, 1600, 0]
    root = inverse_sqrt(sum(gram_matrix(part) for part in a.split(sizes)))
    reference = exact(a)
    parameter = torch.ones_like(a)
    for rows, out in zip(a.split(sizes), parameter.split(sizes), strict=True):
        assert apply_rows(rows, root.X, out=out, scale=-0.5 * root.nuclear_norm) is out
    expected = 1 - 0.5 * reference.sigma.sum() * reference.U
    torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(root.nuclear_norm, reference.sigma.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(root.sigma_max, reference.sigma[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(root.sigma_min, reference.sigma[-1], rtol=1e-10, atol=0)


def test_the_precise_product_is_what_strict_mode_needs():
    a = log_spaced(600, 128, 1e4).float()
    root = inverse_sqrt(gram_matrix(a), lower=1e-7)
    reference = exact(a)
    assert direction_error(apply_rows(a, root.X, precise=True), reference) <= 1e-7
    assert 1e-7 < direction_error(apply_rows(a, root.X), reference) <= 1e-3


def test_updates_of_half_precision_parameters_and_rows_are_summed_in_fp32():
    a = gaussian(200, 32).bfloat16()
    root = inverse_sqrt(gram_matrix(a))
    out = apply_rows(a, root.X, out=torch.zeros(200, 32), scale=2.0)
    assert (out.double() / 2 - exact(a).U).abs().max() < 1e-6


def test_a_gram_matrix_with_nan_becomes_nan_without_an_error():
    S = torch.stack([torch.eye(4, dtype=torch.float64), torch.full((4, 4), torch.nan, dtype=torch.float64)])
    root = inverse_sqrt(S)
    torch.testing.assert_close(root.X[0], torch.eye(4, dtype=torch.float64))
    assert root.X[1].isnan().all()
    assert root.nuclear_norm.isnan().tolist() == [False, True]


def test_zero_rows_are_left_out_and_come_back_exactly():
    a = torch.zeros(4000, 32)
    index = torch.randperm(4000, generator=torch.Generator().manual_seed(3))[:500]
    a[index] = gaussian(500, 32).float()
    sparse = compress_rows(a)
    assert sparse.rows.shape == (500, 32)
    assert torch.equal(expand_rows(sparse.rows, sparse.positions, sparse.m), a)
    found = polar(a, info=True)
    assert torch.equal(found.U.any(dim=1), a.any(dim=1))
    assert direction_error(found.U, exact(a)) <= 1e-7
    wide = polar(a.mT)
    torch.testing.assert_close(wide.U, found.U.mT)


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_fewer_non_zero_rows_than_columns_are_a_wide_problem(rows):
    a = torch.zeros(2000, 32)
    a[100 : 100 + rows] = gaussian(rows, 32).float()
    found = polar(a, hermitian=True, info=True)
    reference = exact(a, cut=1e-5)
    assert (found.U - reference.U).norm() <= 1e-5
    assert (found.U @ found.H - a).norm() <= 1e-5 * a.norm()
    assert abs(found.nuclear_norm / reference.sigma.sum() - 1) <= 1e-6
    assert found.info.sigma_min == 0
    assert found.info.residual == pytest.approx((1 - rows / 32) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("shape", [(2, 64, 32), (32, 32), (16, 40)])
def test_without_the_check_no_method_reads_a_number_back_from_the_device(method, shape):
    # A meta tensor has no numbers: reading one raises.
    found = polar(torch.empty(shape, device="meta"), method=method, check=False, info=True, hermitian=True)
    assert found.U.shape == shape


@pytest.mark.parametrize("method", ["gram", "newton_schulz", "polar_express"])
# From 2^16 elements on, polynomials go by blocks if they are not compiled.
@pytest.mark.parametrize("shape", [(48, 16), (260, 256)])
def test_methods_without_data_dependent_steps_compile_as_one_graph(method, shape):
    torch.compiler.reset()
    a = gaussian(*shape).float()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        return polar(x, method=method, check=False)[::2]

    U, nuclear_norm = run(a)
    expected = polar(a, method=method)
    torch.testing.assert_close(U, expected.U)
    torch.testing.assert_close(nuclear_norm, expected.nuclear_norm)


def test_tf32_is_switched_off_for_exact_methods_and_back_on_after():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with full_precision(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        with full_precision(torch.device("cpu")):
            assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_info_says_what_happened():
    a = gaussian(100, 40).float()
    sigma = exact(a).sigma
    for method in ("svd", "gram", "qdwh", "zolo", "newton"):
        info = polar(a, method=method, info=True).info
        assert info.method == method
        assert info.residual < 1e-5
        assert sigma[0] * 0.999 <= info.sigma_max <= sigma[0] * 1.11
        assert sigma[-1] * 0.3 <= info.sigma_min <= sigma[-1] * 1.001
    muon = polar(a, method="newton_schulz", info=True).info
    gains = torch.linalg.svdvals(polar(a, method="newton_schulz").U.double())
    assert muon.steps == 5
    torch.testing.assert_close(muon.residual.double(), ((gains**2 - 1) ** 2).mean().sqrt(), rtol=1e-4, atol=0)
    rank = polar(gaussian(64, 8) @ gaussian(8, 32), info=True).info
    assert abs(rank.residual - 0.75**0.5) < 1e-6
    assert polar(a).info is None


def test_auto_follows_shape_and_strictness():
    assert choose_method((1024, 1024)) == "svd"
    assert choose_method((50304, 768)) == choose_method((768, 50304)) == "gram"
    assert choose_method((1024, 1024), lower=1e-7) == "gram"
    assert polar(gaussian(64, 16), info=True).info.method == "gram"


def test_costs_order_methods_and_shapes_as_their_work_does():
    assert cost((512, 512)) < cost((2048, 512)) < cost((8192, 512))
    assert cost((768, 50304)) == cost((50304, 768))
    assert cost((50304, 768), "gram") < cost((50304, 768), "svd") < cost((50304, 768), "newton_schulz", 10)
    assert cost((64, 32), "newton_schulz", 10) == 2 * cost((64, 32), "newton_schulz", 5)
    assert cost((0, 5)) == 0
    with pytest.raises(PolarError, match="nope"):
        cost((4, 4), "nope")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_device_has_costs_of_its_own_that_grow_with_the_matrix(device):
    for method in ("auto", *METHODS):
        sizes = [cost((m, n), method, device_type=device) for m, n in ((256, 256), (1024, 256), (1024, 1024))]
        assert sizes == sorted(sizes)
        assert sizes[0] > 0
    assert root_cost(512, device_type=device) < root_cost(1024, device_type=device)
    assert root_cost(512, "qdwh", 2, device_type=device) < root_cost(512, "qdwh", 5, device_type=device)


def test_factorizations_are_dear_on_a_gpu_and_small_matrices_are_paid_by_launches():
    def on_gpu(shape, method):
        return cost(shape, method, device_type="cuda")

    assert on_gpu((768, 768), "svd") > 5 * on_gpu((768, 768), "gram")
    assert on_gpu((768, 768), "newton_schulz") < on_gpu((768, 768), "gram")
    # On a CPU they are near
    assert cost((768, 768), "svd") < 2 * cost((768, 768), "gram")
    assert on_gpu((64, 64), "gram") > 0.5 * on_gpu((256, 256), "gram")
    assert on_gpu((1024, 1024), "auto") == on_gpu((1024, 1024), "gram")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", ["auto", *METHODS[:5]])
def test_a_gpu_gives_the_same_polar_factor_without_synchronising(method):
    a = torch.randn(4, 512, 128, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = polar(a, method=method, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for u, matrix in zip(found.U.cpu(), a.cpu(), strict=True):
        assert direction_error(u, exact(matrix)) <= 1e-5


def test_a_gram_matrix_survives_its_decomposition():
    S = gram_matrix(gaussian(300, 200))
    kept = S.clone()
    root = inverse_sqrt(S)
    assert torch.equal(S, kept)
    torch.testing.assert_close(root.X @ S @ root.X, torch.eye(200, dtype=torch.float64), rtol=0, atol=1e-10)
    batch = torch.stack([S, 2 * S])
    torch.testing.assert_close(inverse_sqrt(batch).X[1], root.X / 2**0.5)


def test_parameters_that_require_gradients_can_be_decomposed_and_updated():
    a = torch.nn.Parameter(gaussian(40, 8).float())
    U = polar(a).U
    assert not U.requires_grad
    root = inverse_sqrt(gram_matrix(a.detach().clone()))
    before = a.detach().clone()
    apply_rows(before, root.X, out=a, scale=-1.0)
    torch.testing.assert_close(a.detach(), before - U)
