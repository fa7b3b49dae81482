"""What every sub-expert kernel offers, and the packed weights it works on.

Knows shapes only. Decision: a kernel owns three steps (select, forward, compensate), because a
GPU or a C++ kernel wants its own form of each, and all three have one torch reference with this
signature.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prism.expert_weights import SWIGLU, ExpertWeights


@dataclass(frozen=True, slots=True)
class Packed:
    """One layer's expert weights as a kernel wants them; `owns_copy`: originals may be freed."""

    gate_up: Tensor  # in the kernel's own layout
    down: Tensor
    experts: int
    sub_experts: int
    hidden: int
    width: int  # neurons of one sub-expert: I / N
    owns_copy: bool
    weights: ExpertWeights | None = None  # views of the model, for kernels that own no copy


class Kernel(Protocol):
    """Sub-expert compute for one device. T tokens, K slots, E experts, N sub-experts, H hidden."""

    @property
    def name(self) -> str:
        """Short name, for logs."""

    def table_dtype(self, weights: torch.dtype) -> torch.dtype:
        """In which dtype sub-routers and means are wanted beside weights of this dtype."""

    def pack(self, weights: ExpertWeights, n: int) -> Packed:
        """Pack one layer's experts into n sub-experts each.

        Raises ValueError when I is no multiple of n, and for experts this kernel cannot compute.
        """

    def forward(
        self, packed: Packed, x: Tensor, index: Tensor, weights: Tensor, state: Tensor | None
    ) -> Tensor:
        """fp32 [T, H]: for each token the sum over its slots k and the sub-experts n with
        state[t, k, n] != 0 of weights[t, k] · down_n(activate(gate_n x, up_n x)).
        The bias of down is not in it: it belongs to the whole expert (see experts.forward).

        x [T, H] in the packed dtype; index [T, K] int64, an index >= E is skipped;
        weights [T, K] fp32; state uint8 [T, K, N], None: every sub-expert.
        """

    def select(
        self,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        router_weight: Tensor,
        router_bias: Tensor,
        log_theta: Tensor,
    ) -> Tensor:
        """As prism.selection.select; router_weight in the dtype of tables, sums in fp32."""

    def compensate(
        self,
        out: Tensor,
        index: Tensor,
        weights: Tensor,
        state: Tensor,
        means: Tensor,
        knot: Tensor,
    ) -> None:
        """Add to out [T, H] fp32, in place, for each token the sum over its slots k and the
        sub-experts n with state[t, k, n] == 0 of weights[t, k] · means[knot[t], index[t, k], n].

        weights [T, K] fp32; means [n_knots, E, N, H] in the dtype of tables; knot [T] int64.
        """


def sub_expert_width(weights: ExpertWeights, n: int) -> int:
    """Neurons of one sub-expert; ValueError when I is no multiple of n."""
    if n < 1 or weights.intermediate % n:
        raise ValueError(f"{weights.intermediate} neurons cannot be cut into {n} equal sub-experts")
    return weights.intermediate // n


def require_plain(weights: ExpertWeights, kernel: str) -> tuple[Tensor, Tensor]:
    """(gate, up) of experts that compute silu(gate) · up without biases; else ValueError."""
    if not weights.is_plain or weights.gate is None:
        raise ValueError(f"{kernel} computes {SWIGLU} without biases, not {weights.activation}")
    return weights.gate, weights.up
