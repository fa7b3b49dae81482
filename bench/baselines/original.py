"""The original model with somebody else answering for its experts, and what such a method is.

Knows transformers' experts interface. The decision worth arguing about: a method is fitted in one
forward pass over all calibration tokens, each layer just before it answers, so that its thresholds
see what its own earlier layers hand over. That is how ours are fitted, and it is kinder to the
baselines than a threshold from the full model's activations, which drifts by up to 1.5 points.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from prism.architectures import require_supported
from prism.expert_weights import ExpertWeights, expert_weights
from prism.experts import find_expert_modules
from prism.kernels import Kernel, Packed, pack
from prism.loading import load_model
from prism_refactor.paired import last_hidden
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

IMPLEMENTATION = "bench_baseline"


@dataclass(frozen=True, slots=True)
class Routed:
    """What one MoE layer is asked: x [T, H]; index and weights (fp32) [T, K]."""

    layer: int
    experts: ExpertWeights
    x: Tensor
    index: Tensor
    weights: Tensor


Answer = Callable[[Routed], Tensor]  # to [T, H] fp32


class Tally:
    """Share of the candidates that tokens computed, whatever the method counts."""

    def __init__(self) -> None:
        self.kept = 0
        self.candidates = 0

    def add(self, kept: Tensor) -> None:
        """Count the true entries of a mask."""
        self.kept += int(kept.count_nonzero())
        self.candidates += kept.numel()

    @property
    def share(self) -> float:
        return self.kept / max(1, self.candidates)


class Method(Protocol):
    """One baseline at one operating point."""

    name: str
    asked: float  # share of the experts' parameters a token should compute
    tally: Tally

    def fit(self, routed: Routed) -> None:
        """See one layer's calibration tokens, right before answering for them."""

    def answer(self, routed: Routed) -> Tensor:
        """[T, H] fp32."""

    def extra(self, hidden: int, width: int) -> float:
        """What it computes beside experts, as a share of an expert of `width` neurons."""


class Original:
    """A stock checkpoint in fp32."""

    def __init__(self, path: Path) -> None:
        self.model, self.tokenizer = load_model(path, torch.float32)
        self.modules = [module for _, module in find_expert_modules(self.model)]
        self.weights = [expert_weights(module) for module in self.modules]
        self._layer_of = {id(module): layer for layer, module in enumerate(self.modules)}
        self._answer: Answer | None = None
        ExpertsInterface.register(IMPLEMENTATION, self._dispatch)

    @property
    def top_k(self) -> int:
        return require_supported(self.model.config).experts_per_token

    def _dispatch(self, module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        layer = self._layer_of[id(module)]
        assert self._answer is not None
        return self._answer(Routed(layer, self.weights[layer], x, index, weights.float())).to(
            x.dtype
        )

    @contextmanager
    def answered_by(self, answer: Answer) -> Iterator[None]:
        """Forward passes inside the block ask `answer` for the experts."""
        before = self.model.get_experts_implementation()
        self._answer = answer
        ExpertsInterface.register(IMPLEMENTATION, self._dispatch)  # another Original may have been
        self.model.set_experts_implementation(IMPLEMENTATION)
        try:
            yield
        finally:
            self.model.set_experts_implementation(before)
            self._answer = None

    def hidden(self, ids: Tensor, answer: Answer | None = None) -> Tensor:
        """Last hidden states [S, W, H] of ids [S, W]; without an answer, the model as it is."""
        if answer is None:
            return last_hidden(self.model, ids)
        with self.answered_by(answer):
            return last_hidden(self.model, ids)

    def fit(self, method: Method, ids: Tensor) -> None:
        """Fit all layers of a method on calibration ids [S, W], one after the other."""

        def both(routed: Routed) -> Tensor:
            method.fit(routed)
            return method.answer(routed)

        self.hidden(ids, both)
        method.tally = Tally()


class PackedLayers:
    """Every layer's experts packed once for the kernel that serves, in `sub_experts` slices."""

    def __init__(self, layers: list[ExpertWeights], sub_experts: int) -> None:
        self.sub_experts = sub_experts
        self._layers: list[tuple[Kernel, Packed]] = [pack(held, sub_experts) for held in layers]

    def forward(self, routed: Routed, weights: Tensor, kept: Tensor) -> Tensor:
        """Sum over kept slices [T, K, N] (bool) with router weights [T, K] -> [T, H] fp32."""
        kernel, packed = self._layers[routed.layer]
        state = kept.to(torch.uint8).contiguous()
        return kernel.forward(packed, routed.x, routed.index, weights, state)

    def add_means(self, routed: Routed, out: Tensor, kept: Tensor, means: Tensor) -> None:
        """Add g · means [E, N, H] of what is not kept to out, in place."""
        kernel, _ = self._layers[routed.layer]
        row = torch.zeros(len(out), dtype=torch.int64)
        state = kept.to(torch.uint8).contiguous()
        kernel.compensate(out, routed.index, routed.weights, state, means.unsqueeze(0), row)
