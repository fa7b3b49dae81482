"""What stands in for the sub-experts a token drops: their mean, conditioned on being dropped, and
one least-squares scalar per expert on what was kept.

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
    scalar: float


def compensate(expert: Expert, activations: Tensor, kept: Tensor, gate: Tensor) -> Compensation:
    """Fit on activations [t, I] with ``kept`` [t, N] bool and router weights ``gate`` [t].

    scalar = argmin_a sum_t g_t^2 || full_t - a * kept_t - means of dropped ||^2
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
    squared_gate = gate.float().square()[:, None]
    power = float((squared_gate * kept_output * kept_output).sum())
    missing = dropped_output - dropped @ means  # [t, H]
    gain = float((squared_gate * missing * kept_output).sum())
    if power == 0 or tokens < PRIOR_TOKENS:
        return Compensation(means, 1.0)
    return Compensation(means, min(max(1 + gain / power, SCALAR_RANGE[0]), SCALAR_RANGE[1]))
