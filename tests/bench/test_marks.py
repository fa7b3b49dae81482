"""Marks over figures that were not measured here: which hold, which miss, which are not judged."""

import math
from collections.abc import Sequence

import pytest
from prism.artifact import OperatingPoint
from prism_refactor.served import ServedPoint

from bench.baselines import marks
from bench.baselines.compared import Row, Step
from bench.baselines.cutting import Cutting
from bench.baselines.marks import Mark, cutting, non_dominated, quality, range_of_levels, served


def row(method: str, share: float, loss: float, own: float | None = None) -> Row:
    return Row(method, share, own or share, share + 0.01, loss, 0.05, 0.0, 1.0)


OURS = [
    *(row("ours", 1.0, 0.0), row("ours", 0.75, 0.1), row("ours", 0.5, 0.5)),
    *(row("ours", 0.4, 0.9, own=0.412), row("ours", 0.25, 2.0, own=0.259)),
    *(row("ours", 0.15, 6.0, own=0.158), row("ours", 0.1, 9.0, own=0.12)),
]
TOP_K = [row("lower top-k", s, loss) for s, loss in ((0.75, 0.4), (0.5, 3.0), (0.25, 20.0))]
WITH_MEANS = [row("skip, with means", 0.5, 2.0), row("skip, with means", 0.25, 25.0)]


def named(found: Sequence[Mark], part: str) -> Mark:
    (mark,) = [mark for mark in found if part in mark.what]
    return mark


@pytest.mark.parametrize(
    ("points", "count"),
    [
        ([], 0),
        ([(1.0, 0.0), (0.5, 1.0), (0.25, 3.0)], 3),
        ([(1.0, 0.0), (0.5, 1.0), (0.6, 1.5)], 2),
        ([(1.0, 0.0), (0.9, -0.1)], 1),
        ([(0.5, 1.0), (0.5, 1.0)], 2),
    ],
)
def test_non_dominated(points: list[tuple[float, float]], count: int) -> None:
    assert non_dominated(points) == count


@pytest.mark.parametrize(
    ("mark", "holds", "text"),
    [
        (Mark("x", 1.0, 1.0), True, "ok     x: 1 (mark <= 1)"),
        (Mark("x", 2.0, 1.0, note="of y"), False, "MISSED x: 2 (mark <= 1); of y"),
        (Mark("x", 2.0, 3.0, at_most=False), False, "MISSED x: 2 (mark >= 3)"),
        (Mark("x", math.inf, 1.0), False, "MISSED x: inf (mark <= 1)"),
        (Mark("x", None, 1.0, note="no y"), False, "not judged: x (mark <= 1): no y"),
    ],
)
def test_a_mark_says_by_how_much_and_why_not(mark: Mark, holds: bool, text: str) -> None:
    assert (mark.holds, str(mark)) == (holds, text)


def test_the_best_of_all_rivals_counts_and_those_as_published_stand_beside_it() -> None:
    """0.5 % beside 2.0 % with our means misses 1/5; beside 3.0 % as published it would not."""
    found = named(quality(OURS, TOP_K + WITH_MEANS, "default"), "at 50 %: loss over")
    assert found.figure == pytest.approx(0.25)
    assert not found.holds
    assert found.what.endswith("skip, with means (2.00 %)")
    assert found.note == "over the best as published, lower top-k (3.00 %): 0.167"
    assert str(found).startswith("MISSED")


def test_where_the_published_rival_is_the_best_it_is_both() -> None:
    found = named(quality(OURS, TOP_K + WITH_MEANS, "default"), "at 25 %: loss over")
    assert (found.figure, found.holds) == (pytest.approx(0.1), True)
    assert "lower top-k (20.00 %)" in found.what
    assert "lower top-k (20.00 %): 0.1" in found.note


def test_limits_of_both_kinds() -> None:
    assert named(quality(OURS, [], "default"), "at 50 %: loss in %").holds
    auto = quality(OURS, TOP_K, "auto")
    assert not named(auto, "at 50 %: loss in %").holds
    assert not any("loss over" in mark.what for mark in auto)


