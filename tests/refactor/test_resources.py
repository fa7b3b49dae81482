"""What a refactoring needs, told before it begins."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prism.contract import ExitCode
from prism_cli.main import main
from prism_refactor import machine, resources
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.resources import Needs, Shape, needs_of, require_resources
from prism_refactor.source import open_source
from prism_refactor.store import PartialFolder

# OLMoE-1B-7B in bfloat16.
LARGE = Shape(
    moe_layers=16,
    experts=64,
    slots=8,
    hidden=2048,
    width=1024,
    vocabulary=50304,
    layer_bytes=2 * (64 * 3 * 2048 * 1024 + 4 * 2048**2),
    resident_bytes=2 * 2 * 50304 * 2048,
    dense_parameters=16 * 4 * 2048**2,
    item_bytes=2,
)
CHECKPOINT = 13_800_000_000


def test_memory_follows_a_layer_and_not_the_model() -> None:
    one = needs_of(LARGE, 16_384, 8, CHECKPOINT)
    twice = needs_of(replace(LARGE, moe_layers=32), 16_384, 8, 2 * CHECKPOINT)
    assert one.memory_bytes < 8 << 30
    assert twice.memory_bytes < 1.1 * one.memory_bytes
    assert one.disk_bytes > CHECKPOINT
    wider = needs_of(replace(LARGE, layer_bytes=2 * LARGE.layer_bytes), 16_384, 8, CHECKPOINT)
    assert wider.memory_bytes > one.memory_bytes + LARGE.layer_bytes


def test_more_tokens_need_more_of_everything() -> None:
    few, many = (needs_of(LARGE, tokens, 8, CHECKPOINT) for tokens in (16_384, 131_072))
    assert many.memory_bytes > few.memory_bytes
    assert many.disk_bytes > few.disk_bytes
    assert many.operations["knots"] > 2 * few.operations["knots"]
    assert many.operations["evaluate"] == few.operations["evaluate"]  # its text does not grow


def test_too_little_memory_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = Needs(memory_bytes=1000, disk_bytes=0, operations={}, search_work=0, written_bytes=0)
    folder = PartialFolder(tmp_path / "out")
    folder.path.mkdir()
    require_resources(needs, folder)
    monkeypatch.setattr(machine, "available_bytes", lambda: 999)
    with pytest.raises(RefactorError, match=r"memory.*--tokens") as caught:
        require_resources(needs, folder)
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_the_shape_is_read_off_the_files(checkpoint: Path) -> None:
    source = open_source(str(checkpoint))
    shape = resources.shape_of(source, torch.float32)
    assert (shape.moe_layers, shape.experts, shape.slots) == (2, 6, 2)
    assert (shape.hidden, shape.width, shape.vocabulary) == (32, 48, 257)
    layer = 6 * 3 * 32 * 48 + 4 * 32 * 32 + 4 * 32 + 6 * 32
    assert shape.layer_bytes == 4 * layer
    assert shape.resident_bytes == 4 * (2 * 257 * 32 + 32)


def test_plan_prints_all_of_it_and_starts_nothing(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(checkpoint.parent.iterdir())
    assert main(["plan", str(checkpoint), "--json"]) == ExitCode.OK
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory_bytes"] > 0
    assert set(plan["seconds"]) == {"partition", "knots", "write", "evaluate"}
    assert plan["seconds_in_all"] == pytest.approx(sum(plan["seconds"].values()), abs=0.5)
    assert main(["plan", str(checkpoint)]) == ExitCode.OK
    assert "within a factor of two" in capsys.readouterr().out
    assert sorted(checkpoint.parent.iterdir()) == before


def test_plan_of_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "/nowhere"]) == ExitCode.BAD_INPUT
    assert "SourceNotFound" in capsys.readouterr().err


def test_a_small_disk_is_refused_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PartialFolder(tmp_path / "out")
    folder.path.mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    needs = Needs(memory_bytes=0, disk_bytes=11, operations={}, search_work=0, written_bytes=0)
    with pytest.raises(RefactorError, match="GB free") as caught:
        require_resources(needs, folder)
    assert caught.value.reason is Reason.NO_SPACE_LEFT
