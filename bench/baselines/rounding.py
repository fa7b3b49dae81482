"""Rounding expert weights: what saves bytes without any selection, 8 and 4 bits.

Weight-only, to nearest, symmetric, one bf16 scale for each group of 64 weights along the hidden
size inside each neuron, as the simplest of the usual formats (llama.cpp's Q8_0 and Q4_0 use 32).
All of the experts is computed, so it saves bytes and no arithmetic: it is compared at equal bytes.
"""

from dataclasses import replace

import torch
from prism.expert_weights import ExpertWeights
from torch import Tensor

from bench.baselines.original import Original, PackedLayers, Routed, Tally

GROUP = 64
SCALE_BITS = 16
STORED_BITS = 16  # of a weight that is not rounded


class Rounded:
    """All experts in full, their weights rounded to `bits`."""

    def __init__(self, original: Original, bits: int) -> None:
        self.name = f"{bits}-bit weights"
        self.asked = 1.0
        self.bytes_share = (bits + SCALE_BITS / GROUP) / STORED_BITS
        self.tally = Tally()
        layers = [rounded(held, bits) for held in original.weights]
        self._packed = PackedLayers(layers, 1)

    def fit(self, routed: Routed) -> None:
        """Nothing to fit."""

    def answer(self, routed: Routed) -> Tensor:
        kept = torch.ones(*routed.index.shape, 1, dtype=torch.bool)
        self.tally.add(kept)
        return self._packed.forward(routed, routed.weights, kept)

    def extra(self, hidden: int, width: int) -> float:
        return 0.0


def rounded(held: ExpertWeights, bits: int) -> ExpertWeights:
    """A copy of a layer's experts with rounded weights."""
    gate = None if held.gate is None else round_groups(held.gate, bits)
    down = round_groups(held.down.transpose(1, 2), bits).transpose(1, 2)
    return replace(held, gate=gate, up=round_groups(held.up, bits), down=down)


def round_groups(weight: Tensor, bits: int) -> Tensor:
    """[E, I, H] rounded in groups along H; H must be a multiple of the group."""
    groups = weight.float().reshape(*weight.shape[:2], -1, GROUP)
    most = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(3, keepdim=True) / most).bfloat16().float().clamp(min=1e-12)
    restored: Tensor = (groups / scale).round().clamp(-most, most) * scale
    return restored.flatten(2)
