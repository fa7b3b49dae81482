"""Which sub-experts a token computes: the torch reference.

Knows the rule (log g + x·w + b > log θ, in fp32) and nothing of levels, models or kernels. The
result is a small state per (token, expert slot, sub-expert), not a bit, because precision per
sub-expert is the next axis. Decision: all experts' sub-routers run as one GEMM and the hit ones
are gathered; wasteful per token, but free of data-dependent shapes, so the same code serves CUDA
without a host sync. The C++ kernel computes the hit ones alone.
"""

import torch
from torch import Tensor

OFF = 0
OWN = 1


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
    router_weight [E, N, H] fp32; router_bias [E, N] fp32; log_theta [T] fp32, minus infinity
    keeps everything (level 100). An index >= E (expert parallelism's sentinel) gets OFF.
    """
    experts, n, hidden = router_weight.shape
    flat = router_weight.reshape(experts * n, hidden)
    scores = torch.addmm(router_bias.reshape(-1), x.float(), flat.t())  # [T, E*N] fp32
    scores = scores.view(-1, experts, n)
    here = index.clamp(max=experts - 1).long().unsqueeze(-1).expand(-1, -1, n)
    scores = scores.gather(1, here) + weights.float().log().unsqueeze(-1)  # [T, K, N]
    theta = log_theta.view(-1, 1, 1)
    # A weight of zero makes the score minus infinity too, and level 100 still computes it.
    keep = (scores > theta) | (theta == -torch.inf)
    return (keep & (index < experts).unsqueeze(-1)).to(torch.uint8)
