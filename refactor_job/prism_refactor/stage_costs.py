"""What each stage took, in seconds and memory, over all runs and shards that worked at it.

Knows clocks and /proc. The decision worth arguing about: memory is sampled, not read from the
kernel's high-water mark, because that mark is one for the whole process and resetting it would
spoil it for whoever measures us from outside. A peak shorter than a sample's distance goes unseen.
None of this enters the manifest: an artifact's digest must not depend on the clock.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from prism_refactor.store import PartialFolder

_SAMPLE_S: Final = 0.2
_SAVE_EVERY_S: Final = 5.0
_STATUS: Final = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage, all its runs and shards together."""

    name: str
    seconds: float  # of all shards, added
    shards: int
    anonymous_bytes: int  # peak of one process; what the kernel cannot take back
    resident_bytes: int  # peak of one process, files it maps included; 0: not to be had here


class StageCosts:
    """Measures stages of one shard and keeps what was measured in the partial folder."""

    def __init__(self, folder: PartialFolder, shard: int) -> None:
        self._folder = folder
        self._shard = shard

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs inside as stage ``name``; adds to what earlier runs kept.

        Kept every few seconds as well, so that a kill -9 forgets no more than that.
        """
        running = _Running(self._folder, f"cost-{name}-{self._shard:03d}")
        try:
            yield
        finally:
            running.stop()


class _Running:
    def __init__(self, folder: PartialFolder, file: str) -> None:
        self._folder = folder
        self._file = file
        kept = folder.load(file)
        self._before = float(kept["seconds"]) if kept else 0.0
        self._peaks = kept["peaks"].tolist() if kept else [0, 0]
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        self._save()

    def _sample(self) -> None:
        saved = self._started
        while not self._ended.wait(_SAMPLE_S):
            self._look()
            if time.monotonic() - saved > _SAVE_EVERY_S:
                try:
                    self._save()
                except OSError:
                    return  # a full volume: the work itself is about to say so, with a path
                saved = time.monotonic()

    def _look(self) -> None:
        self._peaks = [max(pair) for pair in zip(self._peaks, memory_bytes(), strict=True)]

    def _save(self) -> None:
        seconds = self._before + time.monotonic() - self._started
        self._folder.save(
            self._file,
            {
                "seconds": torch.tensor(seconds, dtype=torch.float64),
                "peaks": torch.tensor(self._peaks),
            },
        )


def memory_bytes() -> tuple[int, int]:
    """(anonymous, resident) bytes of this process; zeros where /proc does not say."""
    if not _STATUS.exists():
        return 0, 0
    found = {}
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmRSS"):
            found[name] = int(value.split()[0]) << 10
    return found.get("RssAnon", 0), found.get("VmRSS", 0)


def kept_costs(folder: PartialFolder, names: Sequence[str]) -> list[StageCost]:
    """What the folder holds of the stages ``names``, in their order."""
    costs = []
    for name in names:
        files = sorted(folder.work.glob(f"cost-{name}-*.safetensors"))
        kept = [shard for shard in (folder.load(file.stem) for file in files) if shard]
        if kept:
            peaks = torch.stack([shard["peaks"] for shard in kept]).amax(0)
            seconds = sum(float(shard["seconds"]) for shard in kept)
            costs.append(StageCost(name, seconds, len(kept), int(peaks[0]), int(peaks[1])))
    return costs
