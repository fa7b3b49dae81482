"""A model that comes from disk one layer at a time computes what the whole model does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from prism.checkpoint import CheckpointError
from prism.loading import load_model
from prism.streaming import StreamedModel
from torch import Tensor

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-moe"
IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


def logits_of(model: StreamedModel, ids: Tensor) -> Tensor:
    batch = model.batch(ids)
    hidden = batch.embedded
    for place in range(len(model.layers)):
        with model.loaded(place):
            hidden = model.run(place, hidden, batch)
    return model.logits(ids, hidden)


@pytest.fixture(scope="module")
def streamed() -> StreamedModel:
    return StreamedModel(EXAMPLE, torch.float32)


def test_streamed_logits_are_those_of_the_whole_model(streamed: StreamedModel) -> None:
    whole, _ = load_model(EXAMPLE, torch.float32)
    with torch.inference_mode():
        expected = whole(IDS).logits
    assert torch.equal(logits_of(streamed, IDS), expected)
    assert torch.equal(logits_of(streamed, IDS), expected)  # and nothing of a pass stays


def test_only_the_layer_at_work_has_weights(streamed: StreamedModel) -> None:
    def on_meta(place: int) -> bool:
        return all(p.is_meta for p in streamed.layers[place].parameters())

    assert all(map(on_meta, range(len(streamed.layers))))
    with streamed.loaded(3):
        assert [on_meta(place) for place in range(6)] == [True, True, True, False, True, True]
    assert on_meta(3)
    assert "forward" not in vars(streamed.layers[0])
    assert streamed.moe == {place: place for place in range(6)}


def test_a_layer_is_freed_when_its_work_fails(streamed: StreamedModel) -> None:
    with pytest.raises(RuntimeError, match="stop"), streamed.loaded(0):
        raise RuntimeError("stop")
    assert all(p.is_meta for p in streamed.layers[0].parameters())


def test_a_missing_tensor_of_a_late_layer_is_named_at_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(EXAMPLE, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.gate.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"first model\.layers\.2\.mlp\.gate\.weight"):
        StreamedModel(tmp_path / "model", torch.float32)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"vocab_size": 5000}))
    with pytest.raises(CheckpointError, match=r"do not fit config\.json"):
        StreamedModel(tmp_path / "model", torch.float32)
