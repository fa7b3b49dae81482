"""The C++ kernel behind the common interface, and the weight layout it reads.

Layout (what forward.cpp expects): neurons are cut into sub-experts, a sub-expert into panels of
32 neurons (the last one 8, 16 or 32, zero-padded). gate_up of a panel is [H, gate columns then up
columns], so one pass over x gives both; down is cut into panels of 64 output columns, [w, 64]
each. In bf16 two neighbours along the inner dimension lie together, as the dot-product
instruction wants them. Everything a sub-expert needs is contiguous, so decode streams at memory
speed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from prism.expert_weights import ExpertWeights
from prism.kernels.interface import Packed, require_plain, sub_expert_width

DTYPES = (torch.float32, torch.bfloat16)
_PANEL = 32
_COLUMNS = 64


def _panels(width: int) -> Iterator[tuple[int, int, int]]:
    """(first neuron, neurons, neurons padded) of each panel of a sub-expert."""
    for first in range(0, width, _PANEL):
        left = min(_PANEL, width - first)
        yield first, left, next(size for size in (8, 16, _PANEL) if size >= left)


def _interleave(block: Tensor) -> Tensor:
    """[S, k, cols] as the kernel's elements: bf16 in pairs along k, [S, k / 2, cols, 2]."""
    if block.dtype == torch.float32:
        return block
    s, k, cols = block.shape
    return block.view(s, k // 2, 2, cols).transpose(2, 3)


def _pack_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """One expert: gate and up [N, w, H] -> [N, 2 · padded w · H]."""
    parts = []
    for first, neurons, padded in _panels(gate.shape[1]):
        missing = (0, 0, 0, padded - neurons)
        halves = [pad(part[:, first : first + neurons], missing) for part in (gate, up)]
        block = torch.cat(halves, dim=1).transpose(1, 2).contiguous()  # [N, H, 2 padded]
        parts.append(_interleave(block).flatten(1))
    return torch.cat(parts, dim=1)


def _pack_down(down: Tensor, padded_width: int) -> Tensor:
    """One expert: down [N, w, H] -> [N, padded w · padded H]."""
    n, width, hidden = down.shape
    down = pad(down, (0, -hidden % _COLUMNS, 0, padded_width - width))
    columns = down.view(n, padded_width, -1, _COLUMNS).transpose(1, 2).contiguous()
    return _interleave(columns.view(-1, padded_width, _COLUMNS)).reshape(n, -1)


class CpuKernel:
    """C++ through torch.ops.prism; needs prism.kernels.build.load() first.

    `isa` asks for one instruction set by name (for tests); empty: the best this machine has.
    """

    def __init__(self, isa: str = "") -> None:
        self._isa = isa
        self.name = f"C++ {isa or torch.ops.prism.isa_name()}"

    def table_dtype(self, weights: torch.dtype) -> torch.dtype:
        return weights

    def pack(self, weights: ExpertWeights, n: int) -> Packed:
        gate, up = require_plain(weights, self.name)
        width = sub_expert_width(weights, n)
        experts, hidden = weights.experts, weights.hidden
        padded = sum(size for _, _, size in _panels(width))
        hidden_padded = -(-hidden // _COLUMNS) * _COLUMNS
        packed_gate_up = up.new_empty(experts, n, 2 * padded * hidden)
        packed_down = up.new_empty(experts, n, padded * hidden_padded)
        for e in range(experts):  # one at a time: the copy in flight stays small
            halves = (part[e].reshape(n, width, hidden) for part in (gate, up))
            packed_gate_up[e] = _pack_gate_up(*halves)
            packed_down[e] = _pack_down(weights.down[e].t().reshape(n, width, hidden), padded)
        return Packed(
            packed_gate_up.flatten(0, 1),
            packed_down.flatten(0, 1),
            experts,
            n,
            hidden,
            width,
            owns_copy=True,
        )

    def forward(
        self, packed: Packed, x: Tensor, index: Tensor, weights: Tensor, state: Tensor | None
    ) -> Tensor:
        out: Tensor = torch.ops.prism.sub_expert_forward(
            x.contiguous(),
            index.contiguous(),
            weights.contiguous(),
            state,
            packed.gate_up,
            packed.down,
            packed.experts,
            packed.sub_experts,
            packed.width,
            self._isa,
        )
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
        state: Tensor = torch.ops.prism.select(
            x.float().contiguous(),
            index.contiguous(),
            weights.contiguous(),
            router_weight,
            router_bias,
            log_theta,
        )
        return state

    def compensate(
        self,
        out: Tensor,
        index: Tensor,
        weights: Tensor,
        state: Tensor,
        means: Tensor,
        knot: Tensor,
    ) -> None:
        torch.ops.prism.compensate(
            out, index.contiguous(), weights.contiguous(), state, means, knot
        )
