"""Bounds: selections that know what no router can know before the expert has run.

Oracle slices: our partition, threshold on gate times the slice's true output norm; with stand-ins,
on the true distance from the stand-in, and our means and scalars. What lies between this and ours
is the sub-router's. Oracle neurons: single neurons by gate times |activation| times the norm of
their output weights, without any structure a kernel could use ("Deja Vu", Liu et al., ICML 2023,
calls it contextual sparsity). What lies between the two oracles is the partition's.
"""

import torch
from prism_refactor.compensate import Compensation, compensate
from prism_refactor.layer_experts import Expert, expert_of, spread
from prism_refactor.layer_experts import routed as by_expert
from prism_refactor.options import COMPENSATION_TOKENS
from prism_refactor.partition import slice_norms
from torch import Tensor

from bench.baselines.original import Original, Routed, Tally

_TINY = 1e-20
_SAMPLED = 4_000_000  # scores that a threshold is taken from


class OracleSlices:
    """Slices of an artifact's own order: `original` is the artifact, loaded as a stock model."""

    def __init__(
        self, original: Original, sub_experts: int, share: float, *, compensated: bool
    ) -> None:
        self.name = "oracle slices" + (", with stand-ins" if compensated else "")
        self.asked = share
        self.tally = Tally()
        self._original = original
        self._n = sub_experts
        self._compensated = compensated
        self._log_theta: dict[int, float] = {}
        self._quiet: dict[tuple[int, int], Tensor] = {}  # (layer, expert) -> [I]
        self._fitted: dict[tuple[int, int], Compensation] = {}

    def fit(self, routed: Routed) -> None:
        scores = torch.empty(*routed.index.shape, self._n)
        for expert, held, tokens, slots in self._experts(routed):
            active, gates = held.activate(routed.x[tokens]), routed.weights[tokens, slots]
            if self._compensated:
                self._quiet[routed.layer, expert] = _quiet_mean(held, active, self._n)
            scores[tokens, slots] = self._score(routed.layer, expert, held, active, gates)
        self._log_theta[routed.layer] = threshold(scores, self.asked)
        if not self._compensated:
            return
        for expert, held, tokens, slots in self._experts(routed):
            some = spread(torch.arange(len(tokens)), COMPENSATION_TOKENS)
            kept = scores[tokens[some], slots[some]] > self._log_theta[routed.layer]
            gates = routed.weights[tokens[some], slots[some]]
            active = held.activate(routed.x[tokens[some]])
            self._fitted[routed.layer, expert] = compensate(held, active, kept, gates)

    def answer(self, routed: Routed) -> Tensor:
        out = torch.zeros_like(routed.x)
        for expert, held, tokens, slots in self._experts(routed):
            gates = routed.weights[tokens, slots]
            active = held.activate(routed.x[tokens])
            score = self._score(routed.layer, expert, held, active, gates)
            kept = score > self._log_theta[routed.layer]
            self.tally.add(kept)
            sliced = active.view(len(active), self._n, -1) * kept.unsqueeze(2)
            y = held.project(sliced.flatten(1))
            fitted = self._fitted.get((routed.layer, expert))
            if fitted is not None:
                y = fitted.scalars[kept.sum(1)].unsqueeze(1) * y + (~kept).float() @ fitted.means
            out.index_add_(0, tokens, y * gates.unsqueeze(1))
        return out

    def extra(self, hidden: int, width: int) -> float:
        return 0.0  # a bound: what its selection would cost is left out

    def _experts(self, routed: Routed) -> list[tuple[int, Expert, Tensor, Tensor]]:
        module = self._original.modules[routed.layer]
        return [
            (expert, expert_of(module, expert), tokens, slots)
            for expert, tokens, slots in by_expert(routed.index, routed.experts.experts)
        ]

    def _score(
        self, layer: int, expert: int, held: Expert, active: Tensor, gates: Tensor
    ) -> Tensor:
        missed = active - self._quiet.get((layer, expert), torch.zeros(()))
        return (slice_norms(held, missed, self._n) * gates.unsqueeze(1)).clamp(min=_TINY).log()


def _quiet_mean(held: Expert, active: Tensor, sub_experts: int) -> Tensor:
    """[I]: mean activation over the half of the tokens in which each slice is quieter."""
    norms = slice_norms(held, active, sub_experts)  # [t, N]
    quiet = (norms <= norms.median(0).values).float()
    sliced = active.view(len(active), sub_experts, -1)
    return torch.einsum("tn,tns->ns", quiet / quiet.sum(0), sliced).flatten()


class OracleNeurons:
    """Single neurons, whatever slice they lie in."""

    name = "oracle neurons"

    def __init__(self, share: float) -> None:
        self.asked = share
        self.tally = Tally()
        self._log_theta: dict[int, float] = {}

    def fit(self, routed: Routed) -> None:
        scores = [score.flatten() for *_, score in self._scored(routed)]
        self._log_theta[routed.layer] = threshold(torch.cat(scores), self.asked)

    def answer(self, routed: Routed) -> Tensor:
        out = torch.zeros_like(routed.x)
        for tokens, gates, active, down, score in self._scored(routed):
            kept = score > self._log_theta[routed.layer]
            self.tally.add(kept)
            out.index_add_(0, tokens, (active * kept) @ down.t() * gates)
        return out

    def extra(self, hidden: int, width: int) -> float:
        return 0.0  # a bound

    def _scored(self, routed: Routed) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """(tokens [t], gates [t, 1], activations [t, I], down [H, I], log scores [t, I])."""
        held, found = routed.experts, []
        for expert, tokens, slots in by_expert(routed.index, held.experts):
            gates = routed.weights[tokens, slots].unsqueeze(1)
            active, down = held.inner(expert, routed.x[tokens]), held.down[expert]
            score = (gates * active.abs() * down.norm(dim=0)).clamp(min=_TINY).log()
            found.append((tokens, gates, active, down, score))
        return found


def threshold(scores: Tensor, share: float) -> float:
    """What `share` of the scores lie above; of very many, of a sample evenly spread."""
    flat = scores.flatten()
    flat = flat[:: -(-len(flat) // _SAMPLED)]
    dropped = len(flat) - round(len(flat) * share)
    return float(flat.kthvalue(dropped).values) if dropped else -torch.inf
