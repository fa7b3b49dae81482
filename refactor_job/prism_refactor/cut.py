"""The first pass: full-level stream through the model; each layer's experts are partitioned and
given sub-routers on the way.

Knows partition and sub-router. The decision worth arguing about: experts that few calibration
tokens reach are fitted on a sample of the layer's other tokens as well; a guess from real inputs
beats no sub-router.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from prism_refactor.errors import Reason, RefactorError
from prism_refactor.layer_experts import (
    Expert,
    expert_of,
    expert_shape,
    full_output,
    routed,
    spread,
)
from prism_refactor.options import FIT_TOKENS, SEARCH_TOKENS
from prism_refactor.partition import dropping_errors, neuron_mass, order_slices, partition
from prism_refactor.subrouter import fit_subrouter

ENOUGH_TOKENS: Final = 512  # below this, other tokens of the layer are added


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


class CutVisitor:
    """Answers with the full experts' output; partitions and fits each layer not in ``load``."""

    def __init__(
        self,
        sub_experts: int,
        seed: int,
        workers: int,
        layers: int,
        load: Callable[[int], Cut | None],
        save: Callable[[int, Cut], None],
    ) -> None:
        self._sub_experts = sub_experts
        self._seed = seed
        self._workers = workers
        self._layers = layers
        self._load = load
        self._save = save

    def __call__(
        self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Fit unless already kept, and answer in full; the module's neurons stay as they are."""
        if self._load(layer) is None:
            self._save(layer, self._fit(layer, module, x, index, weights))
        if layer == self._layers - 1:
            return torch.zeros_like(x)  # nobody reads what comes after the last experts
        return full_output(module, x, index, weights)

    def _fit(self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Cut:
        experts, _, width = expert_shape(module)
        inputs = _inputs(experts, x, index, weights)
        permutations = torch.empty(experts, width, dtype=torch.int64)
        with _pool(self._workers) as pool:
            searches: list[Future[Tensor]] = []
            for expert, (chosen, _) in enumerate(inputs):
                mass = neuron_mass(expert_of(module, expert), x[spread(chosen, SEARCH_TOKENS)])
                seed = self._seed * 1_000_003 + layer * experts + expert
                searches.append(pool.submit(partition, mass, self._sub_experts, seed))
            for expert, search in enumerate(searches):
                permutations[expert] = search.result()
        routers, biases = [], []
        for expert, (chosen, gates) in enumerate(inputs):
            try:
                order, router_weight, router_bias = self._fit_expert(
                    expert_of(module, expert), permutations[expert], x, chosen, gates
                )
            except ValueError as error:
                raise RefactorError(
                    Reason.CORRUPT_CHECKPOINT,
                    f"Expert {expert} of MoE layer {layer}: {error}; its weights, or those of a "
                    "layer before it, are damaged.",
                ) from error
            permutations[expert] = order
            routers.append(router_weight)
            biases.append(router_bias)
        usage = torch.bincount(index.reshape(-1), minlength=experts)[:experts] / len(x)
        return Cut(
            permutations.to(torch.int32), torch.stack(routers), torch.stack(biases), usage.float()
        )

    def _fit_expert(
        self, expert: Expert, order: Tensor, x: Tensor, chosen: Tensor, gates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        sample = spread(torch.arange(len(chosen)), FIT_TOKENS)
        inputs = x[chosen[sample]].float()
        permuted = expert.with_down(order)
        activations = expert.activate(inputs)[:, order]
        errors = dropping_errors(permuted, activations, self._sub_experts)
        mean_error = (gates[sample].float()[:, None] * errors).mean(0)
        by_mean = torch.argsort(mean_error, descending=True, stable=True)
        router = fit_subrouter(inputs, errors[:, by_mean])
        return order_slices(order, mean_error), router.weight, router.bias


def _inputs(experts: int, x: Tensor, index: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(tokens, gate weights) to fit each expert on: at least ENOUGH_TOKENS where there are."""
    nothing = torch.empty(0, dtype=torch.int64)
    found = [(nothing, nothing.float())] * experts
    for expert, tokens, slots in routed(index, experts):
        found[expert] = (tokens, weights[tokens, slots].float())
    others = spread(torch.arange(len(x)), ENOUGH_TOKENS)
    return [
        (tokens, gates)
        if len(tokens) >= ENOUGH_TOKENS
        else (
            torch.cat([tokens, others]),
            torch.cat([gates, torch.full((len(others),), float(weights.float().mean()))]),
        )
        for tokens, gates in found
    ]


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose waiting work is dropped when the pass is interrupted."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