@pytest.mark.parametrize(
    ("rivals", "note"),
    [
        ([], "no rival was measured there"),
        ([row("lower top-k", 0.625, 1.0)], "no rival was measured there"),
        ([row("lower top-k", 0.5, -0.01)], "loses nothing that could be divided by"),
    ],
)
def test_without_a_rival_the_comparison_is_listed_and_not_judged(
    rivals: list[Row], note: str
) -> None:
    found = named(quality(OURS, rivals, "default"), "at 50 %: loss over")
    assert found.figure is None
    assert not found.holds
    assert note in found.note


def test_an_artifact_that_was_not_measured_keeps_its_marks() -> None:
    found = quality([], TOP_K, "auto")
    assert len(found) == 4
    assert all(mark.figure is None and not mark.holds for mark in found)


def test_own_share_is_judged_at_the_worst_level_and_low_ones_apart() -> None:
    found = quality(OURS, TOP_K, "default")
    upper = found[-2]
    assert upper.figure == pytest.approx(1.2)
    assert (upper.holds, upper.note) == (False, "the worst of 4 levels, at 40")
    lower = named(found, "below 25")
    assert lower.figure == pytest.approx(2.0)
    assert (lower.holds, lower.note) == (False, "the worst of 2 levels, at 10")
    good = [r for r in OURS if r.asked not in (0.4, 0.1)]
    assert all(mark.holds for mark in quality(good, TOP_K, "default")[-2:])
    missing = quality(OURS[:-2], TOP_K, "default")[-1]
    assert missing.figure is None
    assert quality(OURS[:-2], TOP_K, "auto")[-1].note.endswith("at 40")


def test_levels_must_fall_in_order_and_give_enough_points() -> None:
    scan = [row("ours", 1 - 0.03 * i, 0.01 * i * i) for i in range(26)]
    points, order = range_of_levels(scan, [Step(1.0, 0.97, -0.01, 0.02)])
    assert (points.figure, points.holds, order.holds) == (26, True, True)
    assert not range_of_levels(scan, [Step(1.0, 0.97, -0.05, 0.02)])[1].holds
    few, unknown = range_of_levels(scan[:9], [])
    assert not few.holds
    assert unknown.figure is None


def point(method: str, batch: int, read: float, loss: float, level: int | None) -> ServedPoint:
    quality = OperatingPoint(level or 100, 0.5, 0.5, 20.0, loss, 0.1, 0.0, 0.0, 1.0, 0.0)
    return ServedPoint(method, batch, level is not None, 0.7, read, quality, level)


SERVED = [
    point("level 50", 8, 0.70, 0.1, 50),
    point("level 47", 8, 0.68, 0.2, 47),
    point("level 30", 8, 0.50, 1.5, 30),
    point("shared, dropped", 8, 0.66, 1.6, None),
    point("shared, re-routed", 8, 0.69, 0.9, None),
    point("shared, re-routed", 8, 0.72, 0.1, None),  # four points more bytes: not equal
]


def test_served_marks_take_the_best_that_reads_no_more() -> None:
    found = [mark for mark in served(SERVED) if "batch 8, at most 68 %" in mark.what]
    assert [mark.figure for mark in found] == [0.2, pytest.approx(0.2 / 0.9)]
    assert [mark.holds for mark in found] == [True, False]
    assert found[1].what.endswith("shared, re-routed at 69 % (0.90 %)")
    assert found[1].note == "over the best as published, shared, dropped at 66 % (1.60 %): 0.125"


def test_a_bound_that_no_level_reaches_is_a_miss_and_one_not_tried_is_not_judged() -> None:
    found = served(SERVED)
    unreached = named(found, "batch 8, at most 43 % of the bytes: loss in")
    assert (unreached.figure, unreached.holds) == (math.inf, False)
    assert named(found, "43 % of the bytes: loss over").note == "no rival was measured there"
    untried = [mark for mark in found if mark.what.startswith("batch 32")]
    assert len(untried) == 4
    assert all(mark.figure is None for mark in untried)
    assert len(served([])) == 2 * len(marks.SERVED)
    assert not any(mark.holds for mark in served([]))


def test_partition_marks() -> None:
    kept, small, large, again = cutting(Cutting(4, 0.95, 0.84, {256: 0.3}, True))
    assert (kept.holds, again.holds) == (True, True)
    assert (small.figure, small.holds) == (0.3, False)
    assert large.note == "no expert of that size was cut"
    assert not cutting(Cutting(4, 0.94, 0.84, {}, False))[0].holds
    assert not cutting(Cutting(4, 0.94, 0.84, {}, False))[-1].holds
