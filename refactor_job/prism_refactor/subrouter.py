"""The sub-router: a ridge regression from a token to the log of what dropping each slice costs.

Knows linear algebra only. Closed form, no gradient: with x centred, ``W = (X'X + p v I)^-1 X'Y``,
v the mean variance of a feature. The penalty p is chosen by generalised cross-validation, since the
best one hardly depends on the number of tokens but does on the layer; a fixed one loses a fifth
more where an expert has as many tokens as features. Targets are clamped from below at a small share
of the slice's own rms, because the log of an almost silent slice would otherwise pull the fit
towards tokens that do not matter. The decision worth arguing about: up to 512 features every expert
chooses for itself; above, where an eigendecomposition takes seconds, two experts choose for their
layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Final

import torch
from torch import Tensor

PENALTIES: Final = tuple(2.0**power for power in range(-3, 15))
EXACT_FEATURES: Final = 512
FLOOR: Final = 1e-2  # targets below this share of the slice's rms are lifted to it
DEAD_LOG_COST: Final = -30.0  # a slice that never answers
_TINY: Final = 1e-12


@dataclass(frozen=True, slots=True)
class SubRouter:
    """``log cost of dropping slice n = x . weight[n] + bias[n]``."""

    weight: Tensor  # [N, H] fp32
    bias: Tensor  # [N] fp32


def fit_subrouter(x: Tensor, costs: Tensor, penalty: float | None = None) -> SubRouter:
    """Fit on inputs x [t, H] and costs of dropping each slice [t, N], both fp32, t >= 1.

    ``penalty``: p; None: chosen on these tokens. Raises ValueError when a value is not finite.
    """
    target, dead = _targets(x, costs)
    chosen = choose_penalty(x, costs) if penalty is None else penalty
    dtype = torch.float64 if x.shape[1] <= EXACT_FEATURES else torch.float32
    mean_x, mean_y = x.to(dtype).mean(0), target.to(dtype).mean(0)
    centred = x.to(dtype) - mean_x
    gram = centred.t() @ centred
    gram.diagonal().add_(chosen * _variance(gram, len(x)))
    right = centred.t() @ (target.to(dtype) - mean_y)
    weight = torch.cholesky_solve(right, torch.linalg.cholesky(gram)).t()  # [N, H]
    bias = mean_y - weight @ mean_x
    weight[dead] = 0
    bias[dead] = DEAD_LOG_COST
    return SubRouter(weight.float(), bias.float())


def choose_penalty(x: Tensor, costs: Tensor) -> float:
    """The p of ``PENALTIES`` with the smallest generalised cross-validation score, summed over
    slices: (residual / t) / (1 - degrees of freedom / t)^2 (Golub, Heath and Wahba 1979).

    x [t, H], costs [t, N]; raises ValueError when a value is not finite.
    """
    target, _ = _targets(x, costs)
    tokens, features = x.shape
    centred = x.double() - x.double().mean(0)
    y = target.double() - target.double().mean(0)
    if features <= tokens:
        gram = centred.t() @ centred
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0)
        mixed = (vectors.t() @ (centred.t() @ y)).square() / values.clamp_min(_TINY)[:, None]
        explained = torch.where((values > values.max() * _TINY)[:, None], mixed, 0.0)
        unit = float(_variance(gram, tokens))
    else:  # the same numbers from the smaller matrix of tokens
        values, vectors = torch.linalg.eigh(centred @ centred.t())
        values = values.clamp_min(0)
        explained = (vectors.t() @ y).square()
        unit = max(float(values.sum()) / features / tokens, _TINY)
    outside = y.square().sum() - explained.sum()

    def score(penalty: float) -> float:
        kept = values / (values + penalty * unit)
        free = 1 - (float(kept.sum()) + 1) / tokens
        if free <= 0:
            return float("inf")
        residual = outside + ((1 - kept).square()[:, None] * explained).sum()
        return float(residual) / free**2

    return min(PENALTIES, key=score)


def layer_penalty(samples: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The geometric mean of what some experts of a layer choose on their (x, costs)."""
    return geometric_mean([choose_penalty(x, costs) for x, costs in samples])


def _targets(x: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """(log costs [t, N], which slices never answer [N])."""
    if not bool(torch.isfinite(costs).all() & torch.isfinite(x).all()):
        raise ValueError("the expert's inputs or outputs are not finite")
    rms = costs.square().mean(0).sqrt()  # [N]
    return torch.maximum(costs, FLOOR * rms).clamp_min(1e-30).log(), rms <= torch.finfo(
        torch.float32
    ).tiny


def _variance(gram: Tensor, tokens: int) -> Tensor:
    """Mean variance of a feature, never zero; the mean of the gram's diagonal over the tokens."""
    return (gram.diagonal().mean() / tokens).clamp_min(_TINY)
