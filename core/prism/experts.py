"""Prism's experts function behind transformers' experts interface, and the batch's levels.

Knows what one MoE layer does at per-token levels; knows no scheduler and no device (the kernel
chooser does). Model code passes nothing but hidden states and routing to its experts, so what
else a batch needs lies in a context variable, and per-layer data on the experts module. Decision:
all level logic is table look-ups on the token's level (log θ, knot, scalars), so a batch may mix
any levels, nothing depends on values on the device, and level 100 is one more row of the tables.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prism import levels as level_rules
from prism.architectures import find_expert_modules
from prism.artifact import Artifact, ArtifactError, LayerTensors
from prism.contract import MAX_LEVEL, MIN_LEVEL
from prism.kernels import Kernel, Packed, choose

__all__ = [
    "BatchContext",
    "SelectionStats",
    "attach",
    "batch_context",
    "find_expert_modules",
    "register",
]

IMPLEMENTATION = "prism"


class SelectionStats:
    """Counts sub-experts that tokens selected for themselves, over all layers it is shown.

    Sums stay on the device until they are asked for; `per_layer` keeps one pair for each layer.
    """

    def __init__(self, *, per_layer: bool = False) -> None:
        self._per_layer = per_layer
        self._own: dict[int, Tensor | int] = {}
        self._candidates: dict[int, int] = {}

    def add(self, layer: int, own: Tensor | int, candidates: int) -> None:
        """Count `own` of `candidates` (token, slot, sub-expert) triples of one layer."""
        key = layer if self._per_layer else 0
        self._own[key] = self._own.get(key, 0) + own
        self._candidates[key] = self._candidates.get(key, 0) + candidates

    @property
    def own(self) -> int:
        return sum(int(count) for count in self._own.values())

    @property
    def candidates(self) -> int:
        return sum(self._candidates.values())

    @property
    def by_layer(self) -> dict[int, tuple[int, int]]:
        """layer index -> (own, candidates); a single entry 0 unless `per_layer` was asked for."""
        return {key: (int(own), self._candidates[key]) for key, own in self._own.items()}


@dataclass(frozen=True, slots=True)
class BatchContext:
    """What one forward pass needs beside its hidden states.

    levels: int32 [T], 10–100, in the order of the flattened tokens; None: level 100 everywhere.
    """

    levels: Tensor | None = None
    stats: SelectionStats | None = None
    full: bool = field(init=False)  # every token at 100; known once, not once per layer
    rows: Tensor | None = field(init=False)  # int64 [T]: the levels as row numbers of the tables

    def __post_init__(self) -> None:
        lowest = MAX_LEVEL if self.levels is None else int(self.levels.min().item())
        if lowest < MIN_LEVEL or (self.levels is not None and int(self.levels.max()) > MAX_LEVEL):
            raise ValueError(f"a level of the batch is outside {MIN_LEVEL}-{MAX_LEVEL}")
        object.__setattr__(self, "full", lowest == MAX_LEVEL)
        object.__setattr__(self, "rows", None if self.levels is None else self.levels.long())

    @classmethod
    def of(
        cls,
        levels: Sequence[int],
        device: torch.device | str = "cpu",
        stats: SelectionStats | None = None,
    ) -> "BatchContext":
        """A context from plain integers."""
        return cls(torch.tensor(levels, dtype=torch.int32, device=device), stats)


_FULL = BatchContext()
_context: ContextVar[BatchContext] = ContextVar("prism_batch_context", default=_FULL)


@contextmanager
def batch_context(context: BatchContext) -> Iterator[None]:
    """Forward passes inside the block run with this context; outside, everything is level 100."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


@dataclass(frozen=True, slots=True)
class LayerData:
    """One experts module as we run it. Tables have one row for each level 0–100."""

    layer: int
    kernel: Kernel
    packed: Packed
    router_weight: Tensor  # [E, N, H] fp32
    router_bias: Tensor  # [E, N] fp32
    means: Tensor  # [n_knots, E, N, H] fp32
    log_theta: Tensor  # [101] fp32; minus infinity at 100
    knot: Tensor  # [101] int64: whose means serve a level; at 100 nothing is dropped, so any
    scalars: Tensor  # [101, E + 1] fp32; ones at 100 and for the sentinel expert E


