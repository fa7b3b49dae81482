"""Levels stay inside the bounds, are as high as the targets allow, and no lower."""

import math

import pytest
from prism_serving.control import Bounds, Slo
from prism_serving.engine.costs import CostModel, Curve, flat_model
from prism_serving.engine.policy import (
    AIM_TTFT,
    MIN_CHUNK,
    Ahead,
    Waiting,
    Wish,
    allowed_prefill_levels,
    decode_level,
    decode_levels,
    prefill_level,
    prefill_room,
)

# 0.2 ms per token at level 100, a quarter of that at 25; no overhead.
COSTS = flat_model(2e-4, 0.0, (75, 50, 25))
ALL = Bounds(1, 25, 100)


def level(queue, aim_ms=80, bounds=ALL, ahead=None, costs=COSTS):
    """The level for the head when the policy aims at `aim_ms`; None: no target."""
    target = None if aim_ms is None else math.ceil(aim_ms / AIM_TTFT)
    return prefill_level(queue, ahead or Ahead(), bounds, Slo(target, None), costs)


@pytest.mark.parametrize(
    "floor, ceiling, allowed",
    [(25, 100, (100, 75, 50, 25)), (30, 80, (75, 50)), (60, 60, (60,)), (10, 20, (20,))],
)
def test_prefill_levels_stay_inside_the_bounds(floor, ceiling, allowed):
    assert allowed_prefill_levels(Bounds(1, floor, ceiling)) == allowed


def test_without_a_target_the_ceiling_is_served():
    assert level([Waiting(9.0, 450)], aim_ms=None) == 100


def test_a_lone_request_that_fits_gets_the_best_level():
    assert level([Waiting(0.0, 400)]) == 100  # 80 ms of work


def test_the_level_falls_with_the_time_already_waited():
    got = [level([Waiting(w, 400)]) for w in (0.0, 0.018, 0.038, 0.058)]
    assert got == [100, 75, 50, 25]


def test_the_head_lowers_its_level_for_those_behind_it():
    queue = [Waiting(0.0, 100)] * 5
    assert level(queue[:1]) == 100
    assert level(queue) == 75  # five times 20 ms do not fit into 80 ms, five times 15 do


def test_who_is_late_anyway_does_not_force_the_others_down():
    assert level([Waiting(0.5, 100), Waiting(0.0, 100)]) == 100


def test_a_queue_of_late_requests_is_worked_off_at_the_lowest_level():
    assert level([Waiting(0.5, 100)] * 20) == 25


def test_work_already_admitted_and_decode_count_as_delay():
    assert level([Waiting(0.0, 400)], ahead=Ahead(work_s=0.03)) == 50
    assert level([Waiting(0.0, 400)], ahead=Ahead(drag_s=0.03)) == 50


def test_an_impossible_target_gives_the_lowest_level_inside_the_bounds():
    assert level([Waiting(0.0, 4000)], aim_ms=1) == 25
    assert level([Waiting(0.0, 4000)], aim_ms=1, bounds=Bounds(1, 50, 100)) == 50


def test_wishes_are_kept():
    assert level([Waiting(0.0, 4000, Wish(pinned=90))], aim_ms=1) == 90
    assert level([Waiting(0.0, 4000, Wish(min_level=70))], aim_ms=1) == 70


def test_levels_that_save_nothing_are_not_used():
    flat = CostModel({x: Curve((1, 500), (0.01, 0.5)) for x in (100, 75, 50, 25)})
    assert level([Waiting(0.0, 4000)], aim_ms=1, costs=flat) == 100


def test_decode_takes_the_highest_level_that_meets_the_target():
    batch = [(Wish(), 100)] * 10  # 2 ms at level 100
    got = [decode_level(batch, ALL, Slo(None, ms), COSTS, 0) for ms in (3, 2, 1)]
    assert got == [100, 80, 40]


def test_decode_levels_are_the_bounds_and_the_steps_between():
    assert decode_levels(Bounds(1, 42, 53)) == (53, 50, 45, 42)
    assert decode_levels(Bounds(1, 60, 60)) == (60,)


def test_without_an_itl_target_or_batch_decode_runs_at_the_ceiling():
    assert decode_level([(Wish(), 1)], ALL, Slo(), COSTS, 0) == 100
    assert decode_level([], ALL, Slo(None, 1), COSTS, 0) == 100


def test_prompt_rows_shrink_to_keep_the_gap_and_never_below_the_minimum():
    batch = [(Wish(), 100)] * 10
    room = [prefill_room(batch, 100, 100, 512, Slo(None, ms), COSTS) for ms in (1000, 50, 1)]
    assert room[0] == 512
    assert MIN_CHUNK < room[1] < 512
    assert room[2] == MIN_CHUNK
    assert prefill_room([], 100, 100, 512, Slo(None, 1), COSTS) == 512
