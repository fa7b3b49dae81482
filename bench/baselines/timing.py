"""Seconds of each part of a benchmark, and of each stage of a refactoring inside it."""

import time

from prism_refactor.progress import Standing, View


class StageClock:
    """One stage runs at a time; `begin` ends the one before."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: str | None = None
        self._since = time.monotonic()

    def begin(self, name: str) -> None:
        """From now on time counts for `name`."""
        self._stop()
        self._running = name

    def refactoring(self, name: str) -> View:
        """A view of a refactoring's progress: time up to a step belongs to the step's stage."""
        self.begin(f"{name}: start")

        def view(standing: Standing) -> None:
            self._running = f"{name}: {standing.stage}"
            self._stop()

        return view

    def seconds(self) -> dict[str, float]:
        """Stage -> seconds so far, in the order they began."""
        self._stop()
        return {name: round(value, 1) for name, value in self._seconds.items()}

    def _stop(self) -> None:
        now = time.monotonic()
        if self._running is not None:
            self._seconds[self._running] = self._seconds.get(self._running, 0) + now - self._since
        self._since = now
