"""What the demo tells: each line with the seconds since the beginning, each step with its length.

One voice for driver and tests, so that a log of either reads the same and figures can be cited.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO


@dataclass(slots=True)
class Story:
    """Prints to ``out``; remembers how long each finished step took, in seconds."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    clock: Callable[[], float] = time.monotonic
    began: float = -1.0
    steps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def elapsed(self) -> float:
        return self.clock() - self.began

    def say(self, text: str) -> None:
        for line in text.splitlines() or [""]:
            print(f"[{self.elapsed:6.1f} s]   {line}", file=self.out, flush=True)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A titled step; its length is printed also when it fails."""
        print(f"[{self.elapsed:6.1f} s] {title}", file=self.out, flush=True)
        begin = self.clock()
        word = "failed after"
        try:
            yield
            word = "done in"
        finally:
            took = self.clock() - begin
            self.steps[title] = round(took, 1)
            self.say(f"{word} {took:.1f} s")
