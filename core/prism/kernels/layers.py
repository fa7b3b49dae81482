"""Norm, rotary embedding and attention over KV buffers: torch reference, C++, and who chooses.

Knows the arithmetic of a decoder layer around its linears and experts; nothing of models,
sequences or levels. Decision: the operations round where transformers' model code rounds (a bf16
product is rounded before it is added to), so that one can stand for the other to the last bits;
whether it does is for the caller to check. Attention takes a whole step in one call, because a
decode row is short work and calling torch for each costs as much as computing it.
"""

import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from prism.kernels.cpu_kernel import DTYPES

_log = logging.getLogger(__name__)
MAX_HEAD_DIM = 256  # of the C++ kernel


@dataclass(frozen=True, slots=True)
class StepRows:
    """Which rows of a step belong to which sequence.

    segments: int64 [S, 4] on the CPU, one line (begin, end, kv_start, past) for each sequence: rows
    [begin, end), in order and without gaps; its keys lie in the buffers from kv_start, `past` of
    them are there already. slots: int64 [T] on the model's device, where in the buffers each row
    goes.
    """

    segments: Tensor
    slots: Tensor = field(repr=False)

    @classmethod
    def of(
        cls, segments: list[tuple[int, int, int, int]], device: torch.device | str = "cpu"
    ) -> "StepRows":
        """From plain integers."""
        slots = [
            kv_start + past + i
            for begin, end, kv_start, past in segments
            for i in range(end - begin)
        ]
        lines = torch.tensor(segments, dtype=torch.int64).view(-1, 4)
        return cls(lines, torch.tensor(slots, dtype=torch.int64, device=device))


class Layers(Protocol):
    """T rows, D head dim; all tensors of one dtype and device unless said otherwise."""

    @property
    def name(self) -> str:
        """Short name, for logs."""

    def buffer_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """What KV buffers of a model in `dtype` are to hold."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., n], weight [n] -> weight · (x / sqrt(mean x² + eps)), the fraction computed in
        fp32 and rounded to x's dtype. Zhang, Sennrich 2019."""

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x [T, heads, D], cosine, sine [T, D] -> x · cosine + (-x_high, x_low) · sine, [T, heads,
        D]. Su et al. 2021, in the order of halves."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: StepRows,
        scale: float,
    ) -> Tensor:
        """Write key [T, G, D] and value [T, G, V] to the buffers keys [G, room, D] and values [G,
        room, V] (of `buffer_dtype`), then causal attention of query [T, H, D], each row over its
        own sequence -> [T, H, V]. H is a multiple of G."""


class ReferenceLayers:
    """Plain torch, on any device.

    On a CPU the buffers hold fp32 whatever the model's dtype: SDPA's decode path reads bf16 keys
    about five times slower there (measured, 450 keys, 4 heads: 276 against 48 us).
    """

    name = "torch reference"

    def buffer_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.float32 if device.type == "cpu" else dtype

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cosine[:, None] + torch.cat((-high, low), dim=-1) * sine[:, None]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: StepRows,
        scale: float,
    ) -> Tensor:
        keys.index_copy_(1, rows.slots, key.transpose(0, 1).to(keys.dtype))
        values.index_copy_(1, rows.slots, value.transpose(0, 1).to(values.dtype))
        q = query.transpose(0, 1).to(keys.dtype)  # [H, T, D]
        out = query.new_empty(*query.shape[:2], value.shape[2])
        for begin, end, kv_start, past in rows.segments.tolist():
            seen = slice(kv_start, kv_start + past + end - begin)
            one = _causal(q[:, begin:end], keys[:, seen], values[:, seen], scale)
            out[begin:end] = one.transpose(0, 1)
        return out


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query [H, n, D], key [G, keys, D], value [G, keys, V] -> [H, n, V]; the last n keys are the
    rows' own."""
    n, keys = query.shape[1], key.shape[1]
    mask = None
    if 1 < n < keys:
        mask = torch.ones(n, keys, dtype=torch.bool, device=query.device).tril(keys - n)
    return F.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None and n > 1,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )[0]


class CpuLayers:
    """C++ through torch.ops.prism; needs prism.kernels.build.load() first.

    fp32 inside, whatever the dtype. `isa` as in CpuKernel. A head dim beyond MAX_HEAD_DIM, another
    dtype or a wrong shape is a RuntimeError.
    """

    def __init__(self, isa: str = "") -> None:
        self._isa = isa
        self.name = f"C++ {isa or torch.ops.prism.isa_name()}"

    def buffer_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return dtype

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor = torch.ops.prism.rms_norm(x.contiguous(), weight, eps, self._isa)
        return out

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        out: Tensor = torch.ops.prism.rotate(x, cosine.contiguous(), sine.contiguous(), self._isa)
        return out

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: StepRows,
        scale: float,
    ) -> Tensor:
        out: Tensor = torch.ops.prism.attend(
            query, key, value, keys, values, rows.segments, scale, self._isa
        )
        return out


@cache
def choose_layers(device: torch.device, dtype: torch.dtype, head_dim: int) -> Layers:
    """The fastest that runs here; the choice and its reason are logged once."""
    chosen, why = _best(device, dtype, head_dim)
    _log.info("attention in %s on %s: %s (%s)", dtype, device, chosen.name, why)
    return chosen


def _best(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Layers, str]:
    if device.type != "cpu":
        return ReferenceLayers(), f"the C++ kernel runs on CPUs, not on {device.type}"
    if dtype not in DTYPES:
        return ReferenceLayers(), f"the C++ kernel computes float32 and bfloat16, not {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return ReferenceLayers(), f"head dim {head_dim} is beyond the C++ kernel's {MAX_HEAD_DIM}"
    from prism.kernels import build  # see kernels/__init__.py

    try:
        origin = build.load()
    except build.BuildError as error:
        return ReferenceLayers(), f"no C++ extension: {error}"
    return CpuLayers(), origin
