"""What the machine gives: how many cores, how much memory, and the dtype the model therefore runs
in.

Knows control groups and /proc/meminfo. The decision worth arguing about: fp32 where it fits,
because thresholds and the paired losses are then free of rounding noise; else the checkpoint's own
dtype, and the log says so.
"""

import logging
import os
from pathlib import Path
from typing import Final

import torch

from prism_refactor.source import Checkpoint

_log = logging.getLogger(__name__)
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_CGROUP_CPU: Final = Path("/sys/fs/cgroup/cpu.max")
_MEMINFO: Final = Path("/proc/meminfo")
_SHARE: Final = 0.6  # of the memory that the weights may take; activations need the rest


def cores(quota: Path = _CGROUP_CPU) -> int:
    """Cores this process may use: affinity, and the control group's quota rounded up.

    torch counts the machine's cores and would start 64 threads in a container that has two.
    """
    allowed = len(os.sched_getaffinity(0))
    if quota.exists():
        share, period = quota.read_text().split()
        if share != "max":
            allowed = min(allowed, max(1, -(-int(share) // int(period))))
    return allowed


def available_bytes(limit: Path = _CGROUP_LIMIT, meminfo: Path = _MEMINFO) -> int:
    """The smaller of the control group's limit and the machine's available memory."""
    found = []
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        found.append(int(text))
    if meminfo.exists():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(int(rows["MemAvailable"].split()[0]) * 1024)
    return min(found, default=1 << 62)


def compute_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """fp32 where the weights fit, else the checkpoint's dtype."""
    parameters = 0
    for entry in checkpoint.entries.values():
        count = 1
        for size in entry.shape:
            count *= size
        parameters += count
    available = available_bytes()
    if parameters * 4 <= _SHARE * available:
        _log.info("dtype: float32 (%d M parameters fit in memory)", parameters // 1_000_000)
        return torch.float32
    dtype = checkpoint.config.dtype
    chosen: torch.dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    _log.info(
        "dtype: %s (%.1f GB of fp32 weights do not fit in %.1f GB)",
        *(str(chosen).removeprefix("torch."), parameters * 4 / 1e9, available / 1e9),
    )
    return chosen
