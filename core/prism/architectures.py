"""Which models can be refactored and served, decided before any weight is read.

Knows transformers' experts interface and its flags; builds the model on the meta device (no
memory) and looks. Decision: an allow-rule on what the experts modules declare, not a list of
model names, so new architectures of the plain kind work at once and all others are refused by
name with the reason.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu


class UnsupportedModel(ValueError):
    """A model we cannot refactor or serve: its architecture and why."""

    def __init__(self, architecture: str, reason: str) -> None:
        super().__init__(f"{architecture}: {reason}")
        self.architecture = architecture
        self.reason = reason


def find_expert_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """(module name, experts module) of every layer that uses transformers' experts interface."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "down_proj")
    ]


def require_supported(config: Any) -> list[str]:
    """Names of the experts modules of the model that `config` describes.

    Raises UnsupportedModel. Reads no weight: the model is built on the meta device.
    """
    from transformers import AutoModelForCausalLM

    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            architecture, "the checkpoint is already quantised; use the original weights"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(architecture, "encoder-decoder models are not served")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError) as error:
        reason = f"transformers builds no causal language model from its config ({error})"
        raise UnsupportedModel(architecture, reason) from error
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(
            architecture, "it keeps recurrent state, which paged serving does not hold"
        )
    modules = find_expert_modules(model)
    if not modules:
        raise UnsupportedModel(
            architecture, "it has no experts behind transformers' experts interface"
        )
    for name, module in modules:
        for reason in _obstacles(module):
            raise UnsupportedModel(architecture, f"{name}: {reason}")
    return [name for name, _ in modules]


def _obstacles(module: Any) -> Iterator[str]:
    """Why this experts module is not the plain gated kind; nothing when it is."""
    if not module.has_gate:
        yield "experts without a gate"
    if module.is_transposed:
        yield "transposed expert weights"
    if not module.is_concatenated:
        yield "interleaved gate and up weights"
    if module.has_bias:
        yield "experts with biases"
    if module.has_post_expert_norm:
        yield "a norm after each expert"
    gate_up, down = getattr(module, "gate_up_proj", None), module.down_proj
    if gate_up is None or gate_up.dim() != 3 or down.dim() != 3:
        yield "experts not stored as gate_up_proj [E, 2I, H] and down_proj [E, H, I]"
    elif gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        yield f"expert shapes {tuple(gate_up.shape)} and {tuple(down.shape)} do not fit"
    elif not _is_swiglu(module):
        yield "a gate other than silu(gate) · up"


def _is_swiglu(module: Any) -> bool:
    """Ask the module itself: its own gate on a few values must be silu(gate) · up."""
    probe = torch.linspace(-9, 9, 64).view(4, 16)
    gate, up = probe.chunk(2, dim=-1)
    try:
        return torch.allclose(module._apply_gate(probe), silu(gate) * up, atol=1e-6)
    except (RuntimeError, AttributeError, TypeError):
        return False
