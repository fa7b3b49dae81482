"""What one would do without sub-experts: fewer experts for each token, or experts shared by a
decode batch.

Knows routing: experts, their weights, decode batches. Runs on an attached model, whose kernel skips
what is off. Sharing is XShare (arXiv 2602.07265; vLLM pull request 35551): each batch keeps the
experts with the largest summed gate within a budget. The decision worth arguing about: where the
router is a softmax we let tokens choose again among the kept experts and keep the gate mass they
had; on tiny-moe that loses a quarter to a third less than dropping alone, and a baseline should be
the strongest form of its idea.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from prism import selection
from prism.batch_context import GroupCounts, SelectionStats
from prism.expert_weights import add_down_bias
from prism.experts import LayerData, find_expert_modules
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

IMPLEMENTATION: Final = "prism_whole_experts"
_SAME_GATES: Final = 1e-2  # relative; routers round their weights to the model's dtype


@dataclass(frozen=True, slots=True)
class Routing:
    """One layer's routing: index int64 and weights fp32 [T, K]; a weight of 0 drops the expert."""

    index: Tensor
    weights: Tensor
    probabilities: Tensor | None  # [T, E] of a softmax router; None: another kind of router
    groups: Tensor  # int64 [T]: which decode batch a token belongs to, 0 to T - 1
    experts: int


Rule = Callable[[Routing], tuple[Tensor, Tensor]]  # to index and weights [T, K]


@dataclass(frozen=True, slots=True)
class TopK:
    """Each token keeps its k heaviest experts; ``renormalise``: as `norm_topk_prob` models do."""

    k: int
    renormalise: bool

    def __call__(self, routing: Routing) -> tuple[Tensor, Tensor]:
        rank = routing.weights.argsort(-1, descending=True).argsort(-1)
        kept = routing.weights * (rank < self.k)
        return routing.index, _with_mass_of(routing.weights, kept) if self.renormalise else kept


Form = Literal["dropped", "masked", "re-routed"]


@dataclass(frozen=True, slots=True)
class Shared:
    """Each batch keeps ``share`` of the experts it hits, those with the largest summed gate.

    dropped: a token's other experts are left out. masked: the router's logits of the others are,
    so tokens choose again and the softmax is over the kept. re-routed: they choose again, and their
    gate weights sum to what they did. Where the router is no softmax all forms drop.
    """

    share: float
    form: Form

    def __call__(self, routing: Routing) -> tuple[Tensor, Tensor]:
        kept = self._kept(routing)  # [T, E] of each token's batch
        if routing.probabilities is None or self.form == "dropped":
            return routing.index, routing.weights * kept.gather(1, routing.index)
        there = routing.probabilities * kept
        weights, index = there.topk(routing.index.shape[1], dim=-1)
        if self.form == "masked":
            return index, weights / there.sum(-1, keepdim=True).clamp(min=1e-9)
        return index, _with_mass_of(routing.weights, weights)

    def _kept(self, routing: Routing) -> Tensor:
        tokens, experts = len(routing.index), routing.experts
        pairs = (routing.groups.unsqueeze(1) * experts + routing.index).flatten()
        demand = torch.zeros(tokens * experts).index_add_(0, pairs, routing.weights.flatten())
        hit = torch.zeros(tokens * experts).index_fill_(0, pairs, 1.0).view(tokens, experts)
        budget = (self.share * hit.sum(1)).round().clamp(min=1)
        rank = demand.view(tokens, experts).argsort(-1, descending=True).argsort(-1)
        return (rank < budget.unsqueeze(1)).index_select(0, routing.groups)


def _with_mass_of(before: Tensor, weights: Tensor) -> Tensor:
    """``weights`` scaled so that each token's sum is that of ``before``."""
    return weights * (before.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1e-9))


@dataclass(slots=True)
class _Running:
    rule: Rule
    groups: Tensor
    stats: SelectionStats
    logits: dict[int, Tensor] = field(default_factory=dict)  # layer -> what its router said


_running: ContextVar[_Running] = ContextVar("prism_whole_experts")


@contextmanager
def deciding(model: Any, rule: Rule, groups: Tensor, stats: SelectionStats) -> Iterator[None]:
    """Forward passes of the attached ``model`` inside the block route as ``rule`` says.

    groups int64 [T]: the decode batch of each token. ``stats`` counts triples and bytes; nothing of
    ours is read, so there is no overhead.
    """
    running = _Running(rule, groups, stats)
    before = model.get_experts_implementation()
    hooks = [
        sibling.register_forward_hook(_listener(running.logits, layer, experts))
        for layer, (name, experts) in enumerate(find_expert_modules(model))
        for sibling in model.get_submodule(name.rpartition(".")[0]).children()
        if sibling is not experts
    ]
    model.set_experts_implementation(IMPLEMENTATION)
    token = _running.set(running)
    try:
        yield
    finally:
        _running.reset(token)
        model.set_experts_implementation(before)
        for hook in hooks:
            hook.remove()


def _listener(
    logits: dict[int, Tensor], layer: int, experts: Any
) -> Callable[[nn.Module, Any, Any], None]:
    """Keeps what may be router logits: the module's output, or the first of its outputs."""
    count = experts._prism.packed.experts

    def listen(_module: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.is_floating_point() and first.shape[-1] == count:
            logits[layer] = first.flatten(0, -2)

    return listen


def _forward(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts function; [T, H] as the module's own."""
    running, data = _running.get(), module._prism
    packed, gates = data.packed, weights.float()
    probabilities = _probabilities(running.logits.get(data.layer), index, gates, packed.experts)
    routing = Routing(index, gates, probabilities, running.groups, packed.experts)
    chosen, kept = running.rule(routing)
    _count(running.stats, data, routing, chosen, kept)
    state = _state(kept, packed.sub_experts)
    out: Tensor = data.kernel.forward(packed, x, chosen, kept, state)
    if data.down_bias is not None:
        add_down_bias(out, chosen, kept, data.down_bias)
    return out.to(x.dtype)


def _probabilities(
    logits: Tensor | None, index: Tensor, weights: Tensor, experts: int
) -> Tensor | None:
    """Softmax [T, E] of the logits, if the weights are in proportion to it."""
    if logits is None or logits.shape != (len(index), experts):
        return None
    found = logits.float().softmax(-1)
    there = found.gather(1, index)
    same = torch.allclose(_with_mass_of(weights, there), weights, rtol=_SAME_GATES)
    return found if same else None


def _state(weights: Tensor, sub_experts: int) -> Tensor:
    on = (weights > 0).to(torch.uint8)
    return on.unsqueeze(-1).repeat(1, 1, sub_experts)


def _count(
    stats: SelectionStats, data: LayerData, before: Routing, index: Tensor, weights: Tensor
) -> None:
    shape = data.packed.experts, data.packed.sub_experts
    state = _state(weights, shape[1])
    hit = selection.count_groups(None, before.index, before.groups, shape).hit
    read = selection.count_groups(state, index, before.groups, shape).read
    stats.add(data.layer, state.count_nonzero(), state.numel())
    stats.add_groups(data.layer, GroupCounts(hit, read, 0, 0), 0)


ExpertsInterface.register(IMPLEMENTATION, _forward)
