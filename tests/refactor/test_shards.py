"""Shards: the same artifact whatever their number, also when it changes after a kill."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prism.artifact import Artifact, open_artifact
from prism_refactor import stages, sweep
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.job import refactor
from prism_refactor.layers import LayerFiles
from prism_refactor.options import Options
from prism_refactor.stages import Block, wait_for
from prism_refactor.store import PartialFolder

from tests.refactor.conftest import silent, write_checkpoint

DEEP = 4
TENSORS = "prism/prism.safetensors"


class Killed(BaseException):
    """Stands for a signal: nobody catches it."""


@pytest.fixture(scope="module")
def deep(
    tmp_path_factory: pytest.TempPathFactory, make_options: Callable[..., Options]
) -> Callable[..., Options]:
    """Options of a model of four layers."""
    source = write_checkpoint(tmp_path_factory.mktemp("deep") / "source", DEEP)

    def make(out: Path, **changes: object) -> Options:
        return make_options(out, source=str(source), **changes)

    return make


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, deep: Callable[..., Options]) -> Artifact:
    """What one run makes that nobody disturbs."""
    made = refactor(deep(tmp_path_factory.mktemp("clean") / "artifact"), silent)
    assert made is not None
    return made


def run_shards(options: Options, count: int) -> list[str]:
    """All shards side by side, each a process; returns what they logged."""
    command = [sys.executable, "-m", "prism_cli", "refactor", options.source, "--out"]
    command += [str(options.out), "--calibration", str(options.calibration)]
    command += ["--sub-experts", str(options.sub_experts or "auto")]
    command += ["--tokens", str(options.tokens)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    shards = [
        subprocess.Popen(
            [*command, "--shard", f"{i}/{count}"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    told = []
    try:
        for shard in shards:
            _, errors = shard.communicate(timeout=240)
            assert shard.returncode == 0, errors
            told.append(errors)
    finally:
        for shard in shards:
            shard.kill()
    return told


@pytest.mark.parametrize(("before", "after", "cuts"), [(2, 1, 2), (1, 2, 1), (2, 4, 2), (2, 2, 2)])
def test_another_number_of_shards_goes_on_after_a_kill(
    deep: Callable[..., Options],
    clean: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
    after: int,
    cuts: int,
) -> None:
    monkeypatch.setattr(sweep, "_SAVE_EVERY_S", 0.0)
    out = tmp_path / "artifact"
    save = sweep.KeptStreams.save

    def killed(self: sweep.KeptStreams, done: int, hidden: dict[str, object]) -> None:
        save(self, done, hidden)  # type: ignore[arg-type]
        if not LayerFiles(PartialFolder(out)).missing_cuts(range(cuts)):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(sweep.KeptStreams, "save", killed)
        with pytest.raises(Killed):
            refactor(deep(out, shard=(0, before)), silent)
    run_shards(deep(out), after)
    made = open_artifact(out)
    assert made.digest == clean.digest
    assert (made.path / TENSORS).read_bytes() == (clean.path / TENSORS).read_bytes()


def test_a_state_beyond_a_layer_without_its_cut_is_not_used(
    deep: Callable[..., Options], clean: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_SAVE_EVERY_S", 0.0)
    out = tmp_path / "artifact"
    with monkeypatch.context() as patched:
        patched.setattr(stages, "run_knots", _raise)
        patched.setattr("prism_refactor.job.run_knots", _raise)
        with pytest.raises(Killed):
            refactor(deep(out), silent)
    next(PartialFolder(out).work.glob("cut-001*")).unlink()
    made = refactor(deep(out), silent)
    assert made is not None
    assert (made.path / TENSORS).read_bytes() == (clean.path / TENSORS).read_bytes()


def _raise(*_: object) -> None:
    raise Killed


def test_the_first_shard_chooses_for_all(deep: Callable[..., Options], tmp_path: Path) -> None:
    options = deep(tmp_path / "artifact", sub_experts=None)
    first, second = run_shards(options, 2)
    waited = "waiting for shard 0 to choose the number of sub-experts"
    assert waited in second
    assert waited not in first
    assert open_artifact(options.out).manifest.methods["sub_experts_asked"] == "auto"


def test_more_shards_than_layers_are_refused_before_any_work(
    deep: Callable[..., Options], tmp_path: Path
) -> None:
    with pytest.raises(RefactorError, match="5 shards for 4 MoE layers") as caught:
        refactor(deep(tmp_path / "out" / "artifact", shard=(0, 5)), silent)
    assert caught.value.reason is Reason.BAD_INPUT
    assert not list(tmp_path.iterdir())


def test_waiting_ends_when_nobody_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(stages, "_LOOK_EVERY_S", 0.05)
    folder = PartialFolder(tmp_path / "artifact")
    with (
        folder.locked("key"),
        pytest.raises(RefactorError, match="waits for a miracle") as caught,
    ):
        wait_for(lambda: False, lambda: "a miracle", folder)
    assert caught.value.reason is Reason.INTERRUPTED


@pytest.mark.parametrize(("layers", "count"), [(2, 2), (7, 3), (16, 4), (5, 1)])
def test_blocks_cover_every_layer_once(layers: int, count: int) -> None:
    blocks = [Block(index, count, layers) for index in range(count)]
    numbers = [n for block in blocks for n in range(block.first, block.end)]
    assert numbers == list(range(layers))
    assert [block.is_last for block in blocks] == [False] * (count - 1) + [True]


def test_shards_make_the_same_artifact(
    deep: Callable[..., Options], clean: Artifact, tmp_path: Path
) -> None:
    """Three: the one in the middle both receives and hands on."""
    options = deep(tmp_path / "artifact")
    run_shards(options, 3)
    made = open_artifact(options.out)
    assert made.digest == clean.digest
    assert (made.path / TENSORS).read_bytes() == (clean.path / TENSORS).read_bytes()
