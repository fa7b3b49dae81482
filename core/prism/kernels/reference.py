"""The torch reference: right everywhere, fast nowhere. Every other kernel is tested against it.

Computes each hit expert in full and masks the neurons of sub-experts that are off, so time does
not fall with the level; it is the fallback where nothing better runs. Matmuls are done in the
weights' dtype, sums over slots in fp32.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from prism import selection
from prism.expert_weights import ExpertWeights
from prism.kernels.interface import Packed, sub_expert_width


class ReferenceKernel:
    """Plain torch, for experts of any layout and gate; holds views of the model's tensors."""

    name = "torch reference"

    def table_dtype(self, weights: torch.dtype) -> torch.dtype:
        return torch.float32

    def pack(self, weights: ExpertWeights, n: int) -> Packed:
        width = sub_expert_width(weights, n)
        shape = weights.experts, n, weights.hidden, width
        return Packed(weights.up, weights.down, *shape, owns_copy=False, weights=weights)

    def forward(
        self, packed: Packed, x: Tensor, index: Tensor, weights: Tensor, state: Tensor | None
    ) -> Tensor:
        experts = packed.weights
        assert experts is not None  # packed by this kernel
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in torch.unique(index).tolist():
            if expert >= packed.experts:
                continue
            token, slot = (index == expert).nonzero(as_tuple=True)
            inner = experts.inner(expert, x[token])  # [rows, I]
            if state is not None:
                on = (state[token, slot] != 0).repeat_interleave(packed.width, dim=-1)
                inner = inner * on
            y = linear(inner, experts.down[expert]).float() * weights[token, slot, None]
            out.index_add_(0, token, y)
        return out

    def select(
        self,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        router_weight: Tensor,
        router_bias: Tensor,
        log_theta: Tensor,
    ) -> Tensor:
        return selection.select(x, index, weights, router_weight, router_bias, log_theta)

    def compensate(
        self,
        out: Tensor,
        index: Tensor,
        weights: Tensor,
        state: Tensor,
        means: Tensor,
        knot: Tensor,
    ) -> None:
        knots, experts, n, hidden = means.shape
        here = index < experts
        dropped = (state == 0) & here.unsqueeze(-1)
        value = weights.unsqueeze(-1) * dropped  # [T, K, N]
        column = index.clamp(max=experts - 1).unsqueeze(-1) * n + torch.arange(n, device=out.device)
        table = torch.zeros(out.shape[0], experts * n, device=out.device)
        table.scatter_add_(1, column.flatten(1), value.flatten(1))
        for i in range(knots):  # one GEMM per knot; no host sync to ask which knots are in use
            rows = table * (knot == i).unsqueeze(-1)
            out.addmm_(rows, means[i].reshape(experts * n, hidden).float())
