"""The plan is a pure function: balanced, complete, and right about bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polargrad_dist.distributed.plan import Layout, Plan, chunk
from polargrad_dist.distributed.transport import pack_triangle, unpack_triangle
from polargrad_dist.errors import ConfigError


def group(shapes: dict, **rule) -> dict:
    base = {
        "lr": 0.1, "algorithm": "polar", "momentum": "momentum_first", "scale": "nuclear", "oracle": "svd", "steps": None,
        "nesterov": False, "row_sharded": None, "split_sizes": None, "num_heads": None, "flatten": False, "role": "hidden",
    }  # fmt: skip
    params = [torch.empty(shape, device="meta") for shape in shapes.values()]
    return base | {"params": params, "param_names": list(shapes)} | rule


@given(length=st.integers(0, 200), parts=st.integers(1, 9))
def test_chunks_cover_the_rows_as_torch_cuts_them(length, parts):
    ranges = [chunk(length, parts, i) for i in range(parts)]
    sizes = [last - first for first, last in ranges]
    assert sizes[: len(torch.empty(length).chunk(parts))] == [
        len(c) for c in torch.empty(length).chunk(parts)
    ]
    assert sum(sizes) == length


@given(st.integers(1, 40))
def test_a_packed_triangle_unpacks_to_the_same_matrix(n):
    a = torch.randn(n, n, dtype=torch.float64)
    s = a + a.T
    packed = pack_triangle(s)
    assert packed.numel() == n * (n + 1) // 2
    assert torch.equal(unpack_triangle(packed, n), s)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=40), st.integers(1, 16)
)
def test_every_matrix_has_one_owner_and_loads_add_up(shapes, world):
    plan = Plan.build([group({f"p{i}": s for i, s in enumerate(shapes)}, row_sharded=False)], replicas=world)
    assert all(0 <= e.owner < world for e in plan.entries)
    for rank in range(world):
        assert plan.loads[rank] == pytest.approx(sum(e.cost for e in plan.entries if e.owner == rank))
    # Longest first: a rank with several matrices took its last when it was the least loaded, and after the W longest.
    costs = sorted((e.cost for e in plan.entries), reverse=True)
    mean = sum(costs) / world
    several = mean + (1 - 1 / world) * costs[world] if len(costs) > world else 0.0
    assert max(plan.loads) <= max(costs[0], several) * (1 + 1e-9)


def test_many_alike_matrices_are_balanced_within_a_tenth():
    shapes = {}
    for layer in range(48):
        shapes |= {
            f"{layer}.q": (64, 64),
            f"{layer}.k": (16, 64),
            f"{layer}.up": (256, 64),
            f"{layer}.down": (64, 256),
        }
    for world in (8, 16, 32):
        assert Plan.build([group(shapes)], replicas=world).imbalance <= 1.1


def test_memory_adds_up_over_ranks_to_one_copy_of_each_momentum():
    shapes = {"a": (10, 6), "b": (7, 6), "tall": (101, 6)}
    total = sum(torch.Size(s).numel() for s in shapes.values())
    for replicas, shards in ((1, 1), (4, 1), (1, 4), (2, 2), (3, 2)):
        plan = Plan.build([group(shapes, oracle="auto")], replicas=replicas, shards=shards)
        rows = plan.memory()
        assert sum(row["optimizer"] for row in rows) == 4 * total
        assert sum(row["parameters"] for row in rows) == 4 * total * replicas


def test_tall_matrices_are_row_sharded_by_shape_or_role_and_only_for_gram_oracles():
    def kind(shape, **rule):
        return Plan.build([group({"p": shape}, **({"oracle": "auto"} | rule))]).entries[0].kind

    assert kind((80, 10)) == "rows"
    assert kind((79, 10)) == "owner"
    assert kind((79, 10), role="embed") == "rows"
    assert kind((80, 10), oracle="qdwh") == "owner"
    assert kind((10, 80)) == "owner"
    assert kind((80, 10), row_sharded=False) == "owner"
    assert kind((80, 10), algorithm="adamw") == "everywhere"


def test_layouts_cut_fused_parameters_into_their_matrices():
    x = torch.arange(24.0).view(6, 4)
    views = list(Layout.of("p", (6, 4), (2, 2, 2), None, False).views(x.view(1, -1)))
    assert [v.shape for v in views] == [(1, 1, 3, 2, 4)]
    views = list(Layout.of("p", (6, 4), (4, 2), None, False).views(x.view(1, -1)))
    assert [v.shape for v in views] == [(1, 1, 1, 4, 4), (1, 1, 1, 2, 4)]
    assert torch.equal(views[1][0, 0, 0], x[4:])
    assert Layout.of("p", (3, 4, 5), None, None, False).matrices == 3
    assert Layout.of("p", (3, 4, 5), None, None, True).cols == 20
    with pytest.raises(ConfigError, match="algorithm 'adamw'"):
        Layout.of("p", (0, 4), None, None, False)


def test_the_table_shows_owner_and_balance():
    table = Plan.build([group({"weight": (8, 8), "tall": (800, 8)}, oracle="auto")], replicas=2).table()
    assert "weight" in table
    assert "rows/" in table
    assert "max/mean over 2 ranks" in table
