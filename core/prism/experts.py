"""Prism's experts function behind transformers' experts interface.

Knows what one MoE layer does at per-token levels; knows no scheduler and no device (the kernel
chooser does). What a batch needs lies in its context, per-layer data on the experts module.
Decision: all level logic is table look-ups on the token's level (log θ, knot, scalars), so a batch
may mix any levels, nothing depends on values on the device, and level 100 is one more row of the
tables.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prism import levels as level_rules
from prism import selection
from prism.architectures import find_expert_modules
from prism.artifact import Artifact, ArtifactError, LayerTensors
from prism.batch_context import BatchContext, SelectionStats, batch_context, current
from prism.contract import MAX_LEVEL, MIN_LEVEL
from prism.expert_weights import add_down_bias, expert_weights
from prism.kernels import Kernel, Packed, pack

__all__ = [
    "BatchContext",
    "SelectionStats",
    "attach",
    "attach_layer",
    "batch_context",
    "find_expert_modules",
    "register",
]

IMPLEMENTATION = "prism"


@dataclass(frozen=True, slots=True)
class LayerData:
    """One experts module as we run it. Tables have one row for each level 0–100."""

    layer: int
    kernel: Kernel
    packed: Packed
    router_weight: Tensor  # [E, N, H] in the kernel's dtype for tables
    router_bias: Tensor  # [E, N] fp32
    means: Tensor  # [n_knots, E, N, H], the same
    log_theta: Tensor  # [101] fp32; minus infinity at 100
    knot: Tensor  # [101] int64: whose means serve a level; at 100 nothing is dropped, so any
    scalars: Tensor  # [101, E + 1, N + 1] fp32, by the slices kept; ones at 100 and for expert E
    down_bias: Tensor | None = None  # [E, H]


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
    for index, (_, module) in enumerate(modules):
        attach_layer(module, artifact, index, kernel=kernel)
    model.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]


def attach_layer(module: Any, artifact: Artifact, index: int, *, kernel: str = "auto") -> None:
    """Give the ``index``-th experts module of a model what `forward` needs; see `attach`."""
    name = artifact.manifest.layers[index]
    module._prism = _layer_data(artifact, index, name, module, kernel)
    if module._prism.packed.owns_copy:
        for part in ("gate_up_proj", "down_proj"):  # only gated experts are ever copied
            empty = torch.empty(0, dtype=getattr(module, part).dtype)
            setattr(module, part, nn.Parameter(empty, requires_grad=False))


def _layer_data(artifact: Artifact, index: int, name: str, module: Any, kernel: str) -> LayerData:
    manifest, tensors = artifact.manifest, artifact.layer(index)
    weights = expert_weights(module)
    expected = (manifest.num_experts, manifest.sub_experts, weights.hidden)
    if (weights.experts, *tensors.router_weight.shape[1:]) != expected:
        raise ArtifactError(
            f"{artifact.path}: {name}: {weights.experts} experts of hidden size {weights.hidden} "
            "in the model, "
            f"sub-routers of shape {tuple(tensors.router_weight.shape)} in the artifact"
        )
    chosen, packed = pack(weights, manifest.sub_experts, kernel)
    return _tables(artifact, index, tensors, chosen, packed, weights.down_bias)


def _tables(
    artifact: Artifact,
    index: int,
    tensors: LayerTensors,
    kernel: Kernel,
    packed: Packed,
    down_bias: Tensor | None,
) -> LayerData:
    knots, device = artifact.manifest.knots, packed.down.device
    tables = kernel.table_dtype(packed.down.dtype)
    theta = [
        level_rules.log_theta_at(knots, max(i, MIN_LEVEL))[index] for i in range(MAX_LEVEL + 1)
    ]
    knot = torch.tensor([level_rules.nearest_knot(knots, i) for i in range(MAX_LEVEL + 1)])
    _, experts, counts = tensors.scalars.shape
    scalars = torch.ones(MAX_LEVEL + 1, experts + 1, counts)
    scalars[:MAX_LEVEL, :-1] = tensors.scalars[knot[:MAX_LEVEL]]
    return LayerData(
        layer=index,
        kernel=kernel,
        packed=packed,
        router_weight=tensors.router_weight.to(device, tables),
        router_bias=tensors.router_bias.to(device),
        means=tensors.means.to(device, tables),
        log_theta=torch.tensor(theta, dtype=torch.float32, device=device),
        knot=knot.to(device),
        scalars=scalars.to(device),
        down_bias=down_bias,
    )


def forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts function: hidden_states [T, H], index and weights [T, K] -> [T, H].

    Token t gets Σ_k g · (scalar_e · Σ_kept Y_en + Σ_dropped mean_en + bias_e); at 100 the plain
    expert.
    """
    data: LayerData = module._prism
    context = current()
    weights = top_k_weights.float()
    if context.full:
        _count(context, data, top_k_index, None)
        out = data.kernel.forward(data.packed, hidden_states, top_k_index, weights, None)
    else:
        out = _reduced(data, context, hidden_states, top_k_index, weights)
    if data.down_bias is not None:
        add_down_bias(out, top_k_index, weights, data.down_bias)
    return out.to(hidden_states.dtype)


def _reduced(
    data: LayerData, context: BatchContext, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """fp32 [T, H] of a batch in which at least one token is below level 100."""
    rows = context.rows_of(x)
    # index_select and gather, not indexing: at decode sizes the cost is that of calling torch.
    theta, knot = data.log_theta.index_select(0, rows), data.knot.index_select(0, rows)
    state = data.kernel.select(x, index, weights, data.router_weight, data.router_bias, theta)
    scalars = _scalars(data, rows, index, state)
    if context.groups is not None and context.ride_along:
        state = selection.ride_along(state, index, context.groups, data.packed.experts)
        scalars = selection.faded(scalars, state)
    _count(context, data, index, state)
    out = data.kernel.forward(data.packed, x, index, weights * scalars, state)
    data.kernel.compensate(out, index, weights, state, data.means, knot)
    return out


def _scalars(data: LayerData, rows: Tensor, index: Tensor, own: Tensor) -> Tensor:
    """The scalar [T, K] of each (token, slot), by level, expert and number of slices selected."""
    _, experts, counts = data.scalars.shape
    place = (
        rows.unsqueeze(1).mul(experts).add(index).mul(counts).add(own.sum(-1, dtype=torch.int64))
    )
    return data.scalars.view(-1).take(place)


def _count(context: BatchContext, data: LayerData, index: Tensor, state: Tensor | None) -> None:
    """Add one layer to the batch's statistics; state None: level 100."""
    stats, groups = context.stats, context.groups
    if stats is None:
        return
    shape = data.packed.experts, data.packed.sub_experts
    candidates = index.numel() * shape[1]
    computed = candidates if state is None else state.count_nonzero()
    ridden: Tensor | int = 0
    if groups is not None:
        if state is not None and context.ride_along:
            ridden = (state == selection.RIDE).sum()
        counts = selection.count_groups(state, index, groups, shape)
        ratio = data.means.element_size() / data.packed.down.element_size()
        stats.add_groups(data.layer, replace(counts, table_ratio=ratio), ridden)
    stats.add(data.layer, computed - ridden, candidates)


def register() -> None:
    """Make experts_implementation="prism" known to transformers; safe to call again."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, forward)
