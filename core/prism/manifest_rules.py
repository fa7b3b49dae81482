"""Which values a manifest can have: the rules of prism.json beyond names and types. Pure.

Knows bounds and what fields say of each other. Decision: bounds are wide (a share of the bytes may
exceed 1 by the sub-routers, a threshold may lie anywhere that logarithms of fp32 reach) but every
number has some, because whoever plans by these numbers must not meet one that no refactoring makes.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from prism.contract import MAX_LEVEL, MIN_LEVEL, SUB_EXPERT_CHOICES

if TYPE_CHECKING:
    from prism.manifest import Manifest, OperatingPoint

MAX_KNOTS: Final = 6
MAX_LOG_THETA: Final = 200.0  # log of a gate times an error, both fp32: from -103 to 89 each
MAX_SHARE: Final = 1.5  # sub-routers and means of the smallest slices are a third of the weights
MAX_COUNT: Final = 1 << 40  # of tokens, of experts
_ROUNDING: Final = 1e-3  # a divergence of nothing may come out just below 0

# Lists of one level's curve, by the list that says for which batch sizes they are; the others of
# its line have its length. The first line is counted, the second measured.
_CURVES: Final = {
    "batch": (
        *("bytes_share", "ride_along_bytes_share"),
        *("computed_share", "ride_along_computed_share"),
    ),
    "measured_batch": (
        *("measured_bytes_share", "measured_computed_share"),
        *("measured_loss_percent", "measured_loss_se"),
    ),
}
_OPTIONAL: Final = {"measured_kl": "measured_batch"}


def problems(m: "Manifest") -> list[str]:
    """What is wrong, each with its path; fields are of the right types."""
    found = [
        *_counts(m),
        *_thresholds(m),
        *_levels("$.knots", [knot.level for knot in m.knots], MAX_LEVEL - 1),
        *_levels("$.operating_points", list(m.levels), MAX_LEVEL),
    ]
    for i, point in enumerate(m.operating_points):
        found += _point(f"$.operating_points[{i}]", point)
    for level, curves in m.batch_curves.items():
        found += _curve(level, curves)
    return found


def _counts(m: "Manifest") -> Iterator[str]:
    if m.sub_experts not in SUB_EXPERT_CHOICES:
        yield f"$.sub_experts: {m.sub_experts} is not one of {SUB_EXPERT_CHOICES}"
    for name in ("num_experts", "experts_per_token"):
        if getattr(m, name) < 1:
            yield f"$.{name}: {getattr(m, name)} is not positive"
    if m.num_experts > MAX_COUNT:
        yield f"$.num_experts: {m.num_experts!s:.20} is more than any model has"
    elif m.experts_per_token > m.num_experts:
        yield f"$.experts_per_token: {m.experts_per_token} of {m.num_experts} experts"
    if not 0 <= m.calibration.tokens <= MAX_COUNT:
        yield f"$.calibration.tokens: {m.calibration.tokens!s:.20} is no count"
    if not m.layers:
        yield "$.layers: empty; a model without experts cannot be an artifact"
    if len(set(m.layers)) != len(m.layers):
        yield "$.layers: a module name occurs twice"


def _thresholds(m: "Manifest") -> Iterator[str]:
    if not 1 <= len(m.knots) <= MAX_KNOTS:
        yield f"$.knots: {len(m.knots)} knots, expected 1 to {MAX_KNOTS}"
    for i, knot in enumerate(m.knots):
        where = f"$.knots[{i}].log_theta"
        if len(knot.log_theta) != len(m.layers):
            yield f"{where}: {len(knot.log_theta)} values for {len(m.layers)} layers"
        yield from _within(where, knot.log_theta, -MAX_LOG_THETA, MAX_LOG_THETA)


def _levels(where: str, levels: list[int], highest: int) -> Iterator[str]:
    for i, level in enumerate(levels):
        if not MIN_LEVEL <= level <= highest:
            yield f"{where}[{i}].level: {level} is outside {MIN_LEVEL}-{highest}"
    if any(a <= b for a, b in pairwise(levels)):
        yield f"{where}: levels {levels} do not fall strictly from high to low"


def _point(where: str, point: "OperatingPoint") -> Iterator[str]:
    for name in ("own_share", "top1_agreement"):
        yield from _within(f"{where}.{name}", [getattr(point, name)], 0, 1)
    yield from _within(f"{where}.active_share", [point.active_share], 0, MAX_SHARE)
    for name in ("quality_loss_se", "kl_se", "top1_se"):
        yield from _within(f"{where}.{name}", [getattr(point, name)], 0, None)
    yield from _within(f"{where}.kl", [point.kl], -_ROUNDING, None)
    yield from _within(f"{where}.quality_loss_percent", [point.quality_loss_percent], -100, None)
    if point.perplexity <= 0:
        yield f"{where}.perplexity: {point.perplexity:g} is not positive"


def _curve(level: str, curves: dict[str, list[float]]) -> Iterator[str]:
    """One level of the batch curves; an empty one is fine."""
    where = f"$.batch_curves.{level}"
    if level not in map(str, range(MIN_LEVEL, MAX_LEVEL + 1)):
        yield f"{where}: {level!r:.40} is no level from {MIN_LEVEL} to {MAX_LEVEL}"
    keys = {name: by for by, names in _CURVES.items() for name in (by, *names)} | _OPTIONAL
    for name in curves:
        if name not in keys:
            yield f"{where}.{name}: unknown curve"
    for by, names in _CURVES.items():
        present = {name for name in curves if keys.get(name) == by}
        if not present:
            continue
        for name in (by, *names):
            if name not in present:
                yield f"{where}.{name}: missing"
        for name in sorted(present):
            if len(curves[name]) != len(curves.get(by, curves[name])):
                yield f"{where}.{name}: {len(curves[name])} values for {len(curves[by])} batches"
            yield from _values(f"{where}.{name}", name, curves[name])


def _values(where: str, name: str, values: list[float]) -> Iterator[str]:
    if name.endswith("batch"):
        yield from _within(where, values, 1, None)
        if any(a >= b for a, b in pairwise(values)) or any(value % 1 for value in values):
            yield f"{where}: batch sizes must be whole numbers that rise"
    elif name.endswith("share"):
        yield from _within(where, values, 0, MAX_SHARE)
    elif name.endswith("_kl"):
        yield from _within(where, values, -_ROUNDING, None)
    else:
        yield from _within(where, values, 0 if name.endswith("_se") else -100, None)


def _within(where: str, values: Sequence[float], low: float, high: float | None) -> Iterator[str]:
    """A problem where a value lies outside; only the first of a list is told."""
    for i, value in enumerate(values):
        if value < low or (high is not None and value > high):
            at = f"{where}[{i}]" if len(values) > 1 else where
            bound = f"outside {low:g} to {high:g}" if high is not None else f"below {low:g}"
            yield f"{at}: {value:.6g} is {bound}"
            return
