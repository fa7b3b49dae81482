"""The experts of one layer as the fitting code needs them: activations and outputs in fp32.

Knows the normal form of experts (prism.expert_weights). Must not know about levels. The decision
worth arguing about: one expert at a time is lifted to fp32, so a bf16 model needs no fp32 copy of
itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from prism.expert_weights import ExpertWeights, add_down_bias, expert_weights
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert in fp32: ``activate`` x [t, H] -> [t, I], ``project`` [t, I] -> [t, H].

    The bias of down is in neither: it is no neuron's and stays whole (see ``full_output``).
    """

    weights: ExpertWeights  # of this expert alone
    down: Tensor  # [H, I]

    def activate(self, x: Tensor) -> Tensor:
        """Gated activations [t, I] of inputs [t, H]."""
        return self.weights.inner(0, x.float())

    def project(self, activations: Tensor) -> Tensor:
        """Outputs [t, H] of activations [t, I]."""
        return activations @ self.down.t()

    def with_down(self, order: Tensor) -> "Expert":
        """The same expert whose ``project`` takes activations in this order of neurons [I]."""
        return replace(self, down=self.down[:, order])


def expert_of(module: Any, index: int) -> Expert:
    """Expert ``index`` of an experts module, lifted to fp32."""
    lifted = expert_weights(module).one(index)
    return Expert(lifted, lifted.down[0])


def expert_shape(module: Any) -> tuple[int, int, int]:
    """(experts, hidden size, neurons of an expert) of an experts module."""
    weights = expert_weights(module)
    return weights.experts, weights.hidden, weights.intermediate


def full_output(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """sum_k g_k Y_k [T, H] fp32 with whole experts."""
    held = expert_weights(module)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert_index, tokens, slots in routed(index, held.experts):
        expert = expert_of(module, expert_index)
        y = expert.project(expert.activate(x[tokens]))
        out.index_add_(0, tokens, y * weights[tokens, slots].float()[:, None])
    if held.down_bias is not None:
        add_down_bias(out, index, weights, held.down_bias)
    return out


def permute_neurons(module: Any, permutations: Tensor) -> None:
    """Reorder the neurons of every expert in place; ``permutations`` [E, I] int64: new neuron i of
    expert e was neuron ``permutations[e, i]``."""
    held = expert_weights(module)
    for expert, order in enumerate(permutations):
        held.permute(expert, order.to(held.down.device))


def routed(index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, tokens, slots) for each expert with at least one token; ``index`` [T, K]."""
    slots = index.shape[1]
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    start = 0
    for expert, count in enumerate(counts[:experts]):
        chosen = order[start : start + count]
        start += count
        if count:
            yield expert, chosen // slots, chosen % slots


def spread(tokens: Tensor, limit: int) -> Tensor:
    """At most ``limit`` of ``tokens`` [t], evenly spaced, order kept."""
    if len(tokens) <= limit:
        return tokens
    return tokens[torch.linspace(0, len(tokens) - 1, limit).long().to(tokens.device)]
