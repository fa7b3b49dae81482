"""Whole experts left out: fewer for every token, or fewer for the tokens that need fewer.

Lower top-k: what llama.cpp's and others' flag for the number of experts does (llama.cpp pull
request 18029). Token-adaptive skipping: "Not All Experts are Equal" (Lu et al., ACL 2024, arXiv
2402.14800) skips experts whose gate is small beside the token's largest; here one threshold per
layer on the gate, or on gate times the expert's mean output norm, which loses less. With
compensation a skipped expert is replaced by its mean output over the tokens that skip it, which no
published skipper does: the strongest form we could think of.
"""

import torch
from prism_refactor.compensate import PRIOR_TOKENS
from prism_refactor.layer_experts import routed as by_expert
from prism_refactor.layer_experts import spread
from prism_refactor.whole_experts import Routing, TopK
from torch import Tensor

from bench.baselines.original import PackedLayers, Routed, Tally

FIT_TOKENS = 1_536  # per expert, for norms and means
_SMALLEST_GATE = 1e-20


class LowerTopK:
    """Each token computes its k heaviest experts; gate weights as the model would give them."""

    def __init__(self, packed: PackedLayers, k: int, top_k: int, normalised: bool) -> None:
        self.name = "lower top-k"
        self.asked = k / top_k
        self.k = k
        self.tally = Tally()
        self._rule = TopK(k, normalised)
        self._packed = packed

    def fit(self, routed: Routed) -> None:
        """Nothing to fit."""

    def answer(self, routed: Routed) -> Tensor:
        nobody = torch.zeros(len(routed.x), dtype=torch.int64)
        routing = Routing(routed.index, routed.weights, None, nobody, routed.experts.experts)
        _, weights = self._rule(routing)
        kept = (weights > 0).unsqueeze(-1)
        self.tally.add(kept)
        return self._packed.forward(routed, weights, kept)

    def extra(self, hidden: int, width: int) -> float:
        return 0.0


class AdaptiveSkipping:
    """A token computes the experts whose score lies above one threshold of the layer."""

    def __init__(
        self, packed: PackedLayers, share: float, *, by_norm: bool, compensated: bool
    ) -> None:
        score = "gate x output norm" if by_norm else "gate"
        self.name = f"skip experts by {score}" + (", with means" if compensated else "")
        self.asked = share
        self.tally = Tally()
        self._packed = packed
        self._by_norm = by_norm
        self._compensated = compensated
        self._log_norm: dict[int, Tensor] = {}  # layer -> [E]
        self._log_theta: dict[int, float] = {}
        self._means: dict[int, Tensor] = {}  # layer -> [E, 1, H]

    def fit(self, routed: Routed) -> None:
        held = routed.experts
        log_norm = torch.zeros(held.experts)
        if self._by_norm:
            for expert, outputs, _ in _outputs(routed):
                log_norm[expert] = outputs.norm(dim=1).mean().clamp(min=1e-12).log()
        self._log_norm[routed.layer] = log_norm
        score = self._score(routed).flatten()
        dropped = len(score) - round(len(score) * self.asked)
        self._log_theta[routed.layer] = float(score.kthvalue(dropped).values) if dropped else -1e30
        if self._compensated:
            self._means[routed.layer] = _dropped_means(routed, self._kept(routed))

    def answer(self, routed: Routed) -> Tensor:
        kept = self._kept(routed).unsqueeze(-1)
        self.tally.add(kept)
        out = self._packed.forward(routed, routed.weights, kept)
        if self._compensated:
            self._packed.add_means(routed, out, kept, self._means[routed.layer])
        return out

    def extra(self, hidden: int, width: int) -> float:
        return (1 - self.tally.share) / (3 * width) if self._compensated else 0.0

    def _score(self, routed: Routed) -> Tensor:
        log_gate = routed.weights.clamp(min=_SMALLEST_GATE).log()
        return log_gate + self._log_norm[routed.layer][routed.index]

    def _kept(self, routed: Routed) -> Tensor:
        return self._score(routed) > self._log_theta[routed.layer]  # [T, K]


def _outputs(routed: Routed) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, outputs [t, H] of some of its tokens, their places [t] in the flattened index)."""
    found = []
    held, slots = routed.experts, routed.index.shape[1]
    for expert, tokens, places in by_expert(routed.index, held.experts):
        some = spread(torch.arange(len(tokens)), FIT_TOKENS)
        outputs = held.inner(expert, routed.x[tokens[some]]) @ held.down[expert].t()
        found.append((expert, outputs, tokens[some] * slots + places[some]))
    return found


def _dropped_means(routed: Routed, kept: Tensor) -> Tensor:
    """[E, 1, H]: mean output over the tokens that skip the expert, shrunk as ours are."""
    means = torch.zeros(routed.experts.experts, 1, routed.x.shape[1])
    for expert, outputs, places in _outputs(routed):
        skipping = (~kept).flatten()[places].float()
        means[expert, 0] = skipping @ outputs / (skipping.sum() + PRIOR_TOKENS)
    return means
