"""How far a refactoring is: a bar with ETA on a terminal, one log line per layer elsewhere, and
gauges.

Knows units of work and their rough weights; must not know what a unit does. The decision worth
arguing about: the ETA comes from the weighted share done *in this run*, so a resumed run does not
promise the speed of work it only found on disk.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from prism.contract import Metric

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stage:
    """``units`` steps of about ``weight`` cost each (any unit of cost, the same for all stages)."""

    name: str
    units: int
    weight: float


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the work stands after a step."""

    stage: str
    done: int  # units of this stage
    units: int
    share: float  # of all work, 0-1
    remaining_s: float | None  # None until something was done in this run


class View(Protocol):
    """Shows a standing to somebody."""

    def __call__(self, standing: Standing) -> None: ...


class Progress:
    """Counts units over all stages and tells its views."""

    def __init__(
        self,
        stages: list[Stage],
        views: list[View],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages = {stage.name: stage for stage in stages}
        self._done = dict.fromkeys(self._stages, 0)
        self._views = views
        self._clock = clock
        self._started = clock()
        self._found = 0.0  # cost that was on disk already

    def advance(self, name: str, *, found: bool = False) -> None:
        """One more unit of stage ``name`` is done; ``found``: an earlier run had done it."""
        stage = self._stages[name]
        self._done[name] += 1
        if found:
            self._found += stage.weight
        standing = self._standing(stage)
        for view in self._views:
            view(standing)

    def _standing(self, stage: Stage) -> Standing:
        total = sum(s.units * s.weight for s in self._stages.values())
        done = sum(self._done[s.name] * s.weight for s in self._stages.values())
        fresh = done - self._found
        elapsed = self._clock() - self._started
        remaining = elapsed * (total - done) / fresh if fresh > 0 else None
        return Standing(stage.name, self._done[stage.name], stage.units, done / total, remaining)


def log_view(standing: Standing) -> None:
    """One line per unit, for Jobs and pipes."""
    left = "" if standing.remaining_s is None else f" left={standing.remaining_s:.0f}s"
    _log.info(
        "%s %d/%d total=%.0f%%%s",
        *(standing.stage, standing.done, standing.units, 100 * standing.share),
        left,
    )


@contextmanager
def terminal_view() -> Iterator[View]:
    """A rich bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Bar(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("starting", total=1.0, left="")

        def show(standing: Standing) -> None:
            left = standing.remaining_s
            bar.update(
                task,
                completed=standing.share,
                description=f"{standing.stage} {standing.done}/{standing.units}",
                left="" if left is None else f"{left // 60:.0f}:{left % 60:02.0f} left",
            )

        yield show


def metrics_view(port: int) -> View:
    """Serve gauges on ``port``; the server lives as long as the process. Raises OSError."""
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

    registry = CollectorRegistry()
    share = Gauge(Metric.REFACTOR_PROGRESS, "Share of the refactoring done, 0-1", registry=registry)
    left = Gauge(Metric.REFACTOR_REMAINING, "Estimated seconds left", registry=registry)
    steps = Gauge(
        Metric.REFACTOR_STEPS, "Units done in a stage", labelnames=["stage"], registry=registry
    )
    left.set(float("nan"))  # not known yet, which is not 0
    start_http_server(port, registry=registry)

    def show(standing: Standing) -> None:
        share.set(standing.share)
        steps.labels(standing.stage).set(standing.done)
        if standing.remaining_s is not None:
            left.set(standing.remaining_s)

    return show
