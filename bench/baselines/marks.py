"""What the refactoring has to show, as rules over measured figures. Pure.

Knows numbers alone. Two decisions worth arguing about: a mark is a figure with a limit and says by
how much it holds or misses; a table of ticks would hide the near misses. And a mark that a run
cannot judge stays in the list with the reason and does not hold, for a figure that is left out
reads like one that is fine.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prism_refactor.served import ServedPoint

from bench.baselines.compared import Row, Step
from bench.baselines.cutting import Cutting

SHARES = (0.75, 0.50, 0.25)
LOSS = {"default": (0.10, 0.55, 3.0), "auto": (0.06, 0.40, 2.2)}  # percent, at SHARES
OF_BASELINE = (1 / 2, 1 / 5, 1 / 6)  # of the best of lower top-k and adaptive skipping
OWN_SHARE_WITHIN = 1.0  # points
LOW_SHARE = 0.25  # levels below are told apart: a miss there is another matter than one above
POINTS = 20
SERVED = ((8, 0.68, 0.3), (8, 0.43, 2.0), (32, 0.71, 0.85), (32, 0.51, 3.0))  # batch, bytes, loss
OF_SHARED_EXPERTS = 1 / 5
STRENGTHENED = "with means"  # our own addition to published skippers
REROUTED = "re-routed"  # tokens choose again among the kept: our own, stronger, form
_NEAR_BYTES = 0.03  # whole experts come in steps
KEPT_MASS = 0.945
SECONDS_PER_EXPERT = {256: 0.2, 1024: 1.5}


@dataclass(frozen=True, slots=True)
class Mark:
    """One figure that has a limit. `note`: why there is no figure (the mark was not judged), or
    what else a reader should know, by which nothing fails."""

    what: str
    figure: float | None
    limit: float
    at_most: bool = True
    note: str = ""

    @property
    def holds(self) -> bool:
        if self.figure is None:
            return False
        return self.figure <= self.limit if self.at_most else self.figure >= self.limit

    def __str__(self) -> str:
        limit = f"mark {'<=' if self.at_most else '>='} {self.limit:.3g}"
        if self.figure is None:
            return f"not judged: {self.what} ({limit}): {self.note}"
        note = f"; {self.note}" if self.note else ""
        verdict = "ok    " if self.holds else "MISSED"
        return f"{verdict} {self.what}: {self.figure:.3g} ({limit}){note}"


@dataclass(frozen=True, slots=True)
class Rival:
    """What somebody else's method loses, in percent."""

    name: str
    loss: float
    as_published: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.loss:.2f} %)"


def at(rows: Iterable[Row], share: float) -> Row | None:
    """The row that was asked for this share."""
    return next((row for row in rows if abs(row.asked - share) < 1e-6), None)


def quality(ours: Sequence[Row], baselines: Sequence[Row], kind: str) -> list[Mark]:
    """Loss at each share, against its limit and against the best baseline, and own shares.

    baselines: the rows of lower top-k and adaptive skipping; the default kind alone is compared.
    """
    name = ours[0].method if ours else f"ours, {kind}"
    marks = []
    for share, limit, ratio in zip(SHARES, LOSS[kind], OF_BASELINE, strict=True):
        row, there = at(ours, share), f"{name} at {100 * share:.0f} %"
        why = "" if row else "that level was not measured"
        loss = row.loss if row else None
        marks.append(Mark(f"{there}: loss in %", loss, limit, note=why))
        if kind == "default":
            rivals = [
                Rival(other.method, other.loss, not other.method.endswith(STRENGTHENED))
                for other in baselines
                if abs(other.asked - share) < 1e-6
            ]
            what = f"{there}: loss over that of the best of lower top-k and adaptive skipping"
            marks.append(_beside(what, loss, rivals, ratio))
    return [*marks, *_own_shares(name, ours, kind)]


def _beside(what: str, loss: float | None, rivals: Sequence[Rival], limit: float) -> Mark:
    """Loss over that of the best rival of all, and in the note over the best as published."""
    if loss is None:
        return Mark(what, None, limit, note="no level of ours was measured there")
    if not rivals:
        return Mark(what, None, limit, note="no rival was measured there")
    best = min(rivals, key=lambda rival: rival.loss)
    if best.loss <= 0:
        return Mark(what, None, limit, note=f"{best} loses nothing that could be divided by")
    published = [rival for rival in rivals if rival.as_published]
    note = "none was measured as published"
    if published:
        other = min(published, key=lambda rival: rival.loss)
        note = f"over the best as published, {other}: {loss / other.loss:.3g}"
    return Mark(f"{what}, {best}", loss / best.loss, limit, note=note)


