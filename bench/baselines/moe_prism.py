"""MoE-Prism as published, for the comparison that carries its name (their repository, branch main,
commit 1ace4f0; described, not copied).

Four sub-experts. Partition: greedy start, then simulated annealing on swaps of neurons; cost is the
L1 mass of activations in the three smallest groups, T0 = 100, factor 0.995. We stop after 25,000 of
their 100,000 iterations: on tiny-moe .511 of the mass is kept then, .513 after 60,000, .484 at the
start.
Sub-router: the four neurons of each group with the largest summed co-activation stand for it, score
= mean |silu(gate) · up| over them. Selection: a fixed pattern by expert rank, such as 4,3,1,0, the
same for all tokens, best groups inside each expert; no threshold, nothing for what is dropped, gate
weights unchanged. Of all falling patterns of a budget we take the one that loses least on
calibration text, which is kinder than the paper, and anneal all experts side by side.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from prism.expert_weights import ExpertWeights
from prism_refactor.layer_experts import full_output, spread
from prism_refactor.layer_experts import routed as by_expert
from torch import Tensor

from bench.baselines.original import Original, PackedLayers, Routed, Tally

GROUPS = 4
GATE_NEURONS = 4  # of each group
ITERATIONS = 25_000
START_TEMPERATURE = 100.0
COOLING = 0.995
TOKENS = 1_024  # per expert
ACTIVE_GROUPS = 3  # a neuron is active in a token when it is among the largest three quarters


@dataclass(frozen=True, slots=True)
class Refactored:
    """The partition of every layer: permuted weights, and the gate neurons of each group."""

    packed: PackedLayers
    layers: list[ExpertWeights]
    gate_neurons: Tensor  # int64 [L, E, GROUPS, GATE_NEURONS], places among the permuted neurons
    kept_mass: float  # share of the L1 mass in the largest group, mean over experts


def refactored(original: Original, ids: Tensor, seed: int, iterations: int) -> Refactored:
    """Partition all experts on calibration ids [S, W]."""
    found: list[tuple[Tensor, int]] = []  # activations [I, t] of an expert, its layer

    def watch(routed: Routed) -> Tensor:
        held = routed.experts
        seen = {e: tokens for e, tokens, _ in by_expert(routed.index, held.experts)}
        for expert in range(held.experts):
            tokens = spread(seen.get(expert, torch.arange(len(routed.x))), TOKENS)
            active = held.inner(expert, routed.x[tokens]).abs().t()  # [I, t]
            found.append((_repeated(active, TOKENS), routed.layer))
        module = original.modules[routed.layer]
        return full_output(module, routed.x, routed.index, routed.weights)

    original.hidden(ids, watch)
    mass = torch.stack([active for active, _ in found])  # [L E, I, TOKENS]
    orders = anneal(mass, greedy(mass), seed, iterations)
    experts = original.weights[0].experts
    neurons = torch.stack([gate_neurons(a, o) for a, o in zip(mass, orders, strict=True)])
    layers = [
        _permuted(held, orders[layer * experts : (layer + 1) * experts])
        for layer, held in enumerate(original.weights)
    ]
    largest = group_mass(mass, orders).amax(1).sum(1) / mass.sum((1, 2)).clamp(min=1e-9)
    shape = (len(layers), experts, GROUPS, GATE_NEURONS)
    packed = PackedLayers(layers, GROUPS)
    return Refactored(packed, layers, neurons.view(shape), float(largest.mean()))


def _repeated(active: Tensor, tokens: int) -> Tensor:
    """[I, tokens] from [I, t <= tokens]: scaled copies of nothing new, for one common shape."""
    times = -(-tokens // active.shape[1])
    return active.repeat(1, times)[:, :tokens]


def group_mass(mass: Tensor, orders: Tensor) -> Tensor:
    """[B, GROUPS, T] sums over the neurons of each group; mass [B, I, T], orders [B, I]."""
    ordered = mass.gather(1, orders.unsqueeze(2).expand_as(mass))
    return ordered.view(len(mass), GROUPS, -1, mass.shape[2]).sum(2)


def greedy(mass: Tensor) -> Tensor:
    """Orders [B, I] by falling mass. Giving each neuron, heaviest first, to the group where the
    largest groups gain most fills one group after the other: it gains all of its mass there."""
    return mass.sum(2).argsort(1, descending=True)


def anneal(mass: Tensor, orders: Tensor, seed: int, iterations: int) -> Tensor:
    """Orders [B, I] after annealing on swaps between groups, all experts side by side."""
    generator = torch.Generator().manual_seed(seed)
    experts, width, _ = mass.shape
    size, rows = width // GROUPS, torch.arange(experts)
    orders, groups = orders.clone(), group_mass(mass, orders)
    kept = groups.amax(1)  # [B, T]
    temperature = START_TEMPERATURE
    for _ in range(iterations):
        swap = _draw_swap(experts, size, generator)
        first, second = orders[rows, swap.p], orders[rows, swap.q]
        change = mass[rows, second] - mass[rows, first]  # [B, T]
        a, b = groups[rows, swap.a] + change, groups[rows, swap.b] - change
        rest = torch.maximum(groups[rows, swap.c], groups[rows, swap.d])
        now = torch.maximum(torch.maximum(a, b), rest)
        gain = (now - kept).sum(1)
        chance = torch.rand(experts, generator=generator)
        taken = (gain >= 0) | (chance < (gain / max(temperature, 1e-9)).clamp(min=-80).exp())
        these = taken.nonzero().squeeze(1)
        groups[these, swap.a[these]], groups[these, swap.b[these]] = a[these], b[these]
        kept[these] = now[these]
        orders[these, swap.p[these]] = second[these]
        orders[these, swap.q[these]] = first[these]
        temperature *= COOLING
    return orders


class _Swap(NamedTuple):
    """For each expert two places in different groups, and the groups in some order; all [B]."""

    p: Tensor
    q: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor


def _draw_swap(experts: int, size: int, generator: torch.Generator) -> _Swap:
    a, b, c, d = torch.rand(experts, GROUPS, generator=generator).argsort(1).unbind(1)
    p, q = torch.randint(size, (2, experts), generator=generator)
    return _Swap(a * size + p, b * size + q, a, b, c, d)


def gate_neurons(active: Tensor, order: Tensor) -> Tensor:
    """[GROUPS, GATE_NEURONS] places in the order: largest summed co-activation in their group."""
    width = len(order)
    top = torch.zeros_like(active)
    most = active.topk(ACTIVE_GROUPS * width // GROUPS, dim=0).indices
    top.scatter_(0, most, 1.0)
    together = top[order].view(GROUPS, -1, active.shape[1])  # [G, S, T]
    summed = (together @ together.transpose(1, 2)).sum(2)  # [G, S]
    best = summed.topk(GATE_NEURONS, dim=1).indices
    return best + torch.arange(GROUPS).unsqueeze(1) * (width // GROUPS)


def _permuted(held: ExpertWeights, orders: Tensor) -> ExpertWeights:
    index = torch.arange(held.experts).unsqueeze(1)
    gate = None if held.gate is None else held.gate[index, orders].contiguous()
    down = held.down.transpose(1, 2)[index, orders].transpose(1, 2).contiguous()
    return replace(held, gate=gate, up=held.up[index, orders].contiguous(), down=down)


def patterns(budget: int, slots: int, most: int = GROUPS) -> Iterator[tuple[int, ...]]:
    """All falling patterns of `slots` counts from `most` to 0 that sum to the budget."""
    if slots == 0:
        if budget == 0:
            yield ()
        return
    for first in range(min(most, budget), -1, -1):
        if first * slots >= budget:
            for rest in patterns(budget - first, slots - 1, first):
                yield first, *rest


class Pattern:
    """A number of sub-experts for each rank among the token's experts."""

    def __init__(self, partition: Refactored, pattern: tuple[int, ...]) -> None:
        self.name = "MoE-Prism"
        self.pattern = pattern
        self.asked = sum(pattern) / (GROUPS * len(pattern))
        self.tally = Tally()
        self._partition = partition

    def fit(self, routed: Routed) -> None:
        """Nothing to fit: the pattern is the operating point."""

    def answer(self, routed: Routed) -> Tensor:
        scores = self._scores(routed)  # [T, K, GROUPS]
        rank = routed.weights.argsort(1, descending=True).argsort(1)
        count = torch.tensor(self.pattern)[rank]  # [T, K]
        place = scores.argsort(2, descending=True).argsort(2)
        kept = place < count.unsqueeze(2)
        self.tally.add(kept)
        return self._partition.packed.forward(routed, routed.weights, kept)

    def extra(self, hidden: int, width: int) -> float:
        return 2 * GROUPS * GATE_NEURONS / (3 * width)  # gate and up rows of the gate neurons

    def _scores(self, routed: Routed) -> Tensor:
        held = self._partition.layers[routed.layer]
        out = torch.empty(*routed.index.shape, GROUPS)
        for expert, tokens, slots in by_expert(routed.index, held.experts):
            rows = self._partition.gate_neurons[routed.layer, expert].flatten()
            part = replace(held, up=held.up[:, rows], gate=_rows(held.gate, rows))
            active = part.inner(expert, routed.x[tokens]).abs()
            out[tokens, slots] = active.view(-1, GROUPS, GATE_NEURONS).mean(2)
        return out


def _rows(gate: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if gate is None else gate[:, rows]
