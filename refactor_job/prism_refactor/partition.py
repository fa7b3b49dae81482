"""Which neurons of an expert go into which sub-expert: swap search from the importance order.

Knows activations and the search of the core. The objective is the mean share of squared output mass
``(|a_j| * ||down_j||)^2`` that the best half of the N groups keeps (research: every start ends at
the same .95; importance order gets there first). The decision worth arguing about: groups are
numbered by falling mean of gate weight times group norm, so that slice 0 is the one most tokens
want.
"""

import torch
from prism.kernels.swap_search import swap_search
from torch import Tensor

from prism_refactor.layer_experts import Expert
from prism_refactor.options import SEARCH_PROPOSALS_PER_NEURON

_LANES = 16  # the search works on blocks of this many tokens


def neuron_mass(expert: Expert, x: Tensor) -> Tensor:
    """Squared output mass [I, T] fp32 of inputs [t, H], each token's sum scaled to 1; T = 16 n <=
    t.
    """
    mass = (expert.activate(x) * expert.down.norm(dim=0)).square()  # [t, I]
    total = mass.sum(1, keepdim=True)
    mass = mass[(total[:, 0] > 0)] / total[total > 0][:, None]
    usable = len(mass) // _LANES * _LANES
    return mass[:usable].t().contiguous()


def partition(mass: Tensor, sub_experts: int, seed: int) -> Tensor:
    """Permutation [I] int64 that makes sub-experts contiguous; ``mass`` [I, T].

    An expert without mass (dead, or never routed to) keeps its order.
    """
    width, tokens = mass.shape
    if tokens == 0:
        return torch.arange(width)
    start = torch.argsort(mass.sum(1), descending=True, stable=True).to(torch.int32)
    order, _ = swap_search(mass, sub_experts, start, SEARCH_PROPOSALS_PER_NEURON * width, seed)
    return order.to(torch.int64)


def order_slices(permutation: Tensor, mean_norm: Tensor) -> Tensor:
    """Renumber slices by falling ``mean_norm`` [N]; permutation [I] -> [I], neurons inside kept."""
    slices = permutation.view(len(mean_norm), -1)
    return slices[torch.argsort(mean_norm, descending=True, stable=True)].reshape(-1)


def slice_norms(expert: Expert, activations: Tensor, sub_experts: int) -> Tensor:
    """Output norm [t, N] of every slice, neurons already in order; activations [t, I].

    ``||D_n a_n||^2 = a_n^T (D_n^T D_n) a_n`` needs I/N times I instead of H times I products.
    """
    tokens, width = activations.shape
    size = width // sub_experts
    sliced = activations.view(tokens, sub_experts, size).transpose(0, 1)  # [N, t, S]
    down = expert.down.t().reshape(sub_experts, size, -1)  # [N, S, H]
    gram = down @ down.transpose(1, 2)  # [N, S, S]
    squared = ((sliced @ gram) * sliced).sum(2).t()  # [t, N]
    return squared.clamp_min(0).sqrt()
