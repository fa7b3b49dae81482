"""Our sub-routers, thresholds and stand-ins on another partition: index order, or random.

What a refactoring is worth without looking at which neurons belong together. Index order is what
cutting a checkpoint's tensors into slices gives. Everything but the partition is the code that
refactors, on the same calibration tokens.
"""

from copy import deepcopy
from typing import Any

import torch
from prism_refactor.cut import Cut, Cutter
from prism_refactor.layer_experts import full_output
from prism_refactor.options import WINDOW
from prism_refactor.reduce import LayerKnot, LayerReduction
from prism_refactor.thresholds import scores
from torch import Tensor

from bench.baselines.original import Original, Routed, Tally


class IndexCutter(Cutter):
    """Slices as the neurons lie in the checkpoint."""

    def _partitions(
        self, layer: int, module: Any, x: Tensor, inputs: list[Any], width: int
    ) -> Tensor:
        return torch.arange(width).repeat(len(inputs), 1)


class RandomCutter(Cutter):
    """Slices of neurons drawn at random."""

    def _partitions(
        self, layer: int, module: Any, x: Tensor, inputs: list[Any], width: int
    ) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + layer)
        return torch.rand(len(inputs), width, generator=generator).argsort(1)


class Partition:
    """A partition of every layer with sub-routers, fitted on the full model's stream."""

    def __init__(self, original: Original, cutter: Cutter, ids: Tensor) -> None:
        self.cuts: list[Cut] = []
        self.layers: list[LayerReduction] = []

        def cut(routed: Routed) -> Tensor:
            module = original.modules[routed.layer]
            found = cutter.fit(routed.layer, module, routed.x, routed.index, routed.weights)
            self.cuts.append(found)
            self.layers.append(LayerReduction(deepcopy(module), found, WINDOW))
            return full_output(module, routed.x, routed.index, routed.weights)

        original.hidden(ids, cut)


class OurSelection:
    """Selection and stand-ins of the refactoring at one level of a partition."""

    def __init__(self, name: str, partition: Partition, share: float) -> None:
        self.name = name
        self.asked = share
        self.tally = Tally()
        self._partition = partition
        self._knots: dict[int, LayerKnot] = {}

    def fit(self, routed: Routed) -> None:
        reduction = self._partition.layers[routed.layer]
        level = round(100 * self.asked)
        self._knots[routed.layer] = reduction.fit(level, routed.x, routed.index, routed.weights)

    def answer(self, routed: Routed) -> Tensor:
        cut, knot = self._partition.cuts[routed.layer], self._knots[routed.layer]
        given = routed.x, routed.index, routed.weights
        self.tally.add(scores(*given, cut.router_weight, cut.router_bias) > knot.log_theta)
        return self._partition.layers[routed.layer].output(knot, *given)

    def extra(self, hidden: int, width: int) -> float:
        n = self._partition.cuts[0].router_bias.shape[1]
        return n * (hidden + 1 + (1 - self.tally.share) * hidden) / (3 * hidden * width)
