"""The first pass: full-level stream through the model; each layer's experts are partitioned and
given sub-routers on the way.

Knows partition and sub-router. The decision worth arguing about: experts that few calibration
tokens reach are fitted on a sample of the layer's other tokens as well; a guess from real inputs
beats no sub-router.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from prism_refactor.errors import Reason, RefactorError
from prism_refactor.layer_experts import (
    expert_of,
    expert_shape,
    routed,
    spread,
)
from prism_refactor.options import FIT_TOKENS, SEARCH_TOKENS
from prism_refactor.partition import dropping_errors, neuron_mass, order_slices, partition
from prism_refactor.subrouter import EXACT_FEATURES, fit_subrouter, layer_penalty

ENOUGH_TOKENS: Final = 512  # below this, other tokens of the layer are added
PENALTY_EXPERTS: Final = 2  # choose the ridge penalty for a layer of many features


@dataclass(frozen=True, slots=True)
class Cut:
    """What the first pass leaves of one layer."""

    permutations: Tensor  # [E, I] int32: new neuron i was neuron permutations[e, i]
    router_weight: Tensor  # [E, N, H] fp32
    router_bias: Tensor  # [E, N] fp32
    usage: Tensor  # [E] fp32, share of tokens routed to the expert

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, for the partial folder."""
        return {name: getattr(self, name) for name in self.__slots__}


class FitTokens(NamedTuple):
    """Tokens [t] that an expert is fitted on, and the gate weights [t] they give it."""

    tokens: Tensor
    gates: Tensor


class Prepared(NamedTuple):
    """Inputs [t, H], costs of dropping each slice [t, N], and the order [I] they belong to."""

    inputs: Tensor
    costs: Tensor
    order: Tensor


class Cutter:
    """Partitions a layer's experts and fits their sub-routers."""

    def __init__(self, sub_experts: int, seed: int, workers: int) -> None:
        self.sub_experts = sub_experts
        self._seed = seed
        self._workers = workers

    def fit(self, layer: int, module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Cut:
        """Fit MoE layer ``layer`` on what reaches it: x [T, H], index and weights [T, K].

        Raises RefactorError (CorruptCheckpoint) where a value is not finite.
        """
        experts, hidden, width = expert_shape(module)
        inputs = _inputs(experts, x, index, weights)
        permutations = self._partitions(layer, module, x, inputs, width)
        penalty = None
        if hidden > EXACT_FEATURES:
            penalty = self._penalty(module, permutations, x, inputs)
        routers = []
        for expert, fitted_on in enumerate(inputs):
            try:
                prepared = self._prepare(module, expert, permutations[expert], x, fitted_on)
                routers.append(fit_subrouter(prepared.inputs, prepared.costs, penalty))
            except ValueError as error:
                raise RefactorError(
                    Reason.CORRUPT_CHECKPOINT,
                    f"Expert {expert} of MoE layer {layer}: {error}; its weights, or those of a "
                    "layer before it, are damaged.",
                ) from error
            permutations[expert] = prepared.order
        usage = torch.bincount(index.reshape(-1), minlength=experts)[:experts] / len(x)
        return Cut(
            permutations.to(torch.int32),
            torch.stack([router.weight for router in routers]),
            torch.stack([router.bias for router in routers]),
            usage.float(),
        )

    def _partitions(
        self, layer: int, module: Any, x: Tensor, inputs: list[FitTokens], width: int
    ) -> Tensor:
        """Order [E, I] int64 of every expert's neurons, found side by side on all cores."""
        found = torch.empty(len(inputs), width, dtype=torch.int64)
        with _pool(self._workers) as pool:
            for first in range(0, len(inputs), 2 * self._workers):  # masses of a few at a time
                searches: dict[int, Future[Tensor]] = {}
                for expert in range(first, min(first + 2 * self._workers, len(inputs))):
                    chosen = spread(inputs[expert].tokens, SEARCH_TOKENS)
                    mass = neuron_mass(expert_of(module, expert), x[chosen])
                    seed = self._seed * 1_000_003 + layer * len(inputs) + expert
                    searches[expert] = pool.submit(partition, mass, self.sub_experts, seed)
                for expert, search in searches.items():
                    found[expert] = search.result()
        return found

    def _penalty(
        self, module: Any, permutations: Tensor, x: Tensor, inputs: list[FitTokens]
    ) -> float | None:
        """The ridge penalty of a layer whose experts have too many features to choose each."""
        sampled = spread(torch.arange(len(inputs)), PENALTY_EXPERTS).tolist()
        prepared = [self._prepare(module, e, permutations[e], x, inputs[e]) for e in sampled]
        try:
            return layer_penalty([(one.inputs, one.costs) for one in prepared])
        except ValueError:
            return None  # a value that is not finite: the fit of that expert says which

    def _prepare(
        self, module: Any, number: int, order: Tensor, x: Tensor, fitted_on: FitTokens
    ) -> Prepared:
        """What the sub-router of one expert is fitted on, slices by falling mean cost."""
        expert = expert_of(module, number)
        sample = spread(torch.arange(len(fitted_on.tokens)), FIT_TOKENS)
        inputs = x[fitted_on.tokens[sample]].float()
        activations = expert.activate(inputs)[:, order]
        costs = dropping_errors(expert.with_down(order), activations, self.sub_experts)
        mean_cost = (fitted_on.gates[sample][:, None] * costs).mean(0)
        by_mean = torch.argsort(mean_cost, descending=True, stable=True)
        return Prepared(inputs, costs[:, by_mean], order_slices(order, mean_cost))


def _inputs(experts: int, x: Tensor, index: Tensor, weights: Tensor) -> list[FitTokens]:
    """Tokens to fit each expert on: at least ENOUGH_TOKENS where there are."""
    nothing = torch.empty(0, dtype=torch.int64, device=x.device)
    found = [FitTokens(nothing, nothing.float())] * experts
    for expert, tokens, slots in routed(index, experts):
        found[expert] = FitTokens(tokens, weights[tokens, slots].float())
    others = spread(torch.arange(len(x), device=x.device), ENOUGH_TOKENS)
    usual = torch.full((len(others),), float(weights.float().mean()), device=x.device)
    return [
        own
        if len(own.tokens) >= ENOUGH_TOKENS
        else FitTokens(torch.cat([own.tokens, others]), torch.cat([own.gates, usual]))
        for own in found
    ]


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose waiting work is dropped when the pass is interrupted."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
