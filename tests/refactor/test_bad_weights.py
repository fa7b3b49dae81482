"""Weights, tokenizers and texts that cannot be right: an error with file and tensor, the documented
exit code, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prism.artifact import Artifact
from prism.contract import ExitCode
from prism_refactor import shell
from prism_refactor.options import Options
from torch import Tensor

MakeOptions = Callable[..., Options]
Break = Callable[[Path], object]
LAST = "model.layers.1.mlp.experts.3.down_proj.weight"


def edit(path: Path, name: str, change: Callable[[Tensor], Tensor | None], to: str = "") -> None:
    """Change one tensor of a sharded checkpoint, take it away (None) or rename it."""
    from safetensors.torch import load_file, save_file

    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = path / content["weight_map"].pop(name)
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[to or name] = changed
        content["weight_map"][to or name] = file.name
    save_file(tensors, file, metadata={"format": "pt"})
    index.write_text(json.dumps(content))


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.flatten()[-1] = value
        return tensor

    return change


def other_tokenizer(path: Path) -> None:
    """The same letters, each under a number that the model has no embedding for."""
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {word: number + 5000 for word, number in words.items()}
    content["added_tokens"] = []
    file.write_text(json.dumps(content))


def fewer_experts(path: Path) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts": 5}))


CASES: dict[str, tuple[Break, str, tuple[str, ...]]] = {
    "NaN in the last layer": (
        lambda path: edit(path, LAST, poisoned(float("nan"))),
        "CorruptCheckpoint",
        ("1 tensors hold values that are NaN or infinite", ".safetensors: " + LAST),
    ),
    "infinity outside the experts": (
        lambda path: edit(path, "lm_head.weight", poisoned(float("-inf"))),
        "CorruptCheckpoint",
        ("NaN or infinite", ".safetensors: lm_head.weight"),
    ),
    "a tensor is missing": (
        lambda path: edit(path, "model.layers.1.self_attn.q_proj.weight", lambda _: None),
        "CorruptCheckpoint",
        ("1 tensors of the model are not in the files", "layers.1.self_attn.q_proj.weight"),
    ),
    "a tensor has another name": (
        lambda path: edit(path, "model.norm.weight", lambda t: t, "model.normal.weight"),
        "CorruptCheckpoint",
        ("not in the files", "model.norm.weight"),
    ),
    "an expert's tensor is missing": (
        lambda path: edit(path, LAST, lambda _: None),
        "CorruptCheckpoint",
        ("model.layers.1.mlp.experts",),
    ),
    "an expert has another shape": (
        lambda path: edit(path, LAST, lambda t: t[:, :24].contiguous()),
        "CorruptCheckpoint",
        ("model.layers.1.mlp.experts",),
    ),
    "more experts than the config says": (
        fewer_experts,
        "CorruptCheckpoint",
        ("6 tensors of shape", "for the 5 experts"),
    ),
    "another model's tokenizer": (
        other_tokenizer,
        "BadInput",
        ("embeddings for 257", "another model's tokenizer"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_source_that_cannot_be_right(
    checkpoint: Path, make_options: MakeOptions, tmp_path: Path, case: str
) -> None:
    broken, reason, words = CASES[case]
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    broken(source)
    ended_badly(make_options(tmp_path / "artifact", source=str(source)), reason, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["message", "source"]


def test_an_artifact_is_no_source(
    artifact: Artifact, make_options: MakeOptions, tmp_path: Path
) -> None:
    options = make_options(tmp_path / "again", source=str(artifact.path))
    ended_badly(options, "BadInput", ("refactored already", "prism.json"))


def test_a_text_of_one_token(make_options: MakeOptions, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a")
    options = make_options(tmp_path / "artifact", calibration=text)
    ended_badly(options, "TooLittleCalibrationText", ("at least",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["message", "text.txt"]


def ended_badly(options: Options, reason: str, words: tuple[str, ...]) -> None:
    message = options.out.with_name("message")
    code = shell.run(replace(options, termination_message=message))
    found = json.loads(message.read_bytes())
    assert (code, found["reason"]) == (ExitCode.BAD_INPUT, reason), found
    for word in words:
        assert word in found["message"], found


def test_a_large_weight_is_no_fault(checkpoint: Path, tmp_path: Path) -> None:
    from prism_refactor.source import open_source

    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    edit(source, LAST, poisoned(torch.finfo(torch.bfloat16).max))
    assert len(open_source(str(source)).digests()) > 5
