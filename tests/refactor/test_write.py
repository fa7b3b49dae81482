"""Permuting experts inside weight files: every layout, every byte."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prism.architectures import find_expert_modules
from prism.checkpoint import open_checkpoint
from prism_refactor import write
from prism_refactor.errors import RefactorError
from prism_refactor.source import Checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYER = "model.layers.0.mlp.experts"
E, I, H = 2, 6, 4  # noqa: E741
FAMILIES = {"plain": "Olmoe", "mixtral": "Mixtral", "fused": "GraniteMoe"}


def meta_model(layout: str) -> Any:
    """The model whose checkpoints have this layout, without weights."""
    sizes = {"hidden_size": H, "intermediate_size": I, "num_hidden_layers": 1, "vocab_size": 5}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0}
    counts = {"num_experts": E, "num_local_experts": E, "num_experts_per_tok": 1}
    name = FAMILIES[layout]
    config_class = getattr(transformers, f"{name}Config")
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    given = {key: value for key, value in (sizes | heads | counts).items() if key in known}
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config_class(**given))


def tensors(layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    found = {"model.embed.weight": make(5, H), "model.layers.0.mlp.gate.weight": make(E, H)}
    if layout == "fused":
        moe = "model.layers.0.block_sparse_moe"
        return found | {
            f"{moe}.input_linear.weight": make(E, 2 * I, H),
            f"{moe}.output_linear.weight": make(E, H, I),
        }
    names = ("gate_proj", "up_proj", "down_proj") if layout == "plain" else ("w1", "w3", "w2")
    prefix = LAYER if layout == "plain" else "model.layers.0.block_sparse_moe.experts"
    for expert in range(E):
        for name, shape in zip(names, ((I, H), (I, H), (H, I)), strict=True):
            found[f"{prefix}.{expert}.{name}.weight"] = make(*shape)
    return found


def expected(source: dict[str, Tensor], orders: list[Tensor]) -> dict[str, Tensor]:
    moved = {}
    for name, tensor in source.items():
        if name.endswith("input_linear.weight"):
            both = [torch.cat([order, order + I]) for order in orders]
            moved[name] = torch.stack([tensor[e][both[e]] for e in range(E)])
        elif name.endswith("output_linear.weight"):
            moved[name] = torch.stack([tensor[e][:, orders[e]] for e in range(E)])
        elif ".experts." in name:
            order = orders[int(name.split(".experts.")[1].split(".")[0])]
            moved[name] = tensor[:, order] if ("down" in name or "w2" in name) else tensor[order]
        else:
            moved[name] = tensor
    return moved


def checkpoint_of(path: Path) -> Checkpoint:
    entries = open_checkpoint(path)
    return Checkpoint(path, "file://x", None, None, (LAYER,), 1, entries, ("model.safetensors",))


@pytest.mark.parametrize("layout", ["plain", "mixtral", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_neurons_move_and_nothing_else(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    source = tensors(layout, dtype)
    save_file(source, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = checkpoint_of(tmp_path)
    orders = [torch.tensor([3, 1, 0, 5, 4, 2]), torch.tensor([5, 4, 3, 2, 1, 0])]
    to = tmp_path / "to"
    to.mkdir()
    model = meta_model(layout)
    places = write.blocks(checkpoint, model)
    ((layer, _),) = find_expert_modules(model)
    by_key = {f"{layer}.{e}": order for e, order in enumerate(orders)}
    write.write_shard(checkpoint.shards[0], places, by_key, to)
    written = load_file(to / "model.safetensors")
    wanted = expected(source, orders)
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], tensor), name
    files = checkpoint.shards[0].read_bytes(), (to / "model.safetensors").read_bytes()
    end = int.from_bytes(files[0][:8], "little") + 8
    assert files[0][:end] == files[1][:end]


def test_files_without_the_experts_are_refused(tmp_path: Path) -> None:
    save_file({"model.other.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(RefactorError, match=r"no tensors in the files for .*experts\.down_proj"):
        write.blocks(checkpoint_of(tmp_path), meta_model("plain"))


def test_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    source = tensors("plain", torch.float32)
    for expert in range(E):
        source[f"{LAYER}.{expert}.down_proj.weight"] = torch.zeros(H + 1, I)
    save_file(source, tmp_path / "model.safetensors")
    with pytest.raises(RefactorError, match=r"expert 0 is \(5, 6\) in the files, \(4, 6\) in the"):
        write.blocks(checkpoint_of(tmp_path), meta_model("plain"))


def test_a_shard_appears_only_when_whole(tmp_path: Path) -> None:
    save_file(tensors("plain", torch.float32), tmp_path / "model.safetensors")
    checkpoint = checkpoint_of(tmp_path)
    to = tmp_path / "to"
    to.mkdir()
    places = write.blocks(checkpoint, meta_model("plain"))
    with pytest.raises(KeyError):  # an order is missing: the write breaks off
        write.write_shard(checkpoint.shards[0], places, {}, to)
    assert not (to / "model.safetensors").exists()
