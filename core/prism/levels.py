"""Levels and what they stand for: thresholds between knots, quality between measured points. Pure.

Knows numbers only: no torch, no files. Decision: between two knots, and above the highest through
the two highest, log θ is linear in the normal quantile of the level, because the log scores of a
layer are close to normal, and θ must fall to minus infinity at 100; below the lowest knot it
stays, as nothing was calibrated there. What an interpolated level really gives is measured by
`prism eval`, never assumed.
"""

from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from math import inf
from statistics import NormalDist

from prism.contract import MAX_LEVEL, MIN_LEVEL
from prism.manifest import Knot, OperatingPoint

_NORMAL = NormalDist()


def check_level(level: int) -> int:
    """The level, or ValueError when it is outside MIN_LEVEL to MAX_LEVEL."""
    if not MIN_LEVEL <= level <= MAX_LEVEL:
        raise ValueError(f"level {level} is outside {MIN_LEVEL}-{MAX_LEVEL}")
    return level


def parse_levels(text: str) -> tuple[int, ...]:
    """Levels of a text such as "100,75,50": high to low, each once; ValueError names the bad."""
    levels, bad = set(), []
    for part in text.split(","):
        try:
            levels.add(check_level(int(part.strip())))
        except ValueError:
            bad.append(part.strip() or "(empty)")
    if bad:
        raise ValueError(
            f"levels {', '.join(bad)} in {text!r}: expected integers {MIN_LEVEL}-{MAX_LEVEL}, "
            "separated by commas"
        )
    return tuple(sorted(levels, reverse=True))


def log_theta_at(knots: Sequence[Knot], level: int) -> tuple[float, ...]:
    """log θ of each layer at an integer level; minus infinity (nothing dropped) at 100.

    `knots` from high to low level. With a single knot, levels above it drop nothing.
    """
    check_level(level)
    if level == MAX_LEVEL or (len(knots) == 1 and level > knots[0].level):
        return tuple(-inf for _ in knots[0].log_theta)
    if level > knots[0].level:
        return _through(knots[0], knots[1], level)
    for high, low in pairwise(knots):
        if low.level <= level:
            return _through(high, low, level)
    return knots[-1].log_theta


def _mix(high: Sequence[float], low: Sequence[float], share: float) -> tuple[float, ...]:
    return tuple(share * a + (1 - share) * b for a, b in zip(high, low, strict=True))


def _through(high: Knot, low: Knot, level: int) -> tuple[float, ...]:
    z, z_high, z_low = (_NORMAL.inv_cdf(1 - x / MAX_LEVEL) for x in (level, high.level, low.level))
    return _mix(high.log_theta, low.log_theta, (z - z_low) / (z_high - z_low))


def nearest_knot(knots: Sequence[Knot], level: int) -> int:
    """Index of the knot whose means and scalars serve this level; of two as near, the lower."""
    return min(range(len(knots)), key=lambda i: (abs(knots[i].level - level), -i))


def interpolate(points: Sequence[OperatingPoint], level: int) -> OperatingPoint:
    """Quality at a level, linear between its measured neighbours (`points` from high to low level).

    Raises ValueError outside the measured range: quality is not guessed.
    """
    check_level(level)
    for point in points:
        if point.level == level:
            return point
    for high, low in pairwise(points):
        if low.level < level < high.level:
            share = (level - low.level) / (high.level - low.level)
            names = [f.name for f in fields(OperatingPoint) if f.name != "level"]
            values = _mix(
                [getattr(high, n) for n in names], [getattr(low, n) for n in names], share
            )
            return OperatingPoint(level, *values)
    raise ValueError(f"level {level} lies outside the measured levels {[p.level for p in points]}")
