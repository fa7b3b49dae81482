"""The partial folder beside the result: what a killed refactoring left, and how the next one goes
on.

Knows files, a lock and a key; must not know what the files mean. Every file appears by one rename,
so whatever a kill -9 leaves is whole or absent. The decision worth arguing about: work made from
other inputs (source bytes, text, options, method version) is thrown away with a message, never
mixed in.
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from torch import Tensor

from prism_refactor.errors import Reason, RefactorError

_log = logging.getLogger(__name__)
_CLAIM_S: Final = 10.0  # a shard that has done its part takes a moment to end
_LOOK_EVERY_S: Final = 0.1


class PartialFolder:
    """``<DIR>.partial``: ``work/`` holds stage files, ``artifact/`` becomes DIR by one rename."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self.work = self.path / "work"
        self.artifact = self.path / "artifact"

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the whole folder for the work that ``key`` identifies; other work in it is
        discarded. Shards that still end are waited for.

        Raises RefactorError when another process works here.
        """
        with self._holding("users", fcntl.LOCK_EX, _CLAIM_S):
            self._claim(key)
            yield

    @contextmanager
    def claimed(self, key: str, shard: tuple[int, int]) -> Iterator[None]:
        """Hold one shard's part of the folder, beside the other shards of the same work.

        Raises RefactorError when another process works at the same shard or at other work.
        """
        with self._holding(f"shard-{shard[0]}", fcntl.LOCK_EX):
            self._begin(key)
            with self._holding("users", fcntl.LOCK_SH, _CLAIM_S):
                if _key_in(self.path / "key.json") != key:
                    raise self._busy()
                self._claim(key)
                yield

    def _busy(self) -> RefactorError:
        return RefactorError(Reason.INTERRUPTED, f"Another refactoring is at work in {self.path}.")

    def _begin(self, key: str) -> None:
        """Make the folder one of ``key``; one that began at the same moment may do it."""
        end = time.monotonic() + _CLAIM_S
        while _key_in(self.path / "key.json") != key:
            try:
                with self._holding("users", fcntl.LOCK_EX):
                    self._claim(key)
            except RefactorError:
                if time.monotonic() >= end:
                    raise
                time.sleep(_LOOK_EVERY_S)

    @contextmanager
    def _holding(self, name: str, mode: int, wait_s: float = 0) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + wait_s
        with (self.path / name).open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, mode | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() >= end:
                        raise self._busy() from error
                    time.sleep(_LOOK_EVERY_S)
            yield

    def _claim(self, key: str) -> None:
        file = self.path / "key.json"
        found = _key_in(file)
        if found not in (None, key):
            _log.info("discarding %s: it was made from other inputs or options", self.path)
        if found != key:
            shutil.rmtree(self.work, ignore_errors=True)
            shutil.rmtree(self.artifact, ignore_errors=True)
            write_atomically(file, json.dumps({"key": key}).encode())
        self.work.mkdir(exist_ok=True)
        self.artifact.mkdir(exist_ok=True)

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors as ``work/<name>.safetensors``, replacing what was there."""
        from safetensors.torch import save

        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_atomically(self.work / f"{name}.safetensors", save(contiguous))

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors kept under ``name``, or None."""
        from safetensors.torch import load

        file = self.work / f"{name}.safetensors"
        return load(file.read_bytes()) if file.exists() else None

    def has(self, name: str) -> bool:
        """Whether tensors are kept under ``name``."""
        return (self.work / f"{name}.safetensors").exists()

    def changed_s(self) -> float:
        """When a stage file last appeared, in seconds since 1970; 0 without a folder."""
        try:
            return self.work.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def publish(self) -> None:
        """Make the artifact appear at its name, then drop the work."""
        for left in self.artifact.rglob("*.tmp"):
            left.unlink()
        sync_directory(self.artifact)
        self.artifact.rename(self.out)
        sync_directory(self.out.parent)
        self.remove()

    def remove(self) -> None:
        """Drop everything; safe when nothing is there."""
        shutil.rmtree(self.path, ignore_errors=True)


def _key_in(file: Path) -> str | None:
    """The key a folder was made for; "" where the file says nothing we understand."""
    if not file.exists():
        return None
    try:
        return str(json.loads(file.read_bytes())["key"])
    except (ValueError, KeyError, TypeError):
        return ""


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data``; ``path`` holds all of it or what it held before, power loss included."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
