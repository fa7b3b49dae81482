"""What a demo leaves behind: one JSON document that the report page is drawn from.

Plain data, so that a page can be drawn again, or compared with another day's.
"""

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hack.demo.load import Sent
from hack.demo.observe import Sample
from hack.demo.stats import Window, window


@dataclass(frozen=True, slots=True)
class Targets:
    """The objectives of the run, milliseconds and percentile; the floor in percent."""

    ttft_ms: int
    itl_ms: int | None
    percentile: int
    floor: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """Requests per second that clients which ask again at once get, at one pinned level."""

    level: int
    requests_per_s: float
    ttft_p50_ms: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """One load step: elastic or not."""

    title: str
    mode: str  # of elasticity
    step_begin: float
    step_end: float
    seconds: float
    low_rate: float  # requests per second offered outside and inside the step
    high_rate: float
    sent: tuple[Sent, ...]
    samples: tuple[Sample, ...]

    def part(self, name: str, targets: Targets) -> Window:
        """Figures of one part of the run: before, step or after."""
        begin, end = {
            "before": (0.0, self.step_begin),
            "step": (self.step_begin, self.step_end),
            "after": (self.step_end, self.seconds),
        }[name]
        return window(self.sent, begin, end, targets.ttft_ms, targets.itl_ms)

    @property
    def lowered_after_s(self) -> float | None:
        """Seconds from the step's begin to a ceiling below where it was; None if it stayed."""
        before = [s.ceiling for s in self.samples if s.at < self.step_begin]
        start = before[-1] if before else 100
        return next(
            (
                s.at - self.step_begin
                for s in self.samples
                if s.at >= self.step_begin and s.ceiling < start
            ),
            None,
        )

    @property
    def lowest_ceiling(self) -> int:
        return min((s.ceiling for s in self.samples), default=100)

    @property
    def restored_after_s(self) -> float | None:
        """Seconds from the step's end to a ceiling of 100 that stays; None if it does not."""
        later = [s for s in self.samples if s.at >= self.step_end]
        if not later or later[-1].ceiling < 100:
            return None
        below = [s.at for s in later if s.ceiling < 100]
        return (below[-1] - self.step_end) if below else 0.0

    @property
    def new_pods(self) -> int:
        """Pods seen during the run that were not there at its begin."""
        if not self.samples:
            return 0
        return len({uid for s in self.samples for uid in s.pods} - set(self.samples[0].pods))


@dataclass(frozen=True, slots=True)
class Record:
    """A whole demo."""

    date: str
    machine: str
    cluster: str
    targets: Targets
    capacities: tuple[Capacity, ...]
    runs: tuple[Run, ...]
    quality: dict[int, float]  # level -> quality loss in percent, measured by the refactoring
    steps: dict[str, float] = field(default_factory=dict)  # title -> seconds
    decisions: tuple[dict[str, Any], ...] = ()  # the operator's own words
    figures: dict[str, float] = field(default_factory=dict)  # e.g. apply to first token

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n")


def load(path: Path) -> Record:
    """Reads what ``save`` wrote."""
    raw = json.loads(path.read_text())
    return Record(
        **raw
        | {
            "targets": Targets(**raw["targets"]),
            "capacities": tuple(Capacity(**c) for c in raw["capacities"]),
            "quality": {int(level): loss for level, loss in raw["quality"].items()},
            "decisions": tuple(raw["decisions"]),
            "runs": tuple(_run(r) for r in raw["runs"]),
        }
    )


def _run(raw: dict[str, Any]) -> Run:
    sent = tuple(Sent(**s | {"gaps": tuple(s["gaps"])}) for s in raw["sent"])
    samples = tuple(Sample(**s | {"pods": tuple(s["pods"])}) for s in raw["samples"])
    return Run(**raw | {"sent": sent, "samples": samples})


def quality_loss(quality: dict[int, float], levels: Iterable[int]) -> float | None:
    """Mean quality loss of requests served at these levels, linear between measured ones."""
    points = sorted({100: 0.0, **quality}.items())
    losses = [_between(points, level) for level in levels]
    return sum(losses) / len(losses) if losses else None


def _between(points: list[tuple[int, float]], level: int) -> float:
    for (low, low_loss), (high, high_loss) in itertools.pairwise(points):
        if low <= level <= high:
            return low_loss + (high_loss - low_loss) * (level - low) / (high - low)
    return points[0][1]