def attach(model: nn.Module, artifact: Artifact, *, kernel: str = "auto") -> None:
    """Make `model` (loaded from the artifact's directory) compute its experts through Prism.

    Packs the weights layer by layer; where the kernel owns a packed copy, the module's own
    parameters are freed, and switching the experts implementation back needs a reload. Raises
    ArtifactError when model and artifact do not fit each other.
    """
    manifest = artifact.manifest
    modules = find_expert_modules(model)
    found = tuple(name for name, _ in modules)
    if found != manifest.layers:
        raise ArtifactError(
            f"{artifact.path}: made from another model: {len(manifest.layers)} experts modules "
            f"({manifest.layers[0]} …), the model has {len(found)} ({found[:1]} …)"
        )
    register()
    for index, (name, module) in enumerate(modules):
        module._prism = _layer_data(artifact, index, name, module, kernel)
        if module._prism.packed.owns_copy:
            for part in ("gate_up_proj", "down_proj"):
                empty = torch.empty(0, dtype=getattr(module, part).dtype)
                setattr(module, part, nn.Parameter(empty, requires_grad=False))
    model.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]


def _layer_data(artifact: Artifact, index: int, name: str, module: Any, kernel: str) -> LayerData:
    manifest, tensors = artifact.manifest, artifact.layer(index)
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    experts, hidden, intermediate = down.shape
    expected = (manifest.num_experts, manifest.sub_experts, hidden)
    if (experts, *tensors.router_weight.shape[1:]) != expected:
        raise ArtifactError(
            f"{artifact.path}: {name}: {experts} experts of hidden size {hidden} in the model, "
            f"sub-routers of shape {tuple(tensors.router_weight.shape)} in the artifact"
        )
    n = manifest.sub_experts
    chosen = choose(gate_up.device, gate_up.dtype, hidden, intermediate // n, kernel)
    return _tables(artifact, index, tensors, chosen, chosen.pack(gate_up, down, n))


def _tables(
    artifact: Artifact, index: int, tensors: LayerTensors, kernel: Kernel, packed: Packed
) -> LayerData:
    knots, device = artifact.manifest.knots, packed.down.device
    theta = [
        level_rules.log_theta_at(knots, max(i, MIN_LEVEL))[index] for i in range(MAX_LEVEL + 1)
    ]
    knot = torch.tensor([level_rules.nearest_knot(knots, i) for i in range(MAX_LEVEL + 1)])
    scalars = torch.ones(MAX_LEVEL + 1, tensors.scalars.shape[1] + 1)
    scalars[:MAX_LEVEL, :-1] = tensors.scalars[knot[:MAX_LEVEL]]
    return LayerData(
        layer=index,
        kernel=kernel,
        packed=packed,
        router_weight=tensors.router_weight.to(device),
        router_bias=tensors.router_bias.to(device),
        means=tensors.means.to(device),
        log_theta=torch.tensor(theta, dtype=torch.float32, device=device),
        knot=knot.to(device),
        scalars=scalars.to(device),
    )


def forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts function: hidden_states [T, H], index and weights [T, K] -> [T, H].

    Token t gets Σ_k g · (scalar_e · Σ_kept Y_en + Σ_dropped mean_en); at 100 the plain expert.
    """
    data: LayerData = module._prism
    context = _context.get()
    weights = top_k_weights.float()
    if context.full:
        _count(context, data, weights.numel() * data.packed.sub_experts, weights)
        out = data.kernel.forward(data.packed, hidden_states, top_k_index, weights, None)
        return out.to(hidden_states.dtype)
    return _reduced(data, context, hidden_states, top_k_index, weights).to(hidden_states.dtype)


def _reduced(
    data: LayerData, context: BatchContext, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """fp32 [T, H] of a batch in which at least one token is below level 100."""
    rows = context.rows
    assert rows is not None  # a context without levels is full
    if rows.shape[0] != x.shape[0]:
        raise ValueError(f"{rows.shape[0]} levels for a batch of {x.shape[0]} tokens")
    # index_select and gather, not indexing: at decode sizes the cost is that of calling torch.
    theta, knot = data.log_theta.index_select(0, rows), data.knot.index_select(0, rows)
    state = data.kernel.select(x, index, weights, data.router_weight, data.router_bias, theta)
    _count(context, data, state, weights)
    scaled = weights * data.scalars.index_select(0, rows).gather(1, index)
    out = data.kernel.forward(data.packed, x, index, scaled, state)
    data.kernel.compensate(out, index, weights, state, data.means, knot)
    return out


def _count(context: BatchContext, data: LayerData, own: Tensor | int, weights: Tensor) -> None:
    if context.stats is not None:
        count = own if isinstance(own, int) else own.count_nonzero()
        context.stats.add(data.layer, count, weights.numel() * data.packed.sub_experts)


def register() -> None:
    """Make experts_implementation="prism" known to transformers; safe to call again."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, forward)
