"""The plan is a pure function: balanced, complete, and right about bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polargrad_dist.distributed.layout import Layout, Split, chunk, laid_out, overlap, volume
from polargrad_dist.distributed.schedule import in_order
from polargrad_dist.distributed.transport import pack_triangle, unpack_triangle
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import plan_for
from polargrad_dist.optim.groups import DEFAULTS


def group(shapes: dict, **rule) -> dict:
    base = DEFAULTS | {"lr": 0.1, "momentum": "momentum_first", "oracle": "svd", "role": "hidden"}
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
    plan = plan_for([group({f"p{i}": s for i, s in enumerate(shapes)}, row_sharded=False)], replicas=world)
    owner = {e.name: e.ranks[e.owners[0]] for e in plan.entries}
    assert all(0 <= rank < world for rank in owner.values())
    for rank in range(world):
        mine = sum(e.cost for e in plan.entries if owner[e.name] == rank)
        assert plan.loads.get(rank, 0.0) == pytest.approx(mine)
    # Longest first: a rank with several matrices took its last when it was the least loaded, and after the W longest.
    costs = sorted((e.cost for e in plan.entries), reverse=True)
    mean = sum(costs) / world
    several = mean + (1 - 1 / world) * costs[world] if len(costs) > world else 0.0
    assert max(plan.loads.values()) <= max(costs[0], several) * (1 + 1e-9)


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
        assert plan_for([group(shapes)], replicas=world).imbalance <= 1.1


def test_memory_adds_up_over_ranks_to_one_copy_of_each_momentum():
    shapes = {"a": (10, 6), "b": (7, 6), "tall": (101, 6)}
    total = sum(torch.Size(s).numel() for s in shapes.values())
    for replicas, shards in ((1, 1), (4, 1), (1, 4), (2, 2), (3, 2)):
        plan = plan_for([group(shapes, oracle="auto")], replicas=replicas, shards=shards)
        rows = plan.memory()
        assert sum(row["optimizer"] for row in rows) == 4 * total
        assert sum(row["parameters"] for row in rows) == 4 * total * replicas


def test_tall_matrices_are_row_sharded_by_shape_or_role_and_only_for_gram_oracles():
    def kind(shape, **rule):
        return plan_for([group({"p": shape}, **({"oracle": "auto"} | rule))]).entries[0].kind

    assert kind((80, 10)) == "tall"
    assert kind((79, 10)) == "owner"
    assert kind((79, 10), role="embed") == "tall"
    assert kind((80, 10), oracle="qdwh") == "owner"
    assert kind((10, 80)) == "owner"
    assert kind((80, 10), row_sharded=False) == "owner"
    assert kind((80, 10), algorithm="adamw") == "elementwise"


def test_splits_cut_fused_parameters_into_their_matrices():
    assert Split.of("p", (6, 4), (2, 2, 2)).runs == ((0, 3, 2),)
    fused = Split.of("p", (6, 4), (4, 2))
    assert [fused.stored_shape(i) for i in range(2)] == [(4, 4), (2, 4)]
    assert fused.matrices[1] == ((0, 1), (4, 6), (0, 4))
    columns = Split.of("p", (6, 4), (1, 3), transposed=True)
    assert [columns.stored_shape(i) for i in range(2)] == [(6, 1), (6, 3)]
    assert len(Split.of("p", (3, 4, 5)).matrices) == 3
    assert Split.of("p", (3, 4, 5), flatten=True).cols == 20
    with pytest.raises(ConfigError, match="algorithm 'adamw'"):
        Split.of("p", (0, 4))
    with pytest.raises(ConfigError, match=r"split_sizes \(1, 2\), which add up to 3, expected its 4 columns"):
        Split.of("p", (6, 4), (1, 2), transposed=True)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    st.lists(st.tuples(st.integers(2, 4), st.sampled_from([0, 1, None])), max_size=3),
)
def test_shards_cover_a_tensor_once_and_lie_within_what_is_stored(shape, dims):
    dims.sort(key=lambda dim: dim[1] is None)
    sizes, cuts = tuple(size for size, _ in dims), tuple(cut for _, cut in dims)
    layout = laid_out(shape, sizes, cuts, (0, 1, 2))
    seen = torch.zeros(shape, dtype=torch.int32)
    for stored, shard in zip(layout.stored, layout.shards, strict=True):
        assert overlap(shard, stored) == tuple((0, last - first) for first, last in shard)
        seen[tuple(slice(*cut) for cut in shard)] += 1
    assert (seen == 1).all()
    assert all(
        layout.gathered(place) >= volume(layout.stored[place]) * (layout.copies > 1)
        for place in range(layout.world)
    )


def test_copies_are_cut_along_the_dimension_that_divides_best():
    assert laid_out((8, 3), (4,), (None,), (0, 1)).cut == 0
    assert laid_out((3, 8), (4,), (None,), (0, 1)).cut == 1
    assert laid_out((3, 8), (4,), (None,), ()).cut is None
    assert Layout((8, 3), (2,), (0,)).gathered(0) == 0


def test_the_order_starts_and_awaits_on_a_shared_group_alike_whoever_skips_a_bucket():
    # Three buckets of three stages; a rank without the middle one still starts the last only after the first's second stage.
    order = in_order([3, 3, 3])
    assert sorted(order) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    without = [number for number in order if number != 1]
    assert without == [number for number in in_order([3, 3, 3]) if number != 1]
    # What a rank that does not know of it would run
    assert without != [2 * number for number in in_order([3, 3])]


def test_large_models_are_balanced_and_gather_what_they_hold_and_no_more():
    layer = {
        "q": (4096, 4096),
        "k": (1024, 4096),
        "up": (14336, 4096),
        "down": (4096, 14336),
        "experts": (8, 1536, 2048),
    }
    shapes = {f"{i}.{name}": shape for i in range(32) for name, shape in layer.items()}
    for world, shards in ((8, 1), (8, 8), (64, 1), (64, 8), (512, 1)):
        plan = plan_for([group(shapes, oracle="newton_schulz")], replicas=world // shards, shards=shards)
        stored = sum(e.bytes for e in plan.entries) / shards
        assert plan.traffic().get("all_gather", 0) <= 1.05 * stored
        assert plan.imbalance <= 1.1 or sum(len(e.costs) for e in plan.entries) < 4 * world


def test_the_table_shows_owner_and_balance():
    table = plan_for([group({"weight": (8, 8), "tall": (800, 8)}, oracle="auto")], replicas=2).table()
    assert "weight" in table
    assert "rows/" in table
    assert "max/mean over 2 ranks" in table
