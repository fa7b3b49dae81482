"""A whole refactoring: the artifact, re-runs, resumption, and every way to fail."""

import errno
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prism.artifact import Artifact, open_artifact, verify
from prism.checkpoint import CheckpointError
from prism.contract import TERMINATION_MESSAGE_BYTES, ExitCode
from prism.places import Span
from prism_refactor import evaluation_pass, job, shell, store
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.job import refactor
from prism_refactor.options import EVALUATION_LEVELS, KNOTS, SERVED_LEVELS, Options
from prism_refactor.progress import Progress, Stage
from torch import Tensor

MakeOptions = Callable[..., Options]


def silent(stages: list[Stage]) -> Progress:
    return Progress(stages, [])


def snapshot(path: Path) -> dict[str, tuple[int, int]]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file): (file.stat().st_mtime_ns, file.stat().st_size) for file in files}


def test_artifact_is_whole_and_says_what_it_was_made_from(
    artifact: Artifact, checkpoint: Path
) -> None:
    assert verify(artifact.path) == []
    manifest = open_artifact(artifact.path).manifest
    assert manifest.levels == EVALUATION_LEVELS
    assert tuple(knot.level for knot in manifest.knots) == KNOTS
    assert manifest.source.uri == f"file://{checkpoint}"
    assert manifest.calibration.tokens == 2048
    full = manifest.operating_points[0]
    assert (full.level, full.own_share, full.active_share) == (100, 1.0, 1.0)
    assert (full.quality_loss_percent, full.kl, full.top1_agreement) == (0.0, 0.0, 1.0)
    curve = manifest.batch_curves["25"]
    assert curve["bytes_share"] == sorted(curve["bytes_share"])
    assert curve["ride_along_computed_share"][0] == pytest.approx(0.25, abs=0.06)


def test_levels_are_measured_as_served_too(artifact: Artifact) -> None:
    """The text is so small that all its sequences are one batch."""
    for level in SERVED_LEVELS:
        curve = artifact.manifest.batch_curves[str(level)]
        alone = next(p for p in artifact.manifest.operating_points if p.level == level)
        assert curve["measured_batch"] == [7.0]
        assert curve["measured_computed_share"][0] > alone.own_share + 0.02
        assert level / 100 < curve["measured_bytes_share"][0]
        assert curve["measured_kl"][0] < alone.kl
    read = [artifact.manifest.batch_curves[str(x)]["measured_bytes_share"] for x in SERVED_LEVELS]
    assert read == sorted(read, reverse=True)


@pytest.mark.parametrize(("sequences", "batch"), [(8, 8), (9, 8), (32, 8), (5, 2)])
def test_decode_batches_of_the_last_pass_are_strangers(sequences: int, batch: int) -> None:
    groups = evaluation_pass.Way(50, batch).groups(sequences, 3, torch.device("cpu"))
    assert groups is not None
    sizes = groups.view(sequences, 3)[:, 0].bincount()
    assert sizes[sizes > 0].max() <= batch
    assert (groups.view(sequences, 3).diff(dim=1) == 1).all()  # one position is one batch
    if sequences > batch:
        assert groups[0] != groups[3]  # neighbours do not meet
    assert evaluation_pass.Way(50).groups(sequences, 3, torch.device("cpu")) is None


def test_own_share_follows_the_level(artifact: Artifact) -> None:
    for point in artifact.manifest.operating_points:
        assert point.own_share == pytest.approx(point.level / 100, abs=0.06), point.level
        assert point.active_share >= point.own_share


