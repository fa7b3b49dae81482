"""Steps with their elapsed time, on stderr: stdout belongs to the result."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Says what begins, and how long it took; also when it failed."""
    say(f"-> {what}")
    begin = time.monotonic()
    end = "failed"
    try:
        yield
        end = "done"
    finally:
        say(f"   {what}: {end} after {time.monotonic() - begin:.1f} s")
