"""Into how many sub-experts to cut: tried on a few experts, quality against the sub-router's cost.

Knows one layer's experts at a time. For every candidate N a sampled expert is cut, its sub-router
fitted on half of the tokens, and the output that is lost measured on the other half. The decision
worth arguing about: candidates are compared at equal *active* share, so a finer cut must win more
than its own sub-router costs; what is compared is the energy of the missing output after the
stand-ins, cross terms included, because summing the slices one by one favours fine cuts.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from prism.contract import DEFAULT_SUB_EXPERTS
from prism.streaming import StreamedModel
from torch import Tensor

from prism_refactor.layer_experts import Expert, expert_of, full_output, routed, spread
from prism_refactor.options import SEARCH_TOKENS
from prism_refactor.partition import dropping_errors, neuron_mass, partition, slice_norms
from prism_refactor.subrouter import fit_subrouter
from prism_refactor.sweep import Answer, sweep

CANDIDATES: Final = (8, 16, 32)
SHARES: Final = (0.75, 0.5, 0.25)  # of an expert, sub-router included
SMALLEST_SLICE: Final = 8  # neurons; below, the kernels' panels are padded
ENOUGH_GAIN: Final = 0.03  # a finer cut must lose this much less, or the coarser one stays


_WINDOWS: Final = 32  # calibration windows that the trial runs on
_EXPERTS: Final = 3  # of each sampled layer
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """Tokens x [t, H] of one expert with their gate weights [t]."""

    expert: Expert
    x: Tensor
    gates: Tensor


def candidates(width: int) -> tuple[int, ...]:
    """Those of ``CANDIDATES`` that cut ``width`` neurons evenly into slices that are not tiny."""
    return tuple(n for n in CANDIDATES if width % n == 0 and width // n >= SMALLEST_SLICE)


def lost_energy(trial: Trial, sub_experts: int, seed: int) -> dict[float, float]:
    """Share -> missing output energy over all output energy, on the tokens not fitted on."""
    expert, x = trial.expert, trial.x.float()
    order = partition(neuron_mass(expert, x[spread(torch.arange(len(x)), SEARCH_TOKENS)]),
                      sub_experts, seed)  # fmt: skip
    permuted = expert.with_down(order)
    activations = expert.activate(x)[:, order]
    fit, held = slice(0, None, 2), slice(1, None, 2)
    costs = dropping_errors(permuted, activations[fit], sub_experts)
    router = fit_subrouter(x[fit], costs)
    gates = trial.gates[held].float()
    score = gates.clamp_min(1e-20).log()[:, None] + x[held] @ router.weight.t() + router.bias
    full = gates[:, None] * permuted.project(activations[held])
    overhead = sub_experts * (x.shape[1] + 1) / (3 * x.shape[1] * activations.shape[1])
    return {
        share: _missing(permuted, activations, score, gates, share - overhead)
        / float(full.square().sum().clamp_min(1e-30))
        for share in SHARES
    }


def _missing(
    expert: Expert, activations: Tensor, score: Tensor, gates: Tensor, share: float
) -> float:
    """Energy of what is missing when ``share`` of the slices with the best scores is kept."""
    kept_count = max(1, round(share * score.numel()))
    theta = score.flatten().kthvalue(score.numel() - min(kept_count, score.numel() - 1)).values
    dropped = (score <= theta).float()  # [t, N]
    slices = score.shape[1]
    fit, held = (activations[half::2].view(-1, slices, activations.shape[1] // slices)
                 for half in (0, 1))  # fmt: skip
    norms = slice_norms(expert, activations[::2], slices)
    weight = (norms <= norms.median(0).values).float()
    mean = torch.einsum("tn,tns->ns", weight / weight.sum(0), fit)
    missing = ((held - mean) * dropped[:, :, None]).flatten(1)
    return float((gates[:, None] * expert.project(missing)).square().sum())


def best(losses: Sequence[dict[int, dict[float, float]]]) -> int:
    """The N with the smallest loss, by geometric means over experts and shares.

    ``losses``: for each tried expert N -> share -> lost energy.
    """
    means = {
        n: math.fsum(math.log(max(loss, 1e-12)) for trial in losses for loss in trial[n].values())
        / (len(losses) * len(SHARES))
        for n in losses[0]
    }
    chosen = min(means)
    for n in sorted(means):
        if means[n] < means[chosen] + math.log(1 - ENOUGH_GAIN):
            chosen = n
    return chosen


def choose(model: StreamedModel, ids: Tensor, width: int, seed: int) -> int:
    """N for experts of ``width`` neurons, tried on experts of the first and the middle MoE layer.

    ids [S, W]: calibration windows, of which some are used.
    """
    tried = candidates(width)
    if len(tried) < 2:
        return DEFAULT_SUB_EXPERTS
    sampled = {0, len(model.moe) // 2}
    losses: list[dict[int, dict[float, float]]] = []

    def answers(number: int, module: Any) -> Mapping[str, Answer]:
        def answer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if number in sampled:
                losses.extend(_tried(module, x, index, weights, tried, seed))
            return full_output(module, x, index, weights)

        return {"full": answer}

    class Nothing:
        def load(self) -> None:
            return None

        def save(self, done: int, hidden: dict[str, Tensor]) -> None:
            """A trial that was cut short begins anew."""

    batch = model.batch(ids[spread(torch.arange(len(ids)), _WINDOWS)])
    place = next(place for place, number in model.moe.items() if number == max(sampled))
    sweep(model, {"full": batch}, answers, Nothing(), end=place + 1)
    chosen = best(losses)
    _log.info("sub-experts: %d of %s, by %d experts", chosen, tried, len(losses))
    return chosen


def _tried(
    module: Any, x: Tensor, index: Tensor, weights: Tensor, tried: Sequence[int], seed: int
) -> list[dict[int, dict[float, float]]]:
    """Losses of the busiest experts of a layer."""
    by_use = sorted(routed(index, int(index.max()) + 1), key=lambda found: -len(found[1]))
    return [
        {n: lost_energy(trial, n, seed) for n in tried}
        for trial in (
            Trial(expert_of(module, number), x[tokens], weights[tokens, slots])
            for number, tokens, slots in by_use[:_EXPERTS]
        )
    ]
