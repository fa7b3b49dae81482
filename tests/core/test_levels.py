"""Levels: parsing, thresholds between and beyond knots, quality between measured points."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prism.artifact import Knot, OperatingPoint
from prism.levels import interpolate, log_theta_at, nearest_knot, parse_levels

KNOTS = (Knot(75, (-4.0, -3.0)), Knot(50, (-2.0, -1.0)), Knot(25, (-1.0, 0.5)))
POINTS = (
    OperatingPoint(100, 1.0, 1.0, 28.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    OperatingPoint(50, 0.5, 0.52, 28.7, 0.5, 0.1, 0.01, 0.001, 0.96, 0.002),
)


def test_levels_parse_from_high_to_low_each_once() -> None:
    assert parse_levels("50, 100,75,50") == (100, 75, 50)


@pytest.mark.parametrize("text", ["", "9", "101", "50,x", "75;50", "50.5"])
def test_bad_levels_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected integers 10-100"):
        parse_levels(text)


def test_bad_levels_are_all_named() -> None:
    with pytest.raises(ValueError, match="levels 5, abc in"):
        parse_levels("5,50,abc")


def test_theta_is_exact_at_knots() -> None:
    assert log_theta_at(KNOTS, 50) == pytest.approx((-2.0, -1.0))
    assert log_theta_at(KNOTS, 75) == pytest.approx((-4.0, -3.0))


def test_theta_stays_below_the_lowest_knot() -> None:
    assert log_theta_at(KNOTS, 10) == KNOTS[-1].log_theta


def test_full_level_drops_nothing() -> None:
    assert log_theta_at(KNOTS, 100) == (-inf, -inf)
    assert log_theta_at(KNOTS[:1], 90) == (-inf, -inf)


@given(st.integers(10, 99))
def test_theta_never_rises_with_the_level(level: int) -> None:
    here, above = log_theta_at(KNOTS, level), log_theta_at(KNOTS, level + 1)
    assert all(a >= b for a, b in zip(here, above, strict=True))


@pytest.mark.parametrize("level", [95, 70, 61])
def test_theta_between_and_above_knots_is_right_for_normal_scores(level: int) -> None:
    from statistics import NormalDist

    scores = NormalDist(-2.0, 1.5)
    knots = [Knot(x, (scores.inv_cdf(1 - x / 100),)) for x in (80, 60)]
    (theta,) = log_theta_at(knots, level)
    assert 1 - scores.cdf(theta) == pytest.approx(level / 100)


def test_level_outside_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match="level 9 is outside 10-100"):
        log_theta_at(KNOTS, 9)


@pytest.mark.parametrize(("level", "knot"), [(100, 0), (75, 0), (63, 0), (62, 1), (40, 1), (10, 2)])
def test_nearest_knot_serves(level: int, knot: int) -> None:
    assert nearest_knot(KNOTS, level) == knot


def test_quality_between_points_is_linear_and_measured_at_points() -> None:
    assert interpolate(POINTS, 50) is POINTS[1]
    middle = interpolate(POINTS, 75)
    assert middle == replace(
        middle, level=75, own_share=0.75, active_share=pytest.approx(0.76), kl=0.005
    )
    assert middle.quality_loss_percent == pytest.approx(0.25)


def test_quality_is_not_guessed_outside_the_measured_range() -> None:
    with pytest.raises(ValueError, match="outside the measured levels"):
        interpolate(POINTS, 40)
