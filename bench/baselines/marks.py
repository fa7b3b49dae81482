"""What the refactoring has to show, as rules over measured figures. Pure.

Knows numbers alone. The decision worth arguing about: a mark is a figure with a limit and says by
how much it holds or misses; a table of ticks would hide the near misses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prism_refactor.served import ServedPoint

from bench.baselines.compared import Row, Step
from bench.baselines.cutting import Cutting

SHARES = (0.75, 0.50, 0.25)
LOSS = {"default": (0.10, 0.55, 3.0), "auto": (0.06, 0.40, 2.2)}  # percent, at SHARES
OF_BASELINE = (1 / 2, 1 / 5, 1 / 6)  # of the better of lower top-k and adaptive skipping
OWN_SHARE_WITHIN = 0.01
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
    """One figure that has a limit; `beyond`: harder than was asked, and nothing fails by it."""

    what: str
    figure: float
    limit: float
    at_most: bool = True
    beyond: bool = False

    @property
    def holds(self) -> bool:
        return self.figure <= self.limit if self.at_most else self.figure >= self.limit

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        verdict = "ok    " if self.holds else "beyond" if self.beyond else "MISSED"
        return f"{verdict} {self.what}: {self.figure:.3g} (mark {sign} {self.limit:.3g})"


def at(rows: Iterable[Row], share: float) -> Row:
    """The row that was asked for this share."""
    return next(row for row in rows if abs(row.asked - share) < 1e-6)


def quality(ours: Sequence[Row], baselines: Sequence[Row], kind: str) -> list[Mark]:
    """Loss at each share, against its limit and against the better baseline, and own shares.

    baselines: the rows of lower top-k and adaptive skipping.
    """
    marks = []
    for share, limit, ratio in zip(SHARES, LOSS[kind], OF_BASELINE, strict=True):
        row, name = at(ours, share), f"{ours[0].method} at {100 * share:.0f} %"
        marks.append(Mark(f"{name}: loss in %", row.loss, limit))
        off = 100 * abs(row.own_share - share)
        marks.append(Mark(f"{name}: own share off by points", off, 100 * OWN_SHARE_WITHIN))
        if kind == "default":
            here = [other for other in baselines if abs(other.asked - share) < 1e-6]
            published = [other for other in here if not other.method.endswith(STRENGTHENED)]
            strengthened = [other for other in here if other.method.endswith(STRENGTHENED)]
            marks += _beside(row.loss, name, published, ratio, beyond=False)
            marks += _beside(row.loss, name, strengthened, ratio, beyond=True)
    return marks


def _beside(
    loss: float, name: str, rivals: Sequence[Row], ratio: float, *, beyond: bool
) -> list[Mark]:
    """Loss over that of the best rival; nothing where there is none."""
    if not rivals:
        return []
    best = min(rivals, key=lambda other: other.loss)
    what = f"{name}: loss over that of {best.method} ({best.loss:.2f} %)"
    return [Mark(what, loss / best.loss, ratio, beyond=beyond)]


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
    worst = max((-step.difference - step.se for step in scan_steps), default=0.0)
    return [
        Mark("operating points that no other dominates", count, POINTS, at_most=False),
        Mark("a lower level loses less, beyond one standard error, by %", max(0.0, worst), 0.0),
    ]


def served_targets() -> dict[int, list[float]]:
    """Batch size -> shares of the bytes that have a mark."""
    found: dict[int, list[float]] = {}
    for batch, bytes_share, _ in SERVED:
        found.setdefault(batch, []).append(bytes_share)
    return found


def served(points: Sequence[ServedPoint]) -> list[Mark]:
    """Loss at most so much while reading at most so much, and beside whole experts shared."""
    marks = []
    for batch, bytes_share, loss in SERVED:
        ours = [p for p in points if p.level is not None and p.ride_along and p.batch == batch]
        what = f"batch {batch}, at most {100 * bytes_share:.0f} % of the bytes: loss in %"
        there = [_loss(p) for p in ours if p.bytes_share <= bytes_share]
        marks.append(Mark(what, min(there, default=float("inf")), loss))
        rivals = [p for p in points if p.level is None and p.batch == batch]
        for rival in (p for p in rivals if abs(p.bytes_share - bytes_share) < _NEAR_BYTES):
            read = 100 * rival.bytes_share
            what = f"  beside {rival.method} ({_loss(rival):.2f} % at {read:.0f} %): loss over it"
            figure = min(there, default=float("inf")) / _loss(rival)
            beyond = rival.method.endswith(REROUTED)
            marks.append(Mark(what, figure, OF_SHARED_EXPERTS, beyond=beyond))
    return marks


def cutting(cut: Cutting) -> list[Mark]:
    """The partition alone."""
    marks = [Mark("partition: held-out mass kept at half", cut.kept_mass, KEPT_MASS, False)]
    for width, seconds in cut.seconds.items():
        if width in SECONDS_PER_EXPERT:
            what = f"partition: seconds for an expert of {width} neurons"
            marks.append(Mark(what, seconds, SECONDS_PER_EXPERT[width]))
    again = Mark("partition: the same twice (1: yes)", float(cut.is_deterministic), 1.0, False)
    return [*marks, again]


def _loss(point: ServedPoint) -> float:
    return point.point.quality_loss_percent
