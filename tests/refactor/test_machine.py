"""Cores and memory as a container sees them, and the dtype that follows."""

import os
from pathlib import Path

import pytest
import torch
from prism_refactor import machine
from prism_refactor.source import open_source

MEMINFO = "MemTotal:       64000000 kB\nMemAvailable:   32000000 kB\n"


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", None), ("100000 100000", 1), ("150000 100000", 2), ("20000 100000", 1)],
)
def test_cores_follow_the_quota(tmp_path: Path, quota: str, expected: int | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    allowed = len(os.sched_getaffinity(0))
    assert machine.cores(file) == min(allowed, expected or allowed)
    assert machine.cores(tmp_path / "none") == allowed


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 32_768_000_000), ("1000000", 1_000_000), (None, 32_768_000_000)]
)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_memory_is_the_smaller_of_limit_and_machine(
    tmp_path: Path, limit: str | None, expected: int, version: str
) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    if limit:
        (tmp_path / version).write_text(limit)
    files = tmp_path / "v2", tmp_path / "v1", tmp_path / "meminfo"
    assert machine.available_bytes(*files) == expected


def test_a_large_model_runs_in_its_own_dtype_whatever_the_machine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(checkpoint))
    assert machine.compute_dtype(source) is torch.float32
    monkeypatch.setattr(machine, "_FP32_PARAMETERS", 1000)
    assert machine.compute_dtype(source) is torch.bfloat16
