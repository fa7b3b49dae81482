"""What the engine's attention and its paged keys and values cannot do for a model.

Knows the rules, for whoever holds a call of transformers' attention interface: the check before any
weight is read, and the engine's own probe at load. Decision: refuse what was asked for rather than
what a config says, and refuse everything that is not plain causal attention, so that a model is
never served with attention it was not trained with.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn

from prism.architectures.tracing import AttentionCall

_REFUSED: Final = {
    "sliding_window": "sliding-window attention",
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "attention_chunk_size": "chunked attention",
}
_SWEEPING_ROPE: Final = ("dynamic", "longrope")


def call_obstacles(module: Any, mask: Any, options: Mapping[str, Any]) -> list[str]:
    """What one call of the attention interface asks for that the engine does not have."""
    asked = [what for name, what in _REFUSED.items() if options.get(name) is not None]
    if mask is not None:
        asked.append("an attention mask of its own")
    if not getattr(module, "is_causal", True):
        asked.append("attention that is not causal")
    return asked


def serving_obstacle(model: Any, config: Any, calls: list[AttentionCall]) -> str | None:
    """Why the engine cannot serve a model that makes these calls; None when it can."""
    return next(_obstacles(model, config.get_text_config(), calls), None)


def _obstacles(model: Any, config: Any, calls: list[AttentionCall]) -> Iterator[str]:
    if getattr(model, "_is_stateful", False):
        yield "it keeps recurrent state, which paged serving does not hold"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        yield "it convolves over tokens, which paged serving holds no state for"
    for kind in _rope_types(config):
        if kind in _SWEEPING_ROPE:
            yield f"rope type {kind!r} depends on the batch and cannot be served yet"
    for call in calls:
        if asked := call_obstacles(call.module, call.mask, call.options):
            yield f"it needs {', '.join(asked)}, which the engine does not have"
    layers = [getattr(call.module, "layer_idx", None) for call in calls]
    if layers != list(range(config.num_hidden_layers)):
        yield "not all its layers use plain attention with keys and values of their own"


def _rope_types(config: Any) -> list[str]:
    """Of all layers; some configs keep one set of parameters for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [one["rope_type"] for one in sets if "rope_type" in one]
