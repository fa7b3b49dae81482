"""The sub-router: a ridge regression from a token to the log of what dropping each slice costs.

Knows linear algebra only. Closed form, no gradient: with x centred, ``W = (X'X + l I)^-1 X'Y``,
l growing with dimensions per token as the fit's variance does. The decision worth arguing about:
targets are clamped from below at a small share of the slice's own rms, because the log of an
almost silent slice would otherwise pull the fit towards tokens that do not matter.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

RIDGE: Final = 0.025  # times dimensions per token: share of the mean diagonal of X'X
FLOOR: Final = 1e-2  # targets below this share of the slice's rms are lifted to it
DEAD_LOG_COST: Final = -30.0  # a slice that never answers


@dataclass(frozen=True, slots=True)
class SubRouter:
    """``log cost of dropping slice n = x . weight[n] + bias[n]``."""

    weight: Tensor  # [N, H] fp32
    bias: Tensor  # [N] fp32


def fit_subrouter(x: Tensor, costs: Tensor) -> SubRouter:
    """Fit on inputs x [t, H] and costs of dropping each slice [t, N], both fp32, t >= 1.

    Raises ValueError when a value is not finite.
    """
    if not bool(torch.isfinite(costs).all() & torch.isfinite(x).all()):
        raise ValueError("the expert's inputs or outputs are not finite")
    rms = costs.square().mean(0).sqrt()  # [N]
    dead = rms <= torch.finfo(torch.float32).tiny
    target = torch.maximum(costs, FLOOR * rms).clamp_min(1e-30).log().double()
    mean_x, mean_y = x.double().mean(0), target.mean(0)
    centred = x.double() - mean_x
    gram = centred.t() @ centred
    scale = gram.diagonal().mean().clamp_min(1e-12)
    gram.diagonal().add_(RIDGE * x.shape[1] / x.shape[0] * scale)
    weight = torch.cholesky_solve(
        centred.t() @ (target - mean_y), torch.linalg.cholesky(gram)
    ).t()  # [N, H]
    bias = mean_y - weight @ mean_x
    weight[dead] = 0
    bias[dead] = DEAD_LOG_COST
    return SubRouter(weight.float(), bias.float())
