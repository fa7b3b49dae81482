"""Experts are found in files by transformers' own rules, and permuted there in every layout."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prism import conversion, places
from prism.architectures import find_expert_modules
from prism.architectures.small import small_config
from prism.blocks import block_tensors
from prism.checkpoint import CheckpointError, TensorEntry, open_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

LAYER = "model.layers.0.mlp.experts"
E, I, H = 8, 32, 64  # noqa: E741 - as small configs have them

PER_EXPERT = [
    WeightConverter(
        ["experts.*.a.weight", "experts.*.b.weight"],
        "experts.gate_up_proj",
        [MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter("experts.*.c.weight", "experts.down_proj", [MergeModulelist(dim=0)]),
]
INTERLEAVED = [
    WeightConverter("experts.w13", "experts.gate_up_proj", [Interleave(dim=1)]),
    WeightConverter("experts.w2", "experts.down_proj", [Transpose(1, 2)]),
]
TRANSPOSED = [
    WeightConverter("experts.w13", "experts.gate_up_proj", [Transpose(1, 2), Interleave(dim=1)]),
    WeightConverter("experts.w2", "experts.down_proj", [Transpose(-1, -2)]),
]
FILES = {
    "per expert": (
        PER_EXPERT,
        {f"{LAYER}.{e}.{part}.weight": (I, H) for e in range(E) for part in "ab"}
        | {f"{LAYER}.{e}.c.weight": (H, I) for e in range(E)},
    ),
    "interleaved": (INTERLEAVED, {f"{LAYER}.w13": (E, 2 * I, H), f"{LAYER}.w2": (E, I, H)}),
    "transposed": (TRANSPOSED, {f"{LAYER}.w13": (E, H, 2 * I), f"{LAYER}.w2": (E, I, H)}),
    "as in the model": (
        [],
        {f"{LAYER}.gate_up_proj": (E, 2 * I, H), f"{LAYER}.down_proj": (E, H, I)},
    ),
}


def meta_model(model_type: str = "olmoe") -> Any:
    config = small_config(model_type)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    return open_checkpoint(path)


def use_rules(monkeypatch: pytest.MonkeyPatch, rules: list[Any]) -> None:
    def given(model: Any) -> list[Any]:
        return deepcopy(rules)

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", given)


def loaded(rules: list[Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """gate_up_proj and down_proj as transformers makes them of the files."""
    if not rules:
        return {name.rpartition(".")[2]: tensor.clone() for name, tensor in tensors.items()}
    found = {}
    for rule in deepcopy(rules):
        target = f"model.layers.0.mlp.{rule.target_patterns[0]}"
        for name in sorted(tensors):
            renamed, pattern = rule.rename_source_key(name)
            if pattern is not None:
                rule.add_tensor(target, name, pattern, tensors[name])
                assert renamed == target
        made = rule.convert(target)[target]
        found[target.rpartition(".")[2]] = made[0] if isinstance(made, list) else made
    return found


@pytest.mark.parametrize("layout", FILES)
def test_neurons_move_in_files_as_they_would_in_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str
) -> None:
    rules, shapes = FILES[layout]
    entries = write(tmp_path, shapes)
    model = meta_model()
    use_rules(monkeypatch, rules)
    blocks = places.expert_blocks(model, find_expert_modules(model), entries)
    order = torch.randperm(I, generator=torch.Generator().manual_seed(1))
    before = loaded(rules, load_file(tmp_path / "model.safetensors"))
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    for span in blocks[f"{LAYER}.5"].spans:
        at = slice(span.entry.start, span.entry.end)
        data[at] = span.permuted(bytes(data[at]), order)
    file.write_bytes(data)
    after = loaded(rules, load_file(file))
    expected = {name: tensor.clone() for name, tensor in before.items()}
    expected["gate_up_proj"][5] = before["gate_up_proj"][5][torch.cat([order, order + I])]
    expected["down_proj"][5] = before["down_proj"][5][:, order]
    for name, tensor in expected.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("layout", FILES)
def test_blocks_are_found_again_by_the_recorded_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str
) -> None:
    rules, shapes = FILES[layout]
    entries = write(tmp_path, shapes)
    model = meta_model()
    use_rules(monkeypatch, rules)
    blocks = places.expert_blocks(model, find_expert_modules(model), entries)
    templates = places.block_templates(blocks, [LAYER])[LAYER]
    assert all("{}" in template for template in templates)
    for expert in range(E):
        found = block_tensors(entries, LAYER, expert, templates)
        assert found == blocks[f"{LAYER}.{expert}"].tensors


def test_gptoss_keeps_its_biases_beside_its_neurons(tmp_path: Path) -> None:
    """Interleaved and transposed in the model itself; the bias of down is no neuron's."""
    shapes = {
        f"{LAYER}.gate_up_proj": (E, H, 2 * I),
        f"{LAYER}.gate_up_proj_bias": (E, 2 * I),
        f"{LAYER}.down_proj": (E, I, H),
        f"{LAYER}.down_proj_bias": (E, H),
    }
    entries, model = write(tmp_path, shapes), meta_model("gpt_oss")
    block = places.expert_blocks(model, find_expert_modules(model), entries)[f"{LAYER}.2"]
    assert [span.name for span in block.spans] == [
        f"{LAYER}.gate_up_proj[2]",
        f"{LAYER}.gate_up_proj_bias[2]",
        f"{LAYER}.down_proj[2]",
    ]
    order = torch.arange(I).flip(0)
    data = block.spans[1].entry.read()
    both = torch.frombuffer(bytearray(data), dtype=torch.float32).view(I, 2)
    moved = block.spans[1].permuted(data, order)
    assert torch.equal(
        torch.frombuffer(bytearray(moved), dtype=torch.float32).view(I, 2), both[order]
    )


