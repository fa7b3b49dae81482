"""The supervisor: start, find and stop the programs of the node.

A pid file holds the process number and its start tick, so that a number that the kernel gave to
someone else's process is never signalled. Nothing is restarted by itself: `up` starts what is
missing.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from node.settings import LOGS, RUN, STATE
from node.shell import write


class NotReady(RuntimeError):
    """A program ended, or was not ready in time."""


def started(pid: int) -> str | None:
    """When a process began, in clock ticks; None where there is none (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def process(name: str) -> int | None:
    """The number of the process that we started under this name, if it still runs."""
    try:
        pid, since = (RUN / f"{name}.pid").read_text().split()
    except FileNotFoundError:
        return None
    return int(pid) if started(int(pid)) == since else None


def start(name: str, *command: object) -> None:
    """Starts a program in its own session, unless it runs."""
    if process(name):
        return
    with (LOGS / f"{name}.log").open("a") as log:
        child = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=STATE,
            start_new_session=True,
        )
    write(RUN / f"{name}.pid", f"{child.pid} {started(child.pid)}\n")


def stop(*names: str, seconds: float = 15) -> None:
    """Ends these programs together; kills what has not ended by itself after `seconds`."""
    pids = {name: process(name) for name in names}
    for running in filter(None, pids.values()):
        os.kill(running, signal.SIGTERM)
    end = time.monotonic() + seconds
    for name, pid in pids.items():
        while pid and process(name):
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        (RUN / f"{name}.pid").unlink(missing_ok=True)


def wait(name: str, ready: Callable[[], object], seconds: float = 120) -> None:
    """Waits until the program that we started under this name is ready. Raises NotReady."""
    end = time.monotonic() + seconds
    while not ready():
        ended = not process(name)
        if ended or time.monotonic() > end:
            why = "ended" if ended else f"is not ready after {seconds:.0f} s"
            raise NotReady(f"{name} {why}; see {LOGS / name}.log")
        time.sleep(0.2)
