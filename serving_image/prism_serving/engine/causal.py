"""Attention of one sequence: a chunk of queries over all keys so far.

Knows: the arithmetic and which of two ways is faster where. Must not know: sequences, buffers.

On a CPU a chunk is computed in blocks of rows, each over the keys it may see, with plain matrix
products: 1.4x faster than SDPA's CPU kernel at 450 tokens and 64 dims (2.0 against 2.7 ms, one
thread), and no mask as large as the context is needed after cached keys. One row, and every chunk
on a GPU, goes to SDPA.
"""

from typing import Final

import torch
import torch.nn.functional as F

_BLOCK: Final = 64  # rows


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """query [rows, heads, dim], key [keys, kv_heads, dim], value [keys, kv_heads, value_dim] of one
    dtype -> [rows, heads, value_dim]. Row i is the (keys - rows + i)-th token and sees the keys up
    to itself. `scale` None: 1 / sqrt(dim)."""
    rows, keys = query.shape[0], key.shape[0]
    if query.device.type == "cpu" and rows > 1:
        return _blocked(query, key, value, query.shape[2] ** -0.5 if scale is None else scale)
    mask = None
    if 1 < rows < keys:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and rows > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # [1, heads, rows, value_dim]
    return out[0].transpose(0, 1)


def _blocked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    rows, heads, dim = query.shape
    keys, kv_heads, value_dim = value.shape
    group = heads // kv_heads
    past = keys - rows
    # Queries of one kv head lie together, so that one product serves the whole group.
    q = (query * scale).view(rows, kv_heads, group, dim).permute(1, 2, 0, 3)  # [kv, g, rows, dim]
    k = key.permute(1, 2, 0)  # [kv, dim, keys]
    v = value.transpose(0, 1)  # [kv, keys, value_dim]
    out = query.new_empty(rows, kv_heads, group, value_dim)
    size = min(_BLOCK, rows)
    above = torch.full((size, size), float("-inf"), dtype=query.dtype).triu(1)
    for begin in range(0, rows, _BLOCK):
        end = min(begin + _BLOCK, rows)
        n, seen = end - begin, past + end
        block = q[:, :, begin:end].reshape(kv_heads, group * n, dim)
        scores = torch.bmm(block, k[:, :, :seen]).view(kv_heads, group, n, seen)
        scores[..., past + begin :] += above[:n, :n]
        weights = torch.softmax(scores, -1).view(kv_heads, group * n, seen)
        mixed = torch.bmm(weights, v[:, :seen]).view(kv_heads, group, n, value_dim)
        out[begin:end] = mixed.permute(2, 0, 1, 3)
    return out.view(rows, heads, value_dim)
