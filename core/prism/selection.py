"""Which sub-experts a token computes: the torch reference.

Knows the rule (log g + x·w + b > log θ, in fp32) and nothing of levels, models or kernels. The
result is a small state per (token, expert slot, sub-expert), not a bit, because precision per
sub-expert is the next axis. Decision: all experts' sub-routers run as one GEMM and the hit ones
are gathered; wasteful per token, but free of data-dependent shapes, so the same code serves CUDA
without a host sync. The C++ kernel computes the hit ones alone. Riding along likewise works on
tables of fixed size: one row for each (decode batch, expert), as many batches as tokens.
"""

import torch
from torch import Tensor

from prism.batch_context import GroupCounts

OFF = 0
OWN = 1
RIDE = 2  # dropped by the token, computed all the same: its decode batch reads the slice anyway


def select(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    log_theta: Tensor,
) -> Tensor:
    """State uint8 [T, K, N]: OWN where the token computes the sub-expert, else OFF.

    x [T, H]; index [T, K] experts; weights [T, K] the model's own top-k weights (> 0);
    router_weight [E, N, H], sums in fp32; router_bias [E, N] fp32; log_theta [T] fp32, minus
    infinity keeps everything (level 100). An index >= E (expert parallelism's sentinel) gets OFF.
    """
    experts, n, hidden = router_weight.shape
    flat = router_weight.reshape(experts * n, hidden).float()
    scores = torch.addmm(router_bias.reshape(-1), x.float(), flat.t())  # [T, E*N] fp32
    scores = scores.view(-1, experts, n)
    here = index.clamp(max=experts - 1).long().unsqueeze(-1).expand(-1, -1, n)
    scores = scores.gather(1, here) + weights.float().log().unsqueeze(-1)  # [T, K, N]
    theta = log_theta.view(-1, 1, 1)
    # A weight of zero makes the score minus infinity too, and level 100 still computes it.
    keep = (scores > theta) | (theta == -torch.inf)
    return (keep & (index < experts).unsqueeze(-1)).to(torch.uint8)


def ride_along(state: Tensor, index: Tensor, groups: Tensor, experts: int) -> Tensor:
    """`state` [T, K, N] with RIDE where a token of the same group computes what this one dropped.

    index [T, K] experts, `experts` or more: none; groups int64 [T], numbers from 0 to T - 1.
    """
    pairs = _pairs(index, groups, experts)
    read = _union(state != OFF, pairs, experts)  # [T (E + 1), N]
    offered = read.index_select(0, pairs.flatten()).view_as(state).bool()
    return torch.where((state == OFF) & offered, RIDE, state)


def faded(scalars: Tensor, state: Tensor) -> Tensor:
    """Scalars fp32 [T, K] of the kept sum, fitted without neighbours, as riding along needs them.

    1 + (scalar - 1) · still dropped / dropped by the token itself: nothing is left to make up for
    when all of it rode along.
    """
    dropped = (state != OWN).sum(-1)
    share = (state == OFF).sum(-1) / dropped.clamp(min=1)
    return 1 + (scalars - 1) * torch.where(dropped > 0, share, 1.0)


def count_groups(
    state: Tensor | None, index: Tensor, groups: Tensor, shape: tuple[int, int]
) -> GroupCounts:
    """What the groups read in a layer of `shape` (experts, sub-experts); state None: level 100."""
    experts, n = shape
    pairs = _pairs(index, groups, experts)
    there = (index < experts).unsqueeze(-1)
    hit = n * _union(there, pairs, experts).sum()
    if state is None:
        return GroupCounts(hit, hit, 0, 0)
    read = _union(state != OFF, pairs, experts).sum()
    means = _union((state == OFF) & there, pairs, experts).sum()
    return GroupCounts(hit, read, hit, means)


def _pairs(index: Tensor, groups: Tensor, experts: int) -> Tensor:
    """Row [T, K] of the tables: group and expert as one number; the last expert is "none"."""
    return groups.unsqueeze(1) * (experts + 1) + index.clamp(max=experts)


def _union(flags: Tensor, pairs: Tensor, experts: int) -> Tensor:
    """uint8 [T (E + 1), n]: 1 where any of the row's tokens sets `flags` [T, K, n]."""
    n = flags.shape[-1]
    table = torch.zeros(len(flags) * (experts + 1), n, dtype=torch.uint8, device=flags.device)
    rows = pairs.view(-1, 1).expand(-1, n)
    return table.scatter_reduce_(0, rows, flags.reshape(-1, n).to(torch.uint8), "amax")
