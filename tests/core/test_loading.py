"""Loading from a directory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from prism.architectures import UnsupportedModel
from prism.loading import load_model


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
    (path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(UnsupportedModel, match="a gate other than"):
        load_model(path, torch.float32)
