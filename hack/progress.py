"""Steps with their elapsed time, on stderr (stdout belongs to the result), and one at a time."""

import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; says so when it has to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process holds {path}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
