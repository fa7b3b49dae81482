"""Which neurons of an expert go into which sub-expert: swap search from the importance order.

Knows activations and the search of the core. The objective is the mean share of squared output mass
``(|a_j| * ||down_j||)^2`` that the best half of the N groups keeps (research: every start ends at
the same .95; importance order gets there first). The decision worth arguing about: groups are
numbered by falling mean of gate weight times group norm, so that slice 0 is the one most tokens
want.
"""

import torch
from prism.kernels.swap_search import importance_order, swap_search
from torch import Tensor

from prism_refactor.layer_experts import Expert
from prism_refactor.options import SEARCH_PROPOSALS_PER_NEURON


def neuron_mass(expert: Expert, x: Tensor) -> Tensor:
    """Squared output mass [I, T] fp32 of inputs [t, H], each token's sum scaled to 1.

    Tokens on which the expert is silent are left out, so T <= t.
    """
    norms = torch.linalg.vector_norm(expert.down, dim=0)  # [I]
    mass = (expert.activate(x) * norms).square()  # [t, I]
    total = mass.sum(1)
    loud = total > 0
    shares: Tensor = mass[loud] / total[loud, None]
    return shares.t().contiguous()


def partition(mass: Tensor, sub_experts: int, seed: int) -> Tensor:
    """Permutation [I] int64 that makes sub-experts contiguous; ``mass`` [I, T].

    An expert without mass (dead, or never routed to) keeps its order.
    """
    mass = mass.cpu()  # the search is C++ for CPUs
    width, tokens = mass.shape
    if tokens == 0:
        return torch.arange(width)
    proposals = SEARCH_PROPOSALS_PER_NEURON * width
    order, _ = swap_search(mass, sub_experts, importance_order(mass), proposals, seed)
    return order.to(torch.int64)


def order_slices(permutation: Tensor, mean_norm: Tensor) -> Tensor:
    """Renumber slices by falling ``mean_norm`` [N]; permutation [I] -> [I], neurons inside kept."""
    slices = permutation.view(len(mean_norm), -1)
    by_norm = torch.argsort(mean_norm, descending=True, stable=True)
    return slices[by_norm.to(slices.device)].reshape(-1)


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


def dropping_errors(expert: Expert, activations: Tensor, sub_experts: int) -> Tensor:
    """How far each slice's output lies from what will stand in for it, [t, N]; activations [t, I].

    The stand-in is the mean over tokens that drop the slice; which those are is not known yet, so
    the half of the tokens with the smaller output norm stands for them.
    """
    norms = slice_norms(expert, activations, sub_experts)
    quiet = (norms <= norms.median(0).values).float()  # [t, N]
    sliced = activations.view(len(activations), sub_experts, -1)
    mean = torch.einsum("tn,tns->ns", quiet / quiet.sum(0), sliced)  # [N, S]
    return slice_norms(expert, activations - mean.reshape(-1), sub_experts)
