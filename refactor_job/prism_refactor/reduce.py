"""A knot in one layer: threshold, means and scalars, fitted on what the layers before it really
hand over at that level.

Knows thresholds and compensation. The decision worth arguing about: sequential fitting, so that
errors of earlier layers are part of what later layers are fitted on and the realised own share is
the level.
"""

from dataclasses import dataclass
from typing import Any

import torch
from prism.batch_context import slice_overhead
from prism.expert_weights import add_down_bias, expert_weights
from prism.kernels import pack
from torch import Tensor

from prism_refactor.batches import BATCH_SIZES, BatchShares, batch_shares
from prism_refactor.compensate import compensate
from prism_refactor.cut import Cut
from prism_refactor.layer_experts import expert_of, permute_neurons, routed, spread
from prism_refactor.options import COMPENSATION_TOKENS, KNOTS
from prism_refactor.thresholds import log_threshold, scores


@dataclass(frozen=True, slots=True)
class LayerKnot:
    """What a knot's pass leaves of one layer."""

    log_theta: Tensor  # [] float64
    means: Tensor  # [E, N, H] fp32
    scalars: Tensor  # [E, N + 1] fp32, by the number of slices kept
    read: Tensor  # [B] float64, as in BatchShares
    dropped: Tensor
    computed: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, for the partial folder."""
        return {name: getattr(self, name) for name in self.__slots__}


class LayerReduction:
    """One MoE layer, its neurons in the order of its cut, at any knot.

    ``module`` is changed in place: its neurons are reordered. Weights are packed once for all
    knots.
    """

    def __init__(self, module: Any, cut: Cut, sequence_length: int) -> None:
        permute_neurons(module, cut.permutations.long())
        self._module = module
        self._sequence_length = sequence_length
        self._held = expert_weights(module)
        self._kernel, self._packed = pack(self._held, cut.router_bias.shape[1])
        # What serves decides the stream that the next layers are fitted on, rounding included.
        tables = self._kernel.table_dtype(self._packed.down.dtype)
        self._device = self._packed.down.device
        self._cut = Cut(*(part.to(self._device) for part in cut.tensors().values()))
        self._router = self._cut.router_weight.to(tables)

    def fit(self, level: int, x: Tensor, index: Tensor, weights: Tensor) -> LayerKnot:
        """Threshold and stand-ins for what the layers before really hand over at ``level``."""
        cut = self._cut
        score = scores(x, index, weights, cut.router_weight, cut.router_bias)
        log_theta = log_threshold(score, level)
        selected = score > log_theta  # [T, K, N]
        experts, slices, hidden = cut.router_weight.shape
        means = torch.zeros(experts, slices, hidden, device=self._device)
        scalars = torch.ones(experts, slices + 1, device=self._device)
        for number, tokens, slots in routed(index, experts):
            sample = spread(torch.arange(len(tokens)), COMPENSATION_TOKENS)
            tokens, slots = tokens[sample], slots[sample]
            expert = expert_of(self._module, number)
            fitted = compensate(
                expert,
                expert.activate(x[tokens]),
                selected[tokens, slots],
                weights[tokens, slots],
            )
            means[number] = fitted.means
            scalars[number] = fitted.scalars
        on_cpu = selected.cpu(), index.cpu()
        shares: BatchShares = batch_shares(*on_cpu, experts, self._sequence_length)
        theta = torch.tensor(log_theta, dtype=torch.float64)
        return LayerKnot(theta, means, scalars, shares.read, shares.dropped, shares.computed)

    def output(self, knot: LayerKnot, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """sum_k g_k (scalar * kept + means of dropped) [T, H] fp32, by the kernel that serves."""
        cut, kernel = self._cut, self._kernel
        weights = weights.float()
        log_theta = knot.log_theta.float().to(self._device).expand(len(x)).contiguous()
        state = kernel.select(x, index, weights, self._router, cut.router_bias, log_theta)
        scalars = knot.scalars.to(self._device)[index, state.sum(-1, dtype=torch.int64)]
        out = kernel.forward(self._packed, x, index, weights * scalars, state)
        row = torch.zeros(len(x), dtype=torch.int64, device=self._device)
        means = knot.means.to(self._device, self._router.dtype)
        kernel.compensate(out, index, weights, state, means.unsqueeze(0), row)
        if self._held.down_bias is not None:
            add_down_bias(out, index, weights, self._held.down_bias)
        return out


def batch_curves(
    knots: list[list[LayerKnot]], slice_width: int
) -> dict[str, dict[str, list[float]]]:
    """Shares of a batch's bytes and compute, mean over layers, overheads included.

    Sub-routers and means in the weights' dtype, as the C++ kernel keeps them.
    """
    overhead = slice_overhead(slice_width)
    curves = {}
    for level, row in zip(KNOTS, knots, strict=True):
        read = torch.stack([knot.read for knot in row]).mean(0)
        dropped = torch.stack([knot.dropped for knot in row]).mean(0)
        rides = torch.stack([knot.computed for knot in row]).mean(0)
        curves[str(level)] = {
            "batch": [float(size) for size in BATCH_SIZES],
            "bytes_share": (read + overhead * (1 + dropped)).tolist(),
            "ride_along_bytes_share": (read + overhead * (2 - read)).tolist(),
            "computed_share": [level / 100] * len(BATCH_SIZES),
            "ride_along_computed_share": rides.tolist(),
        }
    return curves
