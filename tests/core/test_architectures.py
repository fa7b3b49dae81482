"""What is supported is decided from the config, and every refusal says why."""

from typing import Any

import pytest
import transformers
from prism.architectures import UnsupportedModel, require_supported

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(name: str, **more: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**{**SMALL, **more}, architectures=[name])


@pytest.mark.parametrize("name", ["Olmoe", "Mixtral", "Qwen3Moe"])
def test_plain_gated_experts_are_supported(name: str) -> None:
    names = require_supported(config(name))
    assert names == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("Llama", {}, "no experts behind transformers' experts interface"),
        ("GptOss", {}, "transposed expert weights"),
        ("Olmoe", {"hidden_act": "gelu"}, r"a gate other than silu\(gate\)"),
        ("Olmoe", {"quantization_config": {"quant_method": "fp8"}}, "already quantised"),
        ("Mamba", {}, "recurrent state"),
        ("T5", {}, "encoder-decoder"),
        ("Vit", {}, "builds no causal language model"),
    ],
)
def test_refusal_names_architecture_and_reason(
    name: str, more: dict[str, Any], reason: str
) -> None:
    name = {"Vit": "ViT"}.get(name, name)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        require_supported(config(name, **more))
    assert caught.value.architecture == name
