"""Scores of sub-experts and the threshold that makes a layer select a given share of them.

Knows the score ``log g + x . w + b`` (the same as prism.selection, here kept whole for the
quantile). The decision worth arguing about: the quantile is taken on the *reduced* stream, layer
after layer, so the share that is realised is the level that was asked for, not the one the full
model would have realised.
"""

import torch
from torch import Tensor

from prism_refactor.layer_experts import routed

_SMALLEST_GATE = 1e-20


def scores(
    x: Tensor, index: Tensor, weights: Tensor, router_weight: Tensor, router_bias: Tensor
) -> Tensor:
    """log g + x . w + b as [T, K, N] fp32; x [T, H], index and weights [T, K], router [E, N, H]."""
    experts, slices = router_bias.shape
    out = torch.empty(*index.shape, slices, device=x.device)
    for expert, tokens, slots in routed(index, experts):
        out[tokens, slots] = x[tokens].float() @ router_weight[expert].t() + router_bias[expert]
    return out + weights.float().clamp_min(_SMALLEST_GATE).log()[..., None]


def log_threshold(score: Tensor, level: int) -> float:
    """The log theta above which ``level`` percent of ``score`` lie (strictly above)."""
    flat = score.reshape(-1)
    kept = round(len(flat) * level / 100)
    if kept >= len(flat):
        return float("-inf")
    return float(torch.kthvalue(flat, len(flat) - kept).values)
