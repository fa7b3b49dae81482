"""What stands in for the sub-experts a token drops: their mean, conditioned on being dropped, and
a least-squares scalar on what was kept, one for each expert and number of slices kept.

Knows one expert at a time. Plain means make things worse (a dropped slice is no average slice), so
only tokens that really drop a slice enter its mean. The mean output is ``D_n`` times the mean
activation, so no slice output is ever formed.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from prism_refactor.layer_experts import Expert

PRIOR_TOKENS: Final = 8  # shrinks the mean of a slice that few tokens drop towards zero
SCALAR_RANGE: Final = (0.5, 2.0)


@dataclass(frozen=True, slots=True)
class Compensation:
    """Fitted stand-ins of one expert."""

    means: Tensor  # [N, H] fp32
    scalars: Tensor  # [N + 1] fp32, by the number of slices that a token keeps


def compensate(expert: Expert, activations: Tensor, kept: Tensor, gate: Tensor) -> Compensation:
    """Fit on activations [t, I] with ``kept`` [t, N] bool and router weights ``gate`` [t].

    scalars[m] = argmin_a sum_t g_t^2 || full_t - a * kept_t - means of dropped ||^2 over the tokens
    that keep m slices, shrunk to the argmin over all tokens by the weight of PRIOR_TOKENS tokens.
    """
    tokens, width = activations.shape
    slices = kept.shape[1]
    size = width // slices
    dropped = (~kept).float()  # [t, N]
    sliced = activations.view(tokens, slices, size)
    share = dropped / (dropped.sum(0) + PRIOR_TOKENS)
    mean_activation = torch.einsum("tn,tns->ns", share, sliced)  # [N, S]
    down = expert.down.t().reshape(slices, size, -1)  # [N, S, H]
    means = torch.bmm(mean_activation.unsqueeze(1), down).squeeze(1)  # [N, H]
    kept_output = expert.project((sliced * kept.unsqueeze(2)).view(tokens, width))
    dropped_output = expert.project((sliced * dropped.unsqueeze(2)).view(tokens, width))
    squared_gate = gate.float().square()
    missing = dropped_output - dropped @ means  # [t, H]
    power = squared_gate * kept_output.square().sum(1)  # [t]
    gain = squared_gate * (missing * kept_output).sum(1)
    scalars = torch.ones(slices + 1, device=activations.device)
    if tokens < PRIOR_TOKENS or float(power.sum()) == 0:
        return Compensation(means, scalars)
    pooled = gain.sum() / power.sum()
    prior = PRIOR_TOKENS * power.mean()
    count = kept.sum(1)
    by_count = torch.zeros(2, slices + 1, device=activations.device)
    by_count.index_add_(1, count, torch.stack([gain, power]))
    scalars += (by_count[0] + prior * pooled) / (by_count[1] + prior)
    scalars[0] = scalars[slices] = 1.0  # nothing to scale, and nothing to make up for
    return Compensation(means, scalars.clamp(*SCALAR_RANGE))
