"""Sub-expert forward in Triton for CUDA: rows sorted by sub-expert, two grouped kernels.

Reads the model's own weights where they lie as it wants them (a sub-expert is a slice of them), and
owns a copy where not. Everything
between routing and output has shapes that follow from T alone: rows are sorted on the device, the
grid is the largest that T allows and surplus blocks leave at once, so there is no host sync and a
CUDA graph can hold it. It is one operator (prism::triton_forward) to graphs and compilers.

Decision: the down kernel adds to the output with atomics. The order of a token's few summands is
then not fixed, so fp32 sums may differ in the last bits from run to run; the CPU kernel has no
such freedom. NB: the interpreter multiplies bf16 as raw integers, silently; UPCAST avoids it
there.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism.expert_weights import ExpertWeights
from prism.kernels.interface import Packed, require_plain, sub_expert_width
from prism.kernels.reference import ReferenceKernel

FEW_ROWS = 16  # rows a block when sub-experts get few: the least tl.dot takes
MANY_ROWS = 64
BLOCK_NEURONS = 64
BLOCK_HIDDEN = 64
BLOCK_INNER = 64
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def gate_up_kernel(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2 N W, H]
    weight_ptr,  # [T K] fp32
    inner_ptr,  # [rows, W]
    row_ptr,  # [rows] (token, slot, sub-expert) triple of each sorted row
    begin_ptr,  # [E N + 1] first sorted row of each sub-expert
    block_sub_ptr,  # [blocks] sub-expert of a block; E N: none
    block_row_ptr,  # [blocks] its first sorted row
    H: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SUBS: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """inner[row, :] = weight · silu(gate x) · (up x) for one block of rows of one sub-expert."""
    sub = tl.load(block_sub_ptr + tl.program_id(0))
    if sub < SUBS:
        row = tl.load(block_row_ptr + tl.program_id(0)) + tl.arange(0, BM)
        here = row < tl.load(begin_ptr + sub + 1)
        pair = tl.load(row_ptr + row, mask=here, other=0) // N
        token = (pair // K).to(tl.int64)
        neuron = tl.program_id(1) * BW + tl.arange(0, BW)
        inside = neuron < W
        first = (sub // N).to(tl.int64) * 2 * N * W + (sub % N) * W
        gate_row = gate_up_ptr + (first + neuron)[None, :] * H
        up_row = gate_row + N * W * H
        gate = tl.zeros((BM, BW), tl.float32)
        up = tl.zeros((BM, BW), tl.float32)
        for k in range(0, H, BK):
            inner = k + tl.arange(0, BK)
            rest = inner < H
            x = tl.load(
                x_ptr + token[:, None] * H + inner[None, :],
                mask=here[:, None] & rest[None, :],
                other=0.0,
            )
            both = rest[:, None] & inside[None, :]
            wg = tl.load(gate_row + inner[:, None], mask=both, other=0.0)
            wu = tl.load(up_row + inner[:, None], mask=both, other=0.0)
            if UPCAST:
                x, wg, wu = x.to(tl.float32), wg.to(tl.float32), wu.to(tl.float32)
            gate = tl.dot(x, wg, gate, input_precision="ieee")
            up = tl.dot(x, wu, up, input_precision="ieee")
        scale = tl.load(weight_ptr + pair, mask=here, other=0.0)
        value = gate * tl.sigmoid(gate) * up * scale[:, None]
        tl.store(
            inner_ptr + row.to(tl.int64)[:, None] * W + neuron[None, :],
            value.to(inner_ptr.dtype.element_ty),
            mask=here[:, None] & inside[None, :],
        )


@triton.jit
def down_kernel(
    inner_ptr,  # [rows, W]
    down_ptr,  # [E, H, N W]
    out_ptr,  # [T, H] fp32
    row_ptr,
    begin_ptr,
    block_sub_ptr,
    block_row_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SUBS: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[token of row, :] += down inner[row, :] for one block of rows of one sub-expert."""
    sub = tl.load(block_sub_ptr + tl.program_id(0))
    if sub < SUBS:
        row = tl.load(block_row_ptr + tl.program_id(0)) + tl.arange(0, BM)
        here = row < tl.load(begin_ptr + sub + 1)
        token = (tl.load(row_ptr + row, mask=here, other=0) // N // K).to(tl.int64)
        column = tl.program_id(1) * BH + tl.arange(0, BH)
        inside = column < H
        first = (sub // N).to(tl.int64) * H
        down_row = down_ptr + (first + column)[None, :] * (N * W) + (sub % N) * W
        acc = tl.zeros((BM, BH), tl.float32)
        for k in range(0, W, BK):
            neuron = k + tl.arange(0, BK)
            rest = neuron < W
            a = tl.load(
                inner_ptr + row.to(tl.int64)[:, None] * W + neuron[None, :],
                mask=here[:, None] & rest[None, :],
                other=0.0,
            )
            w = tl.load(down_row + neuron[:, None], mask=rest[:, None] & inside[None, :], other=0.0)
            if UPCAST:
                a, w = a.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(a, w, acc, input_precision="ieee")
        tl.atomic_add(
            out_ptr + token[:, None] * H + column[None, :],
            acc,
            mask=here[:, None] & inside[None, :],
            sem="relaxed",
        )


def _sort_rows(index: Tensor, state: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    """(row int32 [T·K·N], begin int32 [subs + 1]): triples sorted by sub-expert, those off last."""
    n = state.shape[2]
    sub = index.unsqueeze(-1) * n + torch.arange(n, device=index.device)
    on = (state != 0) & (sub < subs)
    key = torch.where(on, sub, subs).flatten()
    count = torch.zeros(subs + 1, dtype=torch.int64, device=index.device)
    count.scatter_add_(0, key, torch.ones_like(key))
    begin = torch.cat([count.new_zeros(1), count[:subs].cumsum(0)])
    return key.argsort(stable=True).int(), begin.int()


def _blocks(begin: Tensor, rows: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """(sub-expert, first row) int32 of each block of the largest grid that `rows` rows can need."""
    subs = begin.shape[0] - 1
    most = min(rows, -(-rows // block_rows) + subs)
    ends = ((begin.diff() + block_rows - 1) // block_rows).cumsum(0)  # blocks up to each sub-expert
    block = torch.arange(most, device=begin.device)
    sub = torch.searchsorted(ends, block, right=True)  # subs where the block is surplus
    before = torch.cat([ends.new_zeros(1), ends])[sub]
    first = begin[sub.clamp(max=subs - 1)] + (block - before) * block_rows
    return sub.int(), first.int()


@torch.library.custom_op("prism::triton_forward", mutates_args=())
def triton_forward(
    x: Tensor, index: Tensor, weights: Tensor, state: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """As Kernel.forward, on the model's own weights: gate_up [E, 2I, H], down [E, H, I]."""
    tokens, slots, n = state.shape
    experts, hidden, intermediate = down.shape
    width, subs, rows = intermediate // n, experts * n, tokens * slots * n
    out = torch.zeros(tokens, hidden, dtype=torch.float32, device=x.device)
    block_rows = FEW_ROWS if tokens * slots <= FEW_ROWS * experts else MANY_ROWS
    row, begin = _sort_rows(index, state, subs)
    block_sub, block_row = _blocks(begin, rows, block_rows)
    inner = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    shape = {"H": hidden, "W": width, "N": n, "K": slots, "SUBS": subs, "BM": block_rows}
    shape |= {"BK": BLOCK_INNER, "UPCAST": _INTERPRET}
    where = (row, begin, block_sub, block_row)
    grid = (block_sub.shape[0], triton.cdiv(width, BLOCK_NEURONS))
    gate_up_kernel[grid](x, gate_up, weights, inner, *where, **shape, BW=BLOCK_NEURONS)
    grid = (block_sub.shape[0], triton.cdiv(hidden, BLOCK_HIDDEN))
    down_kernel[grid](inner, down, out, *where, **shape, BH=BLOCK_HIDDEN)
    return out


@triton_forward.register_fake
def _(
    x: Tensor, index: Tensor, weights: Tensor, state: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _beside(gate: Tensor, up: Tensor) -> Tensor:
    """[E, 2I, H]: the tensor that both are halves of, or a new one where there is none."""
    experts, width, hidden = gate.shape
    strides = (2 * width * hidden, hidden, 1)
    after = gate.data_ptr() + width * hidden * gate.element_size()
    if gate.stride() == up.stride() == strides and up.data_ptr() == after:
        return gate.as_strided((experts, 2 * width, hidden), strides)
    return torch.cat([gate, up], dim=1)


class TritonKernel(ReferenceKernel):
    """Triton forward; selection and means are the reference's, which need no host sync."""

    name = "Triton"

    def table_dtype(self, weights: torch.dtype) -> torch.dtype:
        return torch.float32  # selection and means run as torch's GEMMs in fp32

    def pack(self, weights: ExpertWeights, n: int) -> Packed:
        gate, up = require_plain(weights, self.name)
        width = sub_expert_width(weights, n)
        gate_up = _beside(gate, up)
        down = weights.down.contiguous()
        copied = gate_up.data_ptr() != gate.data_ptr() or down.data_ptr() != weights.down.data_ptr()
        shape = weights.experts, n, weights.hidden, width
        return Packed(gate_up, down, *shape, owns_copy=copied)

    def forward(
        self, packed: Packed, x: Tensor, index: Tensor, weights: Tensor, state: Tensor | None
    ) -> Tensor:
        if state is None:
            shape = (*index.shape, packed.sub_experts)
            state = torch.ones(shape, dtype=torch.uint8, device=x.device)
        out: Tensor = triton_forward(
            x.contiguous(),
            index.contiguous(),
            weights.contiguous(),
            state,
            packed.gate_up,
            packed.down,
        )
        return out
