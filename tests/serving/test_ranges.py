"""Ranges never overlap, and everything comes back."""

import random

import pytest
from prism_serving.engine.ranges import RangePool


def test_ranges_are_disjoint_and_all_free_again_after_random_use():
    pool, draw, held = RangePool(1000), random.Random(0), {}
    for _ in range(2000):
        if held and draw.random() < 0.5:
            start = draw.choice(list(held))
            pool.release(start)
            del held[start]
        else:
            length = draw.randint(1, 120)
            start = pool.reserve(length)
            if start is None:
                assert not pool.can_reserve(length)
                continue
            assert all(start + length <= s or s + n <= start for s, n in held.items()), (
                "ranges overlap"
            )
            assert start >= 0 and start + length <= 1000
            held[start] = length
        assert pool.used == sum(held.values())
    for start in list(held):
        pool.release(start)
    assert pool.reserve(1000) == 0


def test_best_fit_leaves_the_large_hole_whole():
    pool = RangePool(100)
    small, keep = pool.reserve(10), pool.reserve(10)
    assert small == 0 and keep == 10
    pool.release(small)
    assert pool.reserve(10) == 0  # the hole of 10, not the 80 at the end
    assert pool.can_reserve(80)


@pytest.mark.parametrize("size", [0, -1])
def test_empty_pool_is_refused(size):
    with pytest.raises(ValueError, match="at least one token"):
        RangePool(size)


def test_releasing_what_is_not_held_is_a_bug():
    with pytest.raises(KeyError):
        RangePool(10).release(3)