class Scale(Interleave):
    """An operation that transformers may get and we do not know."""


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (WeightConverter("experts.w13", "experts.gate_up_proj", [Scale(1)]), "converts them with"),
        (
            WeightConverter("experts.w13", "experts.gate_up_proj", [Transpose(0, 1)]),
            r"converts them with Transpose",
        ),
        (
            WeightConverter("experts.w13", "experts.gate_up_proj", [Interleave(1, inverse=True)]),
            r"converts them with Interleave\(dim=1\)",
        ),
    ],
)
def test_rules_that_cannot_be_followed_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rule: Any, message: str
) -> None:
    entries = write(tmp_path, {f"{LAYER}.w13": (E, 2 * I, H), f"{LAYER}.w2": (E, I, H)})
    use_rules(monkeypatch, [rule, INTERLEAVED[1]])
    model = meta_model()
    with pytest.raises(conversion.UnknownRule, match=message):
        places.expert_blocks(model, find_expert_modules(model), entries)


def test_experts_in_eight_bits_are_refused(tmp_path: Path) -> None:
    shapes = {f"{LAYER}.gate_up_proj": (E, 2 * I, H), f"{LAYER}.down_proj": (E, H, I)}
    tensors = {name: torch.zeros(shape).to(torch.float8_e4m3fn) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = meta_model()
    with pytest.raises(conversion.UnknownRule, match=r"down_proj: experts stored as F8_E4M3"):
        places.expert_blocks(model, find_expert_modules(model), open_checkpoint(tmp_path))


def test_a_missing_expert_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rules, shapes = FILES["per expert"]
    entries = write(tmp_path, {n: s for n, s in shapes.items() if ".3.b." not in n})
    use_rules(monkeypatch, rules)
    model = meta_model()
    with pytest.raises(CheckpointError, match=r"0\.b\.weight: 7 tensors of shape .* 8 experts"):
        places.expert_blocks(model, find_expert_modules(model), entries)


def test_names_that_follow_no_pattern_are_refused(tmp_path: Path) -> None:
    entry = TensorEntry(tmp_path / "x", "F32", (1,), 0, 4)

    def block(name: str) -> places.Block:
        return places.Block((places.Span(entry, name, ()),))

    names = ["e.0.w", "e.1.w", "e.7.w"]
    blocks = {f"{LAYER}.{e}": block(name) for e, name in enumerate(names)}
    with pytest.raises(conversion.UnknownRule, match=r"e\.7\.w: no name by the pattern e\.\{\}\.w"):
        places.block_templates(blocks, [LAYER])
