"""Attention over our own KV buffers, as transformers' attention interface wants it.

Knows: where each sequence's keys and values lie. Must not know: scheduling, levels, sampling, how
attention is computed (prism.kernels.layers does).

One decision worth arguing about: what a layer asks for and we cannot do (sliding window, sinks,
soft-capping, a mask of its own) is refused by name in the probe at load, so a model is never served
with attention it was not trained with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from prism.architectures.attention import call_obstacles
from prism.kernels.layers import Layers, StepRows, choose_layers

NAME: Final = "prism_attention"


class UnsupportedAttention(ValueError):
    """The model needs an attention this engine does not have; the message names it."""


@dataclass(slots=True)
class KvBuffers:
    """Keys and values of all layers, [kv_heads, kv_tokens, dim] each."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    layers: Layers

    @staticmethod
    def like(shapes: "ProbeResult", kv_tokens: int, device: torch.device) -> "KvBuffers":
        """Buffers for what the probe saw."""
        layers = shapes.layers(device)

        def buffer(heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
            held = layers.buffer_dtype(dtype, device)
            return torch.zeros(heads, kv_tokens, dim, dtype=held, device=device)

        keys, values = shapes.keys, shapes.values
        return KvBuffers([buffer(*s) for s in keys], [buffer(*s) for s in values], layers)


@dataclass(slots=True)
class ProbeResult:
    """(heads, dim, dtype) of keys and values per layer, in layer order."""

    keys: list[tuple[int, int, torch.dtype]] = field(default_factory=list)
    values: list[tuple[int, int, torch.dtype]] = field(default_factory=list)

    def layers(self, device: torch.device) -> Layers:
        """What computes this model's attention; one for all its layers."""
        return choose_layers(device, self.keys[0][2], max(dim for _, dim, _ in self.keys))

    def bytes_per_token(self, device: torch.device) -> int:
        """KV bytes of one token over all layers."""
        layers = self.layers(device)
        both = (*self.keys, *self.values)
        return sum(h * d * layers.buffer_dtype(t, device).itemsize for h, d, t in both)


@dataclass(slots=True)
class AttentionBatch:
    """One step: where its sequences lie in the buffers."""

    buffers: KvBuffers
    rows: StepRows


_batch: ContextVar[AttentionBatch | ProbeResult | None] = ContextVar(
    "prism_attention", default=None
)


@contextmanager
def attention_batch(batch: AttentionBatch | ProbeResult) -> Iterator[None]:
    """Make `batch` the one that forwards in this thread see."""
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)


def is_stepping() -> bool:
    """Whether the running forward is a step of the engine, not somebody else's or the probe."""
    return isinstance(_batch.get(), AttentionBatch)


def attention(
    module: Any,  # a transformers attention layer; they share no base class
    query: torch.Tensor,  # [1, heads, T, dim]
    key: torch.Tensor,  # [1, kv_heads, T, dim]
    value: torch.Tensor,  # [1, kv_heads, T, value_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,  # what the model passes on; the probe refuses what we would ignore
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: returns [1, T, heads, value_dim]."""
    batch = _batch.get()
    if isinstance(batch, ProbeResult):
        return _probe(batch, module, query, key, value, attention_mask, scaling, kwargs), None
    if batch is None:
        raise RuntimeError("prism_attention was called outside of attention_batch()")
    layer: int = module.layer_idx
    out = batch.buffers.layers.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        batch.buffers.keys[layer],
        batch.buffers.values[layer],
        batch.rows,
        query.shape[3] ** -0.5 if scaling is None else scaling,
    )
    return out[None], None


def _probe(
    result: ProbeResult,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    if asked := call_obstacles(module, mask, kwargs):
        raise UnsupportedAttention(
            f"layer {module.layer_idx} ({type(module).__name__}) needs {', '.join(asked)}, "
            "which this engine does not have"
        )
    if module.layer_idx != len(result.keys):
        raise UnsupportedAttention(
            f"layer {len(result.keys)} does not use plain attention (layer {module.layer_idx} "
            "came first): recurrent or shared layers cannot be served"
        )
    result.keys.append((key.shape[1], key.shape[3], key.dtype))
    result.values.append((value.shape[1], value.shape[3], value.dtype))
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2)
