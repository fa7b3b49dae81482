"""Attention over our own KV buffers, as transformers' attention interface wants it.

Knows: where each sequence's keys and values lie. Must not know: scheduling,
levels, sampling.

On a CPU the buffers hold fp32 whatever the model's dtype: SDPA's decode path reads bf16 keys about
five times slower than fp32 ones there (measured, 450 keys, 4 heads: 276 against 48 us).

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

from prism_serving.engine.causal import attend

NAME: Final = "prism_attention"


class UnsupportedAttention(ValueError):
    """The model needs an attention this engine does not have; the message names it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [begin, end) of a step: one sequence, with `past` cached keys from `kv_start`."""

    begin: int
    end: int
    kv_start: int
    past: int


@dataclass(slots=True)
class KvBuffers:
    """Keys and values of all layers, [kv_tokens, heads, dim] each."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @staticmethod
    def like(shapes: "ProbeResult", kv_tokens: int, device: torch.device) -> "KvBuffers":
        """Buffers for what the probe saw."""
        keys = [_buffer(s, kv_tokens, device) for s in shapes.keys]
        values = [_buffer(s, kv_tokens, device) for s in shapes.values]
        return KvBuffers(keys, values)


@dataclass(slots=True)
class ProbeResult:
    """(heads, dim, dtype) of keys and values per layer, in layer order."""

    keys: list[tuple[int, int, torch.dtype]] = field(default_factory=list)
    values: list[tuple[int, int, torch.dtype]] = field(default_factory=list)

    def bytes_per_token(self, device: torch.device) -> int:
        """KV bytes of one token over all layers."""
        return sum(h * d * _kv_dtype(t, device).itemsize for h, d, t in (*self.keys, *self.values))


@dataclass(slots=True)
class AttentionBatch:
    """One step: `slots` int64 [T], the KV position each row is written to; the first
    `single_rows` segments have one row each."""

    buffers: KvBuffers
    slots: torch.Tensor
    segments: list[Segment]
    single_rows: int = 0

    def __post_init__(self) -> None:
        long = (i for i, s in enumerate(self.segments) if s.end - s.begin > 1)
        self.single_rows = next(long, len(self.segments))


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


def _kv_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else dtype


def _buffer(
    shape: tuple[int, int, torch.dtype], kv_tokens: int, device: torch.device
) -> torch.Tensor:
    heads, dim, dtype = shape
    return torch.zeros(kv_tokens, heads, dim, dtype=_kv_dtype(dtype, device), device=device)


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
    keys, values = batch.buffers.keys[layer], batch.buffers.values[layer]
    _store(keys, key[0].transpose(0, 1), batch)
    _store(values, value[0].transpose(0, 1), batch)
    rows = query[0].transpose(0, 1).to(keys.dtype)  # [T, heads, dim]
    out = rows.new_empty(rows.shape[0], rows.shape[1], values.shape[2])
    for s in batch.segments:
        last = s.kv_start + s.past + s.end - s.begin
        out[s.begin : s.end] = attend(
            rows[s.begin : s.end], keys[s.kv_start : last], values[s.kv_start : last], scaling
        )
    return out[None].to(query.dtype), None


def _store(buffer: torch.Tensor, rows: torch.Tensor, batch: AttentionBatch) -> None:
    """Write rows [T, heads, dim] to their places: prompts as slices (three times faster than by
    index), the single rows of decode in one call."""
    single = batch.single_rows
    if single:
        buffer.index_copy_(0, batch.slots[:single], rows[:single].to(buffer.dtype))
    for s in batch.segments:
        if s.begin >= single:
            first = s.kv_start + s.past
            buffer[first : first + s.end - s.begin] = rows[s.begin : s.end]


_REFUSED: Final = {
    "sliding_window": "sliding-window attention",
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "attention_chunk_size": "chunked attention",
}


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
    asked = [what for name, what in _REFUSED.items() if kwargs.get(name) is not None]
    if mask is not None:
        asked.append("an attention mask of its own")
    if not getattr(module, "is_causal", True):
        asked.append("attention that is not causal")
    if asked:
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
