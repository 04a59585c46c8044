"""The soak itself: a short one finds nothing, and what grows would be found."""

import pytest

from tests.soak import grown, soak


@pytest.mark.timeout(600)
def test_three_minutes_of_training_grow_nothing(tmp_path):
    assert soak(tmp_path / "run", 180.0) == []


@pytest.mark.parametrize(
    ("name", "start", "step"),
    [
        ("memory of rank 0, MiB", 400.0, 2.0),
        ("descriptors of rank 1", 30.0, 0.1),
        ("threads of rank 0", 12.0, 0.1),
        ("checkpoint folder, MiB", 24.0, 0.2),
    ],
)
def test_what_grows_is_named(name, start, step):
    assert [line.split(":")[0] for line in grown({name: [start + step * i for i in range(60)]})] == [name]
    assert grown({name: [start + i % 2 for i in range(60)]}) == []
    assert grown({"steps per second": [float(i) for i in range(60)]}) == []