def test_artifact_loads_as_a_stock_checkpoint_with_the_same_logits(
    artifact: Artifact, checkpoint: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(1))
    logits = []
    for path in (checkpoint, artifact.path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits.append(model(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(artifact.path)("abc").input_ids == [64, 65, 66]


def test_weights_keep_dtype_and_every_value(artifact: Artifact, checkpoint: Path) -> None:
    from safetensors.torch import load_file

    moved = 0
    for shard in checkpoint.glob("*.safetensors"):
        before, after = load_file(shard), load_file(artifact.path / shard.name)
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            if ".experts." in name:
                moved += not torch.equal(after[name], tensor)
                assert torch.equal(after[name].flatten().sort()[0], tensor.flatten().sort()[0])
            else:
                assert torch.equal(after[name], tensor)
    assert moved > 0


def test_papers_come_along_and_pickles_do_not(artifact: Artifact, checkpoint: Path) -> None:
    for name in ("README.md", "LICENSE", "chat_template.jinja", "tokenizer.json", "config.json"):
        assert (artifact.path / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not (artifact.path / "pytorch_model.bin").exists()
    assert not artifact.path.with_name("artifact.partial").exists()


def test_report_is_self_contained(artifact: Artifact) -> None:
    page = (artifact.path / "prism" / "report.html").read_text()
    assert "<svg" in page
    assert "OlmoeForCausalLM" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page


def test_a_second_run_confirms_and_writes_nothing(
    artifact: Artifact, make_options: MakeOptions
) -> None:
    before = snapshot(artifact.path)
    assert refactor(make_options(artifact.path), silent).digest == artifact.digest
    assert snapshot(artifact.path) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [({"seed": 1}, "seed"), ({"sub_experts": 8}, "sub-experts"), ({"tokens": 4096}, "tokens")],
)
def test_an_artifact_made_otherwise_is_never_overwritten(
    artifact: Artifact, make_options: MakeOptions, change: dict[str, int], words: str
) -> None:
    before = snapshot(artifact.path)
    with pytest.raises(RefactorError, match=f"made with other .*{words}") as caught:
        refactor(make_options(artifact.path, **change), silent)
    assert caught.value.reason is Reason.BAD_INPUT
    assert snapshot(artifact.path) == before


def test_other_calibration_text_is_noticed(
    artifact: Artifact, make_options: MakeOptions, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("some other text " * 1000)
    with pytest.raises(RefactorError, match="calibration text"):
        refactor(make_options(artifact.path, calibration=other), silent)


def test_a_directory_that_is_no_artifact_is_not_touched(
    make_options: MakeOptions, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(RefactorError, match="no whole artifact"):
        refactor(make_options(tmp_path / "out"), silent)
    assert (tmp_path / "out" / "precious").exists()


def test_a_damaged_artifact_is_named(
    artifact: Artifact, make_options: MakeOptions, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(RefactorError, match="damaged"):
        refactor(make_options(copy), silent)


class Stop(Exception):
    """Stands for a kill: nothing of ours handles it."""


@pytest.mark.parametrize("after", [1, 3, 11, 17, 29])
def test_a_killed_refactoring_goes_on_and_ends_the_same(
    artifact: Artifact,
    make_options: MakeOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    options = make_options(tmp_path / "artifact")
    writes = 0
    write = store.write_atomically

    def stop_after(path: Path, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes > after:
            raise Stop
        write(path, data)

    monkeypatch.setattr(store, "write_atomically", stop_after)
    with pytest.raises(Stop):
        refactor(options, silent)
    assert not options.out.exists()
    kept = snapshot(tmp_path / "artifact.partial" / "work")
    monkeypatch.setattr(store, "write_atomically", write)
    steps: list[tuple[str, bool]] = []

    class Recorded(Progress):
        def advance(self, name: str, *, found: bool = False) -> None:
            steps.append((name, found))

    assert refactor(options, lambda stages: Recorded(stages, [])).digest == artifact.digest
    names = [Path(name).name for name in kept]
    for stage, prefix, files_per_layer in (
        ("partition", "cut-", 1),
        ("knots", "knot-", len(KNOTS)),
    ):
        whole = sum(name.startswith(prefix) for name in names) // files_per_layer
        assert steps.count((stage, True)) == whole


def test_work_of_other_options_is_not_mixed_in(
    artifact: Artifact, make_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artifact"

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(job, "CutPass", stop)
        with pytest.raises(Stop):
            refactor(make_options(out, seed=5), silent)
    planted = tmp_path / "artifact.partial" / "work" / "cut-000.safetensors"
    planted.write_bytes(b"not even a tensor")
    assert refactor(make_options(out), silent).digest == artifact.digest


def run_shell(options: Options, message: Path) -> tuple[ExitCode, dict[str, object]]:
    code = shell.run(replace(options, termination_message=message))
    return code, json.loads(message.read_bytes())


def test_success_tells_the_operator_what_was_measured(
    artifact: Artifact, make_options: MakeOptions, tmp_path: Path
) -> None:
    code, message = run_shell(make_options(artifact.path), tmp_path / "message")
    assert code is ExitCode.OK
    assert message["digest"] == artifact.digest
    assert message["architecture"] == "OlmoeForCausalLM"
    points = message["points"]
    assert isinstance(points, list)
    assert [point["level"] for point in points] == list(EVALUATION_LEVELS)
    measured = artifact.manifest.operating_points
    assert [point["kl"] for point in points] == [round(one.kl, 5) for one in measured]
    assert [point["top1"] for point in points] == [round(one.top1_agreement, 4) for one in measured]
    assert (tmp_path / "message").stat().st_size <= TERMINATION_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (OSError(errno.ENOSPC, "No space left"), "NoSpaceLeft", ExitCode.FAILED),
        (OSError(errno.EROFS, "Read-only file system", "/m"), "BadInput", ExitCode.BAD_INPUT),
        (CheckpointError("m: 1 tensors are missing"), "CorruptCheckpoint", ExitCode.BAD_INPUT),
        (OSError(errno.EDQUOT, "Quota exceeded"), "NoSpaceLeft", ExitCode.FAILED),
        (MemoryError(), "OutOfMemory", ExitCode.FAILED),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 GB"),
            "OutOfMemory",
            ExitCode.FAILED,
        ),
        (KeyboardInterrupt(), "Interrupted", ExitCode.FAILED),
        (ZeroDivisionError("oops"), "InternalError", ExitCode.FAILED),
    ],
)
def test_failure_in_the_middle_has_words_and_the_next_run_ends_well(
    artifact: Artifact,
    make_options: MakeOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    reason: str,
    code: ExitCode,
) -> None:
    options = make_options(tmp_path / "artifact")

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(job, "run_knots", fail)
        found, message = run_shell(options, tmp_path / "message")
    assert (found, message["result"], message["reason"]) == (code, "failed", reason)
    assert not options.out.exists()
    if reason == "NoSpaceLeft":
        assert refactor(options, silent).digest == artifact.digest


def test_too_small_a_volume_is_refused_before_the_work(
    make_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    code, message = run_shell(make_options(tmp_path / "artifact"), tmp_path / "message")
    assert code is ExitCode.FAILED
    assert message["reason"] == "NoSpaceLeft"
    assert "GB free" in str(message["message"])


def test_too_little_text_ends_in_bad_input(make_options: MakeOptions, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    options = make_options(tmp_path / "artifact", calibration=short)
    code, message = run_shell(options, tmp_path / "message")
    assert (code, message["reason"]) == (ExitCode.BAD_INPUT, "TooLittleCalibrationText")


@pytest.mark.parametrize(
    "out",
    [
        *("/proc/x", "/proc/x/y/z", "/dev/null/x", "/", "."),
        *("HERE/file/artifact", "HERE/dangling", "HERE/dangling/artifact", "HERE/taken"),
        "HERE/" + "n" * 250,  # the folder beside it has a longer name
    ],
)
def test_an_impossible_place_for_the_result_is_refused_before_any_work(
    make_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken.partial").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.setattr(job, "open_source", lambda *_: pytest.fail("the work began"))
    before = sorted(tmp_path.iterdir())
    options = make_options(Path(out.replace("HERE", str(tmp_path))))
    code, message = run_shell(options, tmp_path / "message")
    assert (code, message["reason"]) == (ExitCode.BAD_INPUT, "BadInput")
    assert f"--out {options.out}" in str(message["message"])
    (tmp_path / "message").unlink()
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_volume_is_no_bad_place(
    make_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    code, message = run_shell(make_options(tmp_path / "artifact"), tmp_path / "message")
    assert (code, message["reason"]) == (ExitCode.FAILED, "NoSpaceLeft")


def test_a_bad_source_leaves_no_folder_behind(make_options: MakeOptions, tmp_path: Path) -> None:
    options = make_options(tmp_path / "new" / "artifact", source=str(tmp_path / "none"))
    code, message = run_shell(options, tmp_path / "message")
    assert (code, message["reason"]) == (ExitCode.BAD_INPUT, "SourceNotFound")
    assert [path.name for path in tmp_path.iterdir()] == ["message"]


def test_a_port_that_is_taken_is_refused_before_any_work(
    make_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "open_source", lambda *_: pytest.fail("the work began"))
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = make_options(tmp_path / "artifact", metrics_port=port)
        code, message = run_shell(options, tmp_path / "message")
    assert (code, message["reason"]) == (ExitCode.BAD_INPUT, "BadInput")
    assert f"port {port} (Address already in use)" in str(message["message"])


def test_a_wrong_checkpoint_is_never_published(
    make_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that moved two of three projections would pass every digest; the logits tell."""
    permuted = Span.permuted

    def forget_down(span: Span, data: bytes, order: Tensor) -> bytes:
        return data if "down_proj" in span.name else permuted(span, data, order)

    monkeypatch.setattr(Span, "permuted", forget_down)
    with pytest.raises(RefactorError, match="differs from its source"):
        refactor(make_options(tmp_path / "artifact"), silent)
    assert not (tmp_path / "artifact").exists()


def test_a_model_in_bf16_is_refactored_too(
    artifact: Artifact, make_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where fp32 does not fit in memory."""
    monkeypatch.setattr(job, "compute_dtype", lambda _: torch.bfloat16)
    found = refactor(make_options(tmp_path / "artifact"), silent)
    assert verify(found.path) == []
    for point in found.manifest.operating_points:
        assert point.own_share == pytest.approx(point.level / 100, abs=0.06), point.level
