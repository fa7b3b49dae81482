"""Loading from a directory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from prism.architectures import UnsupportedModel
from prism.checkpoint import CheckpointError
from prism.loading import load_model
from safetensors.torch import load_file, save_file


def test_model_and_tokenizer_load_ready_for_inference(checkpoint: Path) -> None:
    model, tokenizer = load_model(checkpoint, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.convert_tokens_to_ids("w5") == 5


def test_unsupported_model_is_refused_before_weights_are_read(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (path / "model.safetensors").unlink()  # reading weights would fail in another way
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(UnsupportedModel, match="already quantised"):
        load_model(path, torch.float32)


def _copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_a_missing_tensor_is_named_and_never_made_up(checkpoint: Path, tmp_path: Path) -> None:
    path = _copy(checkpoint, tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not in the files, first lm_head\.weight"):
        load_model(path, torch.float32)


def test_a_tensor_of_another_shape_than_the_config_says_is_named(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = _copy(checkpoint, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 65}))
    with pytest.raises(CheckpointError, match=r"do not fit config\.json.*\(64, 32\).*\(65, 32\)"):
        load_model(path, torch.float32)


def test_an_unreadable_tokenizer_is_an_error_of_the_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = _copy(checkpoint, tmp_path)
    (path / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        load_model(path, torch.float32)
