"""The root of a Gram matrix by products alone: as accurate as promised, and never a number read back."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polargrad_dist.errors import PolarError
from polargrad_dist.polar import (
    apply_rows,
    gram_matrix,
    homogenize,
    inverse_sqrt,
    polar,
    polar_express_coefficients,
)
from polargrad_dist.polar.root import root_schedule

from .spectra import exact, families, gaussian, generator, log_spaced, with_spectrum

# What makes a GPU wait, or a library that does.
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "eigh",
    "svd",
    "linalg_eigh",
    "linalg_svd",
    "_linalg_eigh",
    "_linalg_svd",
)


class OpCount(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def gradients(m: int, n: int) -> dict[str, torch.Tensor]:
    zero_rows = gaussian(m, n, 7)
    zero_rows[torch.rand(m, generator=generator(8)) < 0.7] = 0
    few = torch.zeros(m, n, dtype=torch.float64)
    few[: n // 2] = gaussian(n // 2, n, 9)
    zipf = gaussian(m, n, 10) / torch.arange(1, m + 1)[:, None]
    more = {"zero rows": zero_rows, "fewer rows than columns": few, "Zipf rows": zipf}
    return families(m, n) | {name: a.float() for name, a in more.items()}


CASES = gradients(1024, 256)


@pytest.mark.parametrize("case", CASES)
def test_products_meet_every_demand_on_accuracy(case):
    a = CASES[case]
    U, V, sigma = exact(a)
    found = inverse_sqrt(gram_matrix(a), root="products")
    assert abs(found.nuclear_norm / sigma.sum() - 1) <= 1e-6
    product = a.double() @ found.X
    matters = sigma > 1e-3 * sigma[0]
    assert ((product - U) @ V[:, matters]).norm(dim=0).max() <= 1e-9
    assert torch.linalg.svdvals(product).max() <= 1 + 1e-6
    assert torch.equal(found.X, found.X.mT)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3072, 768), (2048, 1024)])
def test_products_meet_them_at_the_sizes_of_the_models(shape):
    for case in ("condition 1e4", "condition 1e6", "rank n/4"):
        a = families(*shape)[case]
        U, V, sigma = exact(a)
        found = inverse_sqrt(gram_matrix(a), root="products")
        product = a.double() @ found.X
        assert abs(found.nuclear_norm / sigma.sum() - 1) <= 1e-6
        assert ((product - U) @ V[:, sigma > 1e-3 * sigma[0]]).norm(dim=0).max() <= 1e-9
        assert torch.linalg.svdvals(product).max() <= 1 + 1e-6


def test_small_directions_are_damped_in_proportion_not_cut():
    sigma = torch.cat([torch.ones(40), 10.0 ** -torch.arange(1, 9)]).double()
    a = with_spectrum(200, sigma)
    _, V, _ = exact(a)
    gains = ((a @ inverse_sqrt(gram_matrix(a), root="products").X) @ V).norm(dim=0)[40:]
    # Down to lower/10 = 1e-5
    assert (gains[:5] - 1).abs().max() <= 3e-6
    # 1e-6
    assert 0.3 < gains[5] < 0.7
    # 1e-7
    assert 0.03 < gains[6] < 0.07
    # 1e-8
    assert gains[7] < 0.01
    cut = ((a @ inverse_sqrt(gram_matrix(a), root="eigh").X) @ V).norm(dim=0)[40:]
    # The eigendecomposition cuts at lower = 1e-4
    assert cut[4:].max() <= 1e-6


def test_a_batch_is_decomposed_as_its_matrices_are_and_a_zero_gives_zeros():
    a = torch.stack(
        [log_spaced(60, 24, 1e3), torch.zeros(60, 24, dtype=torch.float64), 1e-6 * gaussian(60, 24)]
    )
    batch = inverse_sqrt(gram_matrix(a), root="products")
    for k in (0, 2):
        alone = inverse_sqrt(gram_matrix(a[k]), root="products")
        torch.testing.assert_close(batch.X[k], alone.X, rtol=1e-9, atol=0)
        torch.testing.assert_close(batch.nuclear_norm[k], alone.nuclear_norm)
    assert batch.X[1].count_nonzero() == 0
    assert [float(x[1]) for x in batch[1:4]] == [0.0, 0.0, 0.0]
    assert float(batch.residual[1]) == 1.0
    assert batch.residual[[0, 2]].max() < 1e-8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 5)])
def test_a_non_finite_gram_matrix_becomes_nan_alone(bad, place):
    S = gram_matrix(gaussian(60, 24)).expand(3, 24, 24).clone()
    S[1, place[0], place[1]] = S[1, place[1], place[0]] = bad
    found = inverse_sqrt(S, root="products")
    assert found.X[1].isnan().all()
    for numbers in (found.nuclear_norm, found.sigma_max, found.sigma_min):
        assert numbers.isnan().tolist() == [False, True, False]
    assert found.X[[0, 2]].isfinite().all()


def test_a_number_has_a_root_too():
    found = inverse_sqrt(torch.full((2, 1, 1), 4.0, dtype=torch.float64), root="products")
    torch.testing.assert_close(found.X, torch.full((2, 1, 1), 0.5, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        found.nuclear_norm, torch.full((2,), 2.0, dtype=torch.float64), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("size", [1e-140, 1e-20, 1e140])
def test_the_scale_of_a_gram_matrix_does_not_matter(size):
    S = gram_matrix(log_spaced(60, 24, 1e2))
    plain, scaled = inverse_sqrt(S, root="products"), inverse_sqrt(S * size * size, root="products")
    torch.testing.assert_close(scaled.X * size, plain.X, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled.nuclear_norm / size, plain.nuclear_norm)


@pytest.mark.parametrize("case", CASES)
def test_extreme_singular_values_are_near_and_never_outside_the_spectrum(case):
    sigma = exact(CASES[case]).sigma
    found = inverse_sqrt(gram_matrix(CASES[case]), root="products")
    assert 0.95 * sigma[0] <= found.sigma_max <= sigma[0] * (1 + 1e-9)
    if sigma[-1] > 1e-5 * sigma[0]:
        assert sigma[-1] * (1 - 1e-6) <= found.sigma_min <= 2 * sigma[-1]
    else:
        assert found.sigma_min <= 2e-5 * sigma[0]


def test_the_count_of_products_is_fixed_and_nothing_is_read_back():
    counts = []
    for a in (gaussian(80, 32), log_spaced(80, 32, 1e6), torch.zeros(80, 32, dtype=torch.float64)):
        S = gram_matrix(a).expand(3, 32, 32)
        with OpCount() as ops:
            inverse_sqrt(S, root="products")
        assert not set(WAITS) & set(ops.counts)
        counts.append(ops.counts)
    assert counts[0] == counts[1] == counts[2]
    # 4 a step, 2 in the first; power iterations for both ends together, their quotients, the residual.
    steps = len(root_schedule(1e-4))
    assert steps == 11
    assert counts[0]["bmm"] + counts[0].get("mm", 0) + counts[0]["baddbmm"] <= 4 * steps - 2 + 8 + 2


@pytest.mark.parametrize("shape", [(128, 32), (3, 128, 32), (48, 32), (20, 64)])
def test_polar_by_products_reads_nothing_back(shape):
    a = torch.randn(shape, generator=generator(0))
    with OpCount() as ops:
        found = polar(a, root="products", check=False, info=True)
    assert not set(WAITS) & set(ops.counts)
    assert found.info.method == "gram"
    reference = polar(a, method="gram", root="eigh")
    torch.testing.assert_close(found.U, reference.U, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.nuclear_norm, reference.nuclear_norm, rtol=1e-6, atol=0)


def test_an_update_by_rows_reads_nothing_back():
    a, parameter = gaussian(300, 16).float(), torch.zeros(300, 16)
    with OpCount() as ops:
        root = inverse_sqrt(gram_matrix(a), root="products")
        apply_rows(a, root.X, out=parameter, scale=-0.1 * root.nuclear_norm)
    assert not set(WAITS) & set(ops.counts)
    assert float(parameter.abs().max()) > 0


def test_products_compile_as_one_graph():
    S = gram_matrix(gaussian(48, 16))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(S):
        return inverse_sqrt(S, root="products")[:2]

    X, nuclear_norm = run(S)
    expected = inverse_sqrt(S, root="products")
    torch.testing.assert_close(X, expected.X)
    torch.testing.assert_close(nuclear_norm, expected.nuclear_norm)


def test_a_schedule_has_no_step_more_than_its_interval_needs():
    assert [len(root_schedule(lower)) for lower in (1e-2, 1e-3, 1e-4, 1e-5, 1e-7, 0.0)] == [
        8,
        9,
        11,
        12,
        12,
        12,
    ]


def test_what_products_cannot_do_is_refused():
    S = gram_matrix(gaussian(20, 8))
    with pytest.raises(PolarError, match="homogenized"):
        inverse_sqrt(S, homogenized=True, root="products")
    with pytest.raises(PolarError, match="nope"):
        inverse_sqrt(S, root="nope")
    with pytest.raises(PolarError, match="only gram and auto use it"):
        polar(gaussian(8, 4), method="svd", root="products")
    assert homogenize(gaussian(20, 8)).Q.isfinite().all()


@pytest.mark.parametrize("method", ["gram", "qdwh", "zolo", "newton", "newton_schulz", "polar_express"])
def test_no_method_copies_numbers_to_the_device(method):
    # torch.tensor([...], device=…) ends in lift_fresh, and waits for a GPU
    with OpCount() as ops:
        polar(torch.empty(2, 48, 16, device="meta"), method=method, lower=3e-3, check=False, info=True)
    assert "lift_fresh" not in ops.counts


def test_coefficients_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        on_meta = polar_express_coefficients(3.21e-3, 6)
    assert on_meta == polar_express_coefficients(3.21e-3, 6)
    assert abs(sum(on_meta[-1]) - 1) < 1e-2


@pytest.mark.parametrize("device", ["meta"])
def test_another_device_than_a_cpu_takes_products_by_default(device):
    S = torch.empty(2, 8, 8, dtype=torch.float64, device=device)
    assert inverse_sqrt(S).sigma.shape == (2, 0)
    assert inverse_sqrt(S, homogenized=True).sigma.shape == (2, 8)
