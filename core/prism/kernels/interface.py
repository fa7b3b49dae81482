"""What every sub-expert kernel offers, and the packed weights it works on.

Knows shapes only. Decision: a kernel owns three steps (select, forward, compensate), because a
GPU or a C++ kernel wants its own form of each, and all three have one torch reference with this
signature.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """One layer's expert weights as a kernel wants them; `owns_copy`: originals may be freed."""

    gate_up: Tensor
    down: Tensor
    experts: int
    sub_experts: int
    hidden: int
    width: int  # neurons of one sub-expert: I / N
    owns_copy: bool


class Kernel(Protocol):
    """Sub-expert compute for one device. T tokens, K slots, E experts, N sub-experts, H hidden."""

    @property
    def name(self) -> str:
        """Short name, for logs."""

    def pack(self, gate_up: Tensor, down: Tensor, n: int) -> Packed:
        """Pack gate_up [E, 2I, H] (gate rows, then up rows) and down [E, H, I] into n sub-experts.

        Raises ValueError when I is no multiple of n.
        """

    def forward(
        self, packed: Packed, x: Tensor, index: Tensor, weights: Tensor, state: Tensor | None
    ) -> Tensor:
        """fp32 [T, H]: for each token the sum over its slots k and the sub-experts n with
        state[t, k, n] != 0 of weights[t, k] · down_n(silu(gate_n x) · up_n x).

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
        """As prism.selection.select."""

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

        weights [T, K] fp32; means [n_knots, E, N, H] fp32; knot [T] int64.
        """


def sub_expert_width(gate_up: Tensor, down: Tensor, n: int) -> int:
    """Neurons of one sub-expert; ValueError when the shapes do not fit each other or n."""
    experts, hidden, intermediate = down.shape
    if gate_up.shape != (experts, 2 * intermediate, hidden):
        raise ValueError(
            f"gate_up {tuple(gate_up.shape)} does not fit down {tuple(down.shape)}: "
            f"expected {(experts, 2 * intermediate, hidden)}"
        )
    if n < 1 or intermediate % n:
        raise ValueError(f"{intermediate} neurons cannot be cut into {n} equal sub-experts")
    return intermediate // n
