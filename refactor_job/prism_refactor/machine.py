"""What the machine gives: how many cores, how much memory, and the dtype the model therefore runs
in.

Knows control groups and /proc/meminfo. The decision worth arguing about: small models run in fp32,
because thresholds and the paired losses are then free of rounding noise; large ones in the
checkpoint's own dtype, and the log says so.
"""

import logging
import os
import platform
from math import prod
from pathlib import Path
from typing import Final

import prism
import safetensors
import torch
import transformers

from prism_refactor.source import Checkpoint

_log = logging.getLogger(__name__)
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_CGROUP_LIMIT_V1: Final = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_CPU: Final = Path("/sys/fs/cgroup/cpu.max")
_CPUINFO: Final = Path("/proc/cpuinfo")
_MEMINFO: Final = Path("/proc/meminfo")
_FP32_PARAMETERS: Final = 1_000_000_000  # above it fp32 takes twice the time of the own dtype


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


def available_bytes(
    limit: Path = _CGROUP_LIMIT, limit_v1: Path = _CGROUP_LIMIT_V1, meminfo: Path = _MEMINFO
) -> int:
    """The smaller of the control group's limit and the machine's available memory."""
    found = []
    for file in (limit, limit_v1):
        if file.exists() and (text := file.read_text().strip()) != "max":
            found.append(int(text))
    if meminfo.exists():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(int(rows["MemAvailable"].split()[0]) * 1024)
    return min(found, default=1 << 62)


def device() -> torch.device:
    """Where layers are computed: the first GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """fp32 for small models, else the checkpoint's own dtype.

    It depends on the checkpoint alone, so that a shard on a small node and one on a large node
    compute the same.
    """
    parameters = sum(prod(entry.shape) for entry in checkpoint.entries.values())
    if parameters <= _FP32_PARAMETERS:
        _log.info("dtype: float32 (%d M parameters)", parameters // 1_000_000)
        return torch.float32
    dtype = checkpoint.config.dtype
    chosen: torch.dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    _log.info(
        "dtype: %s (%d M parameters)",
        *(str(chosen).removeprefix("torch."), parameters // 1_000_000),
    )
    return chosen


def description() -> list[tuple[str, str]]:
    """What ran here, for a record: (name, value)."""
    modules = (prism, torch, transformers, safetensors)
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    here = device()
    computed_on = f"{processor()}, {torch.get_num_threads()} threads"
    if here.type == "cuda":
        computed_on = f"{torch.cuda.get_device_name(here)}; {computed_on}"
    python = f"Python {platform.python_version()}"
    return [("versions", f"{versions}, {python}"), ("machine", computed_on)]


def processor(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's name, or at least its kind."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()
