"""Sources that cannot be refactored are refused at once, with a reason and what to do."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from prism.contract import ExitCode
from prism_cli.main import main
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.source import open_source, require_divisible

Break = Callable[[Path], object]


def edit_config(**changes: object) -> Break:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def shard(path: Path) -> Path:
    return sorted(path.glob("*.safetensors"))[0]


def truncate(path: Path) -> None:
    data = shard(path).read_bytes()
    shard(path).write_bytes(data[: len(data) // 2])


def break_header(path: Path) -> None:
    data = bytearray(shard(path).read_bytes())
    data[20:40] = b"\xff" * 20
    shard(path).write_bytes(bytes(data))


def promise_a_tensor(path: Path) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra.weight"] = shard(path).name
    file.write_text(json.dumps(index))


def copy_a_tensor_into_another_shard(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = sorted(path.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, metadata={"format": "pt"})


def call_it_refactored(path: Path) -> None:
    (path / "prism").mkdir()
    (path / "prism" / "prism.json").write_text("{}")


DENSE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 4,
}

CASES: dict[str, tuple[Break, Reason, str]] = {
    "no config": (
        lambda path: (path / "config.json").unlink(),
        Reason.SOURCE_NOT_FOUND,
        "no config.json",
    ),
    "config is no json": (
        lambda path: (path / "config.json").write_text("{"),
        Reason.CORRUPT_CHECKPOINT,
        "not JSON",
    ),
    "no model type": (
        lambda path: (path / "config.json").write_text("{}"),
        Reason.CORRUPT_CHECKPOINT,
        "model_type",
    ),
    "unknown model": (
        edit_config(model_type="never_heard_of"),
        Reason.UNSUPPORTED_ARCHITECTURE,
        "never_heard_of",
    ),
    "dense model": (edit_config(**DENSE), Reason.UNSUPPORTED_ARCHITECTURE, "LlamaForCausalLM"),
    "quantised": (
        edit_config(quantization_config={"quant_method": "fp8"}),
        Reason.QUANTISED_CHECKPOINT,
        "original weights",
    ),
    "truncated": (truncate, Reason.CORRUPT_CHECKPOINT, "truncated"),
    "broken header": (break_header, Reason.CORRUPT_CHECKPOINT, "header"),
    "missing shard": (
        lambda path: shard(path).unlink(),
        Reason.CORRUPT_CHECKPOINT,
        "No such file",
    ),
    "missing tensor": (promise_a_tensor, Reason.CORRUPT_CHECKPOINT, "model.extra.weight"),
    "no weights": (
        lambda path: [file.unlink() for file in path.glob("model*")],
        Reason.CORRUPT_CHECKPOINT,
        "model.safetensors",
    ),
    "a tensor in two shards": (
        copy_a_tensor_into_another_shard,
        Reason.CORRUPT_CHECKPOINT,
        "keep one",
    ),
    "refactored already": (call_it_refactored, Reason.BAD_INPUT, "refactored already"),
    "no tokenizer": (
        lambda path: (path / "tokenizer.json").unlink(),
        Reason.BAD_INPUT,
        "no tokenizer",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, case: str) -> None:
    broken, reason, words = CASES[case]
    path = tmp_path / "source"
    shutil.copytree(checkpoint, path)
    broken(path)
    with pytest.raises(RefactorError) as caught:
        open_source(str(path))
    assert caught.value.reason is reason
    assert words in caught.value.message
    assert caught.value.exit_code is ExitCode.BAD_INPUT


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/no/such/directory", "No directory"),
        ("./missing", "No directory"),
        ("not an id", "no hub id"),
        ("pvc://claim/path", "--source-uri"),
    ],
)
def test_source_that_is_nowhere(source: str, words: str) -> None:
    with pytest.raises(RefactorError, match=words):
        open_source(source)


def test_unreachable_hub_may_be_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(RefactorError, match="cannot be reached") as caught:
        open_source("hf://org/model@v1")
    assert caught.value.exit_code is ExitCode.FAILED


def test_hub_id_resolves_to_the_commit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "0123abc"
    snapshot.symlink_to(checkpoint)
    asked: list[object] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend((name, revision))
        assert "*.bin" not in allow_patterns
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    found = open_source("hf://org/model@main")
    assert asked == ["org/model", "main"]
    assert (found.uri, found.revision) == ("hf://org/model", "0123abc")


def test_pickles_stay_behind_and_papers_come_along(checkpoint: Path) -> None:
    found = open_source(str(checkpoint), uri="pvc://models/tiny")
    assert found.uri == "pvc://models/tiny"
    assert "pytorch_model.bin" not in found.files
    papers = {"README.md", "LICENSE", "chat_template.jinja", "tokenizer.json", "config.json"}
    assert papers <= set(found.files)
    assert len(found.shards) > 1
    assert {path.name for path in found.shards} < set(found.files)


def test_digests_cover_every_file(checkpoint: Path) -> None:
    found = open_source(str(checkpoint))
    digests = found.digests()
    assert tuple(digests) == found.files
    assert all(len(digest) == 64 for digest in digests.values())


@pytest.mark.parametrize("sub_experts", [5, 32])
def test_sub_experts_must_divide_the_expert(checkpoint: Path, sub_experts: int) -> None:
    with pytest.raises(RefactorError, match="cannot be cut") as caught:
        require_divisible(open_source(str(checkpoint)), sub_experts, 48)
    assert caught.value.reason is Reason.BAD_INPUT


def test_directory_that_comes_late_is_waited_for(checkpoint: Path, tmp_path: Path) -> None:
    late, here = tmp_path / "late", Path(shutil.copytree(checkpoint, tmp_path / "here"))
    timer = threading.Timer(0.3, lambda: here.rename(late))
    timer.start()
    assert open_source(str(late), wait_s=20).path == late
    timer.join()


def test_waiting_for_a_directory_ends(tmp_path: Path) -> None:
    with pytest.raises(RefactorError) as caught:
        open_source(str(tmp_path / "never"), wait_s=1)
    assert caught.value.reason == Reason.SOURCE_NOT_FOUND


UNSERVABLE = edit_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})


def test_what_cannot_be_served_is_said_before_the_work(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    UNSERVABLE(path)
    assert open_source(str(path)).layers
    assert "`prism serve` will refuse it: rope type 'dynamic'" in caplog.text


def test_what_cannot_be_served_is_refused_where_it_is_to_be_served(
    checkpoint: Path, corpus_file: Path, tmp_path: Path
) -> None:
    path, message = Path(shutil.copytree(checkpoint, tmp_path / "copy")), tmp_path / "message"
    out = tmp_path / "out" / "artifact"
    command = ["refactor", str(path), "--out", str(out), "--calibration", str(corpus_file)]
    command += ["--sub-experts", "4", "--servable", "--termination-message", str(message)]
    assert open_source(str(path), servable=True).layers
    UNSERVABLE(path)
    assert main(command) == ExitCode.BAD_INPUT
    said = json.loads(message.read_text())
    assert said["reason"] == Reason.UNSUPPORTED_ARCHITECTURE
    assert "OlmoeForCausalLM" in said["message"] and "rope type 'dynamic'" in said["message"]
    assert not out.parent.exists(), "nothing was begun"
