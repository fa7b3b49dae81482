"""Swap local search: cut an expert's neurons into equal groups that fire together.

Objective: mean over tokens of the mass in the N/2 heaviest groups, so that half of the
sub-experts hold as much of each token's output as they can. Knows masses, no models. Decision:
plain hill climbing from importance order; every start and annealing schedule tried ended within
0.1 points of it. A swap leaves all groups but two alone, so a proposal is scored in O(1) per
token from sums of the largest groups (formula in cpu/swap_tile.h). The C++ form releases the
interpreter lock; the numpy form draws the same proposals and differs by rounding alone.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism.contract import SUB_EXPERT_CHOICES
from prism.kernels import build

_MASK = (1 << 64) - 1
Floats = NDArray[np.float32]


def importance_order(mass: Tensor) -> Tensor:
    """int32 [I]: neurons by falling mean mass, the search's start. mass [I, T]."""
    return mass.mean(dim=1).argsort(descending=True, stable=True).to(torch.int32)


def swap_search(
    mass: Tensor, n: int, start: Tensor, proposals: int, seed: int
) -> tuple[Tensor, float]:
    """(order int32 [I], objective): each I/n neurons in a row of the order are one group.

    mass fp32 [I, T]: what each neuron contributes for each token, normalised per token by the
    caller if tokens are to count alike; n groups: 4, 8, 16 or 32; start int32 [I], a permutation.
    The same arguments give the same result. Raises ValueError for shapes that do not fit.
    """
    if n not in SUB_EXPERT_CHOICES or mass.dim() != 2 or mass.shape[0] % n or mass.numel() == 0:
        raise ValueError(f"mass {tuple(mass.shape)} cannot be cut into {n} groups")
    if not torch.equal(start.long().sort().values, torch.arange(mass.shape[0])):
        raise ValueError(f"start is no permutation of {mass.shape[0]} neurons")
    try:
        build.load()
    except build.BuildError:  # the kernel chooser has said so
        return _numpy_search(mass.numpy(), n, start.numpy(), proposals, seed)
    order, objective = torch.ops.prism.swap_search(
        mass.contiguous(), n, start.contiguous(), proposals, seed
    )
    return order, objective


def _numpy_search(
    mass: Floats, n: int, start: NDArray[np.int32], proposals: int, seed: int
) -> tuple[Tensor, float]:
    order, size = start.copy(), len(start) // n
    groups = mass[order].reshape(n, size, -1).sum(axis=1)  # [n, T]
    sums = _top_sums(groups)
    state = seed & _MASK
    for _ in range(proposals):
        state, first = _draw(state)
        state, second = _draw(state)
        p, q = first % len(order), second % len(order)
        a, b = p // size, q // size
        if a == b:
            continue
        change = mass[order[q]] - mass[order[p]]
        if _gain(sums, groups[a], groups[b], change) < 0:
            continue
        groups[a] += change
        groups[b] -= change
        order[p], order[q] = order[q], order[p]
        sums = _top_sums(groups)
    final = _top_sums(mass[order].reshape(n, size, -1).sum(axis=1))[2]
    return torch.from_numpy(order), float(final.mean(dtype=np.float64))


def _draw(state: int) -> tuple[int, int]:
    """splitmix64: (new state, number)."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return state, z ^ (z >> 31)


def _top_sums(groups: Floats) -> Floats:
    """[5, T]: sums of the N/2 - 2 … N/2 + 2 heaviest of the groups [N, T]."""
    half = len(groups) // 2
    falling = np.sort(groups, axis=0)[::-1].cumsum(axis=0, dtype=np.float32)
    sums = np.concatenate([np.zeros_like(falling[:1]), falling])
    return sums[half - 2 : half + 3]


def _gain(sums: Floats, a: Floats, b: Floats, change: Floats) -> float:
    """Change of the summed objective when group a gains `change` and group b loses it."""
    both, most = a + b, np.maximum(a, b)
    new_most = np.maximum(a + change, b - change)
    s0, s1, s2, s3, s4 = sums
    none = np.minimum(np.minimum(s4 - both, s3 - most), s2)
    one = np.minimum(np.minimum(s3 - both, s2 - most), s1) + new_most
    two = np.minimum(np.minimum(s2 - both, s1 - most), s0) + both
    return float((np.maximum(np.maximum(none, one), two) - s2).sum(dtype=np.float64))
