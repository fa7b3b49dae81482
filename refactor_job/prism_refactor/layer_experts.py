"""The experts of one layer as the fitting code needs them: activations and outputs in fp32.

Knows transformers' experts modules (gate_up_proj [E, 2I, H], down_proj [E, H, I], ``_apply_gate``).
Must not know about levels. The decision worth arguing about: one expert at a time is lifted to
fp32, so a bf16 model needs no fp32 copy of itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert in fp32: ``activate`` x [t, H] -> [t, I], ``project`` [t, I] -> [t, H]."""

    module: nn.Module
    gate_up: Tensor  # [2I, H]
    down: Tensor  # [H, I]

    def activate(self, x: Tensor) -> Tensor:
        """Gated activations [t, I] of inputs [t, H]."""
        acted: Tensor = self.module._apply_gate(x.float() @ self.gate_up.t())  # type: ignore[operator]
        return acted

    def project(self, activations: Tensor) -> Tensor:
        """Outputs [t, H] of activations [t, I]."""
        return activations @ self.down.t()


def expert_of(module: nn.Module, index: int) -> Expert:
    """Expert ``index`` of an experts module, lifted to fp32."""
    return Expert(
        module,
        weight(module, "gate_up_proj")[index].float(),
        weight(module, "down_proj")[index].float(),
    )


def weight(module: nn.Module, name: str) -> Tensor:
    """The stacked parameter ``name`` of an experts module."""
    parameter = getattr(module, name)
    assert isinstance(parameter, Tensor)
    return parameter.detach()


def expert_count(module: nn.Module) -> int:
    """Number of routed experts in this layer."""
    return weight(module, "down_proj").shape[0]


def permute_neurons(module: nn.Module, permutations: Tensor) -> None:
    """Reorder the neurons of every expert in place; ``permutations`` [E, I] int64.

    Row i of the new gate and up is row ``permutations[e, i]`` of the old; columns of down follow.
    """
    gate_up, down = weight(module, "gate_up_proj"), weight(module, "down_proj")
    width = down.shape[2]
    for expert, order in enumerate(permutations):
        gate_up[expert] = gate_up[expert][torch.cat([order, order + width])]
        down[expert] = down[expert][:, order]


def routed(index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, tokens, slots) for each expert with at least one token; ``index`` [T, K]."""
    slots = index.shape[1]
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    start = 0
    for expert, count in enumerate(counts[:experts]):
        chosen = order[start : start + count]
        start += count
        if count:
            yield expert, chosen // slots, chosen % slots


def spread(tokens: Tensor, limit: int) -> Tensor:
    """At most ``limit`` of ``tokens`` [t], evenly spaced, order kept."""
    if len(tokens) <= limit:
        return tokens
    return tokens[torch.linspace(0, len(tokens) - 1, limit).long()]
