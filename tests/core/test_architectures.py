"""What is supported is decided from the config, and every refusal says why."""

from typing import Any

import pytest
import torch
import transformers
from prism.architectures import (
    UnsupportedModel,
    examine,
    flow,
    require_servable,
    require_supported,
    tracing,
)
from prism.architectures.small import small_config
from torch import Tensor, nn

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
    found = require_supported(config(name))
    assert found.layers == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    require_servable(config(name))


def test_other_gates_and_layouts_are_supported() -> None:
    assert examine(config("Olmoe", hidden_act="gelu")).serve_obstacle is None
    found = examine(small_config("gpt_oss"))  # transposed, interleaved, biased, a gate of its own
    assert found.refactor_obstacle is None
    assert found.experts_per_token == 2
    assert "attention sinks" in str(found.serve_obstacle)


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("Llama", {}, "no experts behind transformers' experts interface"),
        ("Mamba", {}, "no experts behind transformers' experts interface"),
        ("Olmoe", {"quantization_config": {"quant_method": "fp8"}}, "already quantised"),
        ("Mixtral", {"quantization_config": {"quant_method": "awq"}}, "already quantised"),
        ("Qwen3Moe", {"quantization_config": {"quant_method": "gptq"}}, "already quantised"),
        ("Gemma4", {"text_config": {"quantization_config": {}}}, "already quantised"),
        ("T5", {}, "encoder-decoder"),
        ("ViT", {}, "builds no causal language model"),
    ],
)
def test_refusal_names_architecture_and_reason(
    name: str, more: dict[str, Any], reason: str
) -> None:
    given = config(name, **more)
    for require in (require_supported, require_servable):
        with pytest.raises(UnsupportedModel, match=reason) as caught:
            require(given)
        assert caught.value.architecture == name


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("zaya", "return more than a hidden state"),
        ("inkling2_text", "reads the output of earlier decoder layers"),
        ("qwen4_exp_text", "cannot be followed without weights"),
    ],
)
def test_layers_that_cannot_run_one_at_a_time_are_refused(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        require_supported(small_config(model_type))


@pytest.mark.parametrize(
    ("model_type", "more", "reason"),
    [
        ("qwen3_next", {}, "recurrent state"),
        ("lfm2_moe", {}, "convolves over tokens"),
        ("minimax", {}, "not all its layers use plain attention"),
        ("axk2", {}, "needs a mask of its own"),
        ("mixtral", {"sliding_window": 8}, "sliding-window attention"),
        ("olmoe", {"rope": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)
def test_what_the_engine_lacks_is_refactored_and_not_served(
    model_type: str, more: dict[str, Any], reason: str
) -> None:
    given = small_config(model_type)
    for name, value in more.items():
        if name == "rope":
            name, value = "rope_parameters", given.rope_parameters | value
        setattr(given, name, value)
    assert require_supported(given).layers
    with pytest.raises(UnsupportedModel, match=reason):
        require_servable(given)


def test_a_norm_after_each_expert_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    made = OlmoeExperts.__init__

    def with_norm(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.has_post_expert_norm = True

    monkeypatch.setattr(OlmoeExperts, "__init__", with_norm)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.experts: a norm after each"):
        require_supported(config("Olmoe"))


class Layer(nn.Module):
    """A decoder layer that can do what real ones do to each other's hidden state."""

    def __init__(self, returns: str = "hidden") -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._returns = returns

    def forward(self, hidden: Tensor, shared: dict[str, Tensor] | None = None) -> Any:
        out = self.linear(hidden) + sum((shared or {}).values(), torch.zeros_like(hidden))
        if shared is not None:
            shared["keys"] = out * 2
        return (out, None) if self._returns == "tuple" else out


class Decoder(nn.Module):
    """Three layers, and one way of running them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer("tuple" if way == "tuple" else "hidden") for _ in range(3)
        )
        self._way = way

    def forward(self, hidden: Tensor) -> Tensor:
        first, bias, shared = hidden, hidden * 3, {}
        order = self.layers[::-1] if self._way == "backwards" else self.layers
        seen = []
        for layer in order:
            if self._way == "keyword":
                hidden = layer(hidden=hidden)
            elif self._way == "shared":
                hidden = layer(hidden, shared)
            elif self._way == "embedding":
                hidden = layer(hidden, {"bias": bias[:, :1]})  # made before the layers: allowed
            elif self._way == "tuple":
                hidden = layer(hidden)[0]
            elif self._way == "between":
                hidden = layer(hidden) + first
            else:
                hidden = layer(hidden)
            seen.append(hidden)
        return hidden + seen[0] if self._way == "late" else hidden + first


@pytest.mark.parametrize(
    ("way", "obstacle"),
    [
        ("plain", None),
        ("embedding", None),
        ("tuple", "return more than a hidden state"),
        ("shared", "hand more than one hidden state to each other"),
        ("between", "computes on the hidden state between"),
        ("late", "reads the output of earlier decoder layers after the last"),
        ("keyword", "do not take the hidden state as first argument"),
        ("backwards", "do not run once each, in order"),
    ],
)
def test_lineage_between_layers_is_followed(
    monkeypatch: pytest.MonkeyPatch, way: str, obstacle: str | None
) -> None:
    model = Decoder(way).to("meta")

    def run(given: Any, attention: str) -> tracing.Trace:
        given(torch.zeros(2, 3, 4, device="meta"))
        return tracing.Trace()

    monkeypatch.setattr(flow, "trace", run)
    _, found = flow.trace_layers(model, model.layers, tracing.NOTED)
    assert found == obstacle or (obstacle and found and obstacle in found)
