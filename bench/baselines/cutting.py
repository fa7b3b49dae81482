"""How good and how fast the partition itself is, on an expert's real activations.

Kept mass: mean share of squared output mass in the best half of the slices, on tokens the search
has not seen. One thread, because a refactoring cuts one expert on each core.
"""

import time
from dataclasses import dataclass
from statistics import mean

import torch
from prism_refactor.layer_experts import expert_of, full_output, spread
from prism_refactor.layer_experts import routed as by_expert
from prism_refactor.options import SEARCH_TOKENS
from prism_refactor.partition import neuron_mass, partition
from torch import Tensor

from bench.baselines.original import Original, Routed

EXPERTS_PER_LAYER = 2
LARGE_EXPERT = 1024


@dataclass(frozen=True, slots=True)
class Cutting:
    """Means over the experts looked at."""

    experts: int
    kept_mass: float  # held out
    kept_mass_random: float
    seconds: dict[int, float]  # neurons of an expert -> seconds for one
    is_deterministic: bool


def look(original: Original, ids: Tensor, sub_experts: int) -> Cutting:
    """Cut some experts of every layer on calibration ids [S, W]."""
    masses: list[tuple[Tensor, Tensor]] = []  # to search on and held out, [I, t] each

    def watch(routed: Routed) -> Tensor:
        module = original.modules[routed.layer]
        for expert, tokens, _ in list(by_expert(routed.index, routed.experts.experts))[
            :EXPERTS_PER_LAYER
        ]:
            held = expert_of(module, expert)
            seen, unseen = tokens[::2], tokens[1::2]
            search = neuron_mass(held, routed.x[spread(seen, SEARCH_TOKENS)])
            masses.append((search, neuron_mass(held, routed.x[spread(unseen, SEARCH_TOKENS)])))
        return full_output(module, routed.x, routed.index, routed.weights)

    original.hidden(ids, watch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _cut_all(masses, sub_experts)
    finally:
        torch.set_num_threads(threads)


def _cut_all(masses: list[tuple[Tensor, Tensor]], n: int) -> Cutting:
    width = len(masses[0][0])
    started = time.perf_counter()
    orders = [partition(search, n, seed) for seed, (search, _) in enumerate(masses)]
    seconds = {width: (time.perf_counter() - started) / len(masses)}
    if width < LARGE_EXPERT:  # rows repeated with noise: time does not depend on what they hold
        rows = masses[0][0].repeat(LARGE_EXPERT // width, 1)
        noise = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0))
        started = time.perf_counter()
        partition(rows * noise, n, 0)
        seconds[LARGE_EXPERT] = time.perf_counter() - started
    again = partition(masses[0][0], n, 0)
    generator = torch.Generator().manual_seed(0)
    chance = [torch.randperm(width, generator=generator) for _ in masses]
    held_out = [unseen for _, unseen in masses]
    return Cutting(
        len(masses),
        mean(kept(mass, order, n) for mass, order in zip(held_out, orders, strict=True)),
        mean(kept(mass, order, n) for mass, order in zip(held_out, chance, strict=True)),
        seconds,
        torch.equal(again, orders[0]),
    )


def kept(mass: Tensor, order: Tensor, n: int) -> float:
    """Mean share of mass [I, t] in the best half of the n slices of an order [I]."""
    slices = mass[order].view(n, -1, mass.shape[1]).sum(1)  # [N, t]
    return float(slices.topk(n // 2, dim=0).values.sum(0).mean())