def _own_shares(name: str, ours: Sequence[Row], kind: str) -> list[Mark]:
    """The worst of all measured levels; those below LOW_SHARE apart, which the default kind has."""
    what = f"{name}: own share off its level by points"
    upper = [row for row in ours if LOW_SHARE - 1e-6 <= row.asked < 1]
    lower = [row for row in ours if row.asked < LOW_SHARE - 1e-6]
    marks = [_worst(what, upper)]
    if lower or kind == "default":
        marks.append(_worst(f"{what}, below {100 * LOW_SHARE:.0f}", lower))
    return marks


def _worst(what: str, rows: Sequence[Row]) -> Mark:
    if not rows:
        return Mark(what, None, OWN_SHARE_WITHIN, note="no such level was measured")
    off, asked = max((100 * abs(row.own_share - row.asked), row.asked) for row in rows)
    levels = f"{len(rows)} levels" if len(rows) > 1 else "one level"
    return Mark(what, off, OWN_SHARE_WITHIN, note=f"the worst of {levels}, at {100 * asked:.0f}")


def non_dominated(points: Sequence[tuple[float, float]]) -> int:
    """How many (share, loss) points have no other with neither more share nor more loss."""
    return sum(
        not any(
            other != point and other[0] <= point[0] and other[1] <= point[1] for other in points
        )
        for point in points
    )


def range_of_levels(scan: Sequence[Row], scan_steps: Sequence[Step]) -> list[Mark]:
    """Number of operating points among the scanned levels, and whether loss falls with level."""
    count = non_dominated([(row.own_share, row.loss) for row in scan])
    points = "operating points that no other dominates"
    order = "a lower level loses less, by more than one standard error, by %"
    if not scan_steps:
        why = "no two neighbouring levels were measured"
        return [Mark(points, count, POINTS, False), Mark(order, None, 0.0, note=why)]
    worst = max(-step.difference - step.se for step in scan_steps)
    return [Mark(points, count, POINTS, False), Mark(order, max(0.0, worst), 0.0)]


def served_targets() -> dict[int, list[float]]:
    """Batch size -> shares of the bytes that have a mark."""
    found: dict[int, list[float]] = {}
    for batch, bytes_share, _ in SERVED:
        found.setdefault(batch, []).append(bytes_share)
    return found


def served(points: Sequence[ServedPoint]) -> list[Mark]:
    """Loss at most so much while reading at most so much, and beside whole experts shared."""
    marks = []
    for batch, bytes_share, limit in SERVED:
        here = [point for point in points if point.batch == batch]
        ours = [point for point in here if point.level is not None and point.ride_along]
        there = f"batch {batch}, at most {100 * bytes_share:.0f} % of the bytes"
        loss: float | None = min(
            (_loss(point) for point in ours if point.bytes_share <= bytes_share), default=math.inf
        )
        why = "" if ours else "decode batches were not measured"
        loss = loss if ours else None
        marks.append(Mark(f"{there}: loss in %", loss, limit, note=why))
        rivals = [
            Rival(f"{p.method} at {100 * p.bytes_share:.0f} %", _loss(p), _published(p))
            for p in here
            if p.level is None and abs(p.bytes_share - bytes_share) < _NEAR_BYTES
        ]
        what = f"{there}: loss over that of the best sharing of whole experts at equal bytes"
        marks.append(_beside(what, loss, rivals, OF_SHARED_EXPERTS))
    return marks


def _published(point: ServedPoint) -> bool:
    return not point.method.endswith(REROUTED)


def _loss(point: ServedPoint) -> float:
    return point.point.quality_loss_percent


def cutting(cut: Cutting) -> list[Mark]:
    """The partition alone."""
    marks = [Mark("partition: held-out mass kept at half", cut.kept_mass, KEPT_MASS, False)]
    marks += [_seconds(width, limit, cut.seconds) for width, limit in SECONDS_PER_EXPERT.items()]
    again = Mark("partition: the same twice (1: yes)", float(cut.is_deterministic), 1.0, False)
    return [*marks, again]


def _seconds(width: int, limit: float, seconds: Mapping[int, float]) -> Mark:
    what = f"partition: seconds for an expert of {width} neurons"
    known = seconds.get(width)
    return Mark(what, known, limit, note="no expert of that size was cut" if known is None else "")
