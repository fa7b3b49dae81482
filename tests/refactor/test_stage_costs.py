"""Seconds and memory per stage: added over runs and shards, and there after a kill."""

import time
from pathlib import Path

import pytest
import torch
from prism_refactor import stage_costs
from prism_refactor.stage_costs import StageCosts, kept_costs, memory_bytes
from prism_refactor.store import PartialFolder


@pytest.fixture
def folder(tmp_path: Path) -> PartialFolder:
    made = PartialFolder(tmp_path / "artifact")
    made.work.mkdir(parents=True)
    return made


def test_runs_and_shards_add_up_and_memory_is_a_peak(folder: PartialFolder) -> None:
    for shard, seconds, peaks in ((0, 2.0, [300, 100]), (1, 3.5, [200, 400])):
        kept = {"seconds": torch.tensor(seconds), "peaks": torch.tensor(peaks)}
        folder.save(f"cost-cut-{shard:03d}", kept)
    (cost,) = kept_costs(folder, ["cut", "never"])
    assert (cost.name, cost.shards, cost.seconds) == ("cut", 2, 5.5)
    assert (cost.anonymous_bytes, cost.resident_bytes) == (300, 400)
    with StageCosts(folder, 0).stage("cut"):
        time.sleep(0.05)
    (cost,) = kept_costs(folder, ["cut"])
    assert 5.55 <= cost.seconds < 6.5
    assert cost.resident_bytes >= 50 << 20  # this process holds torch


def test_a_peak_inside_the_stage_is_seen(
    folder: PartialFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_costs, "_SAMPLE_S", 0.01)
    before = memory_bytes()[0]
    with StageCosts(folder, 0).stage("cut"):
        held = torch.ones(64 << 20, dtype=torch.uint8)
        time.sleep(0.1)
        del held
    (cost,) = kept_costs(folder, ["cut"])
    assert cost.anonymous_bytes >= before + (60 << 20)


def test_what_a_killed_stage_took_is_kept(
    folder: PartialFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_costs, "_SAMPLE_S", 0.01)
    monkeypatch.setattr(stage_costs, "_SAVE_EVERY_S", 0.02)
    with StageCosts(folder, 0).stage("cut"):
        end = time.monotonic() + 5
        while not kept_costs(folder, ["cut"]) and time.monotonic() < end:
            time.sleep(0.01)
        (cost,) = kept_costs(folder, ["cut"])  # before the end, as a kill -9 would leave it
        assert cost.seconds > 0.02


def test_a_stage_that_fails_is_measured_too(folder: PartialFolder) -> None:
    with pytest.raises(ZeroDivisionError), StageCosts(folder, 0).stage("cut"):
        raise ZeroDivisionError
    assert [cost.name for cost in kept_costs(folder, ["cut"])] == ["cut"]
