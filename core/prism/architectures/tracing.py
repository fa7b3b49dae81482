"""Run a model once without weights and note what it asks of its experts and its attention.

Knows transformers' interfaces for both; judges nothing. Decision: what a model needs is found by
running its own code on the meta device (no memory, milliseconds a layer), not by reading its
config, because configs name one thing in a dozen ways.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

TOKENS = 12
_IMPLEMENTATION = "prism_trace"
NOTED = _IMPLEMENTATION


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """One call of an experts module."""

    module: nn.Module
    tokens: int
    slots: int  # experts that a token is routed to


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of the attention interface."""

    module: Any  # attention layers share no base class
    mask: Tensor | None
    options: dict[str, Any]  # keyword arguments beyond scaling and dropout


@dataclass(slots=True)
class Trace:
    """What one forward pass over TOKENS tokens asked, in order."""

    experts: list[ExpertsCall] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    failure: str | None = None  # why it could not be run with attention noted


_trace: ContextVar[Trace] = ContextVar("prism_trace")


def trace(model: Any, attention: str) -> Trace:
    """Run `model`, which lies on the meta device, once; no weight is read.

    With attention NOTED its calls are noted, and the model runs as in an engine that masks on its
    own; "eager" is the model's own, noted nowhere. Raises what the model's code raises.
    """
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(_IMPLEMENTATION, _experts)
    AttentionInterface.register(_IMPLEMENTATION, _attention)
    # Fake tensors: a model that makes masks asks positions for values, unless it is being traced.
    # They are ten times slower, and with attention noted no mask is made.
    fake = nullcontext() if attention == NOTED else FakeTensorMode(allow_non_fake_inputs=True)
    with _implementations(model, attention), _fixed_rope(model), torch.inference_mode(), fake:
        ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
        noted = Trace()
        token = _trace.set(noted)
        try:
            model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
        finally:
            _trace.reset(token)
    return noted


@contextmanager
def _implementations(model: Any, attention: str) -> Iterator[None]:
    experts = model.get_experts_implementation()
    before = model.config._attn_implementation
    model.set_experts_implementation(_IMPLEMENTATION)
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_experts_implementation(experts)
        model.set_attn_implementation(before)


@contextmanager
def _fixed_rope(model: nn.Module) -> Iterator[None]:
    """Rotary embeddings that follow the longest position (dynamic, longrope) would ask for it."""
    before: list[tuple[Any, Any]] = [
        (module, module.rope_type) for module in model.modules() if hasattr(module, "rope_type")
    ]
    for module, kind in before:
        many = isinstance(kind, dict)  # one for each kind of layer
        module.rope_type = dict.fromkeys(kind, "default") if many else "default"
    try:
        yield
    finally:
        for module, kind in before:
            module.rope_type = kind


def _experts(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    _trace.get().experts.append(ExpertsCall(module, x.shape[0], index.shape[-1]))
    return x * (weights.sum() + index.sum()).to(x.dtype)  # follows from all that experts are given


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    del scaling, dropout
    _trace.get().attention.append(AttentionCall(module, attention_mask, options))
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    out = out + query.sum() + key.sum() + value.sum()
    return out.transpose(1, 2).contiguous(), None
