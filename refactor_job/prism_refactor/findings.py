"""What the passes note of each MoE layer for the report, on text that the calibration never saw.

Knows experts, partitions and selections; must not know the report. Everything is taken from what a
pass computes anyway, or from a few of its tokens. The decision worth arguing about: a layer's loss
is the error of its routed experts' output on the inputs that the reduced layers before it hand
over, so it says where a level hurts; what all layers do together is what operating points measure.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from prism.expert_weights import add_down_bias
from prism.experts import LayerData
from torch import Tensor

from prism_refactor.layer_experts import expert_of, routed, spread
from prism_refactor.partition import neuron_mass
from prism_refactor.store import PartialFolder

ERROR_LEVELS: Final = (75, 50, 25)
ERROR_TOKENS: Final = 512  # per level and layer: the experts compute these once more, in full
USAGE_LEVEL: Final = 50


@dataclass(frozen=True, slots=True)
class Routed:
    """What reaches the experts of a layer: x [T, H], index and weights [T, K]."""

    x: Tensor
    index: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class LayerFindings:
    """One MoE layer."""

    kept_mass: float  # of an expert's output mass, in the better half of its sub-experts
    unsorted_mass: float  # the same with neurons in the order of the source
    errors: dict[int, float]  # level -> relative squared error of the experts' output
    routed: Tensor  # [E] share of tokens routed to the expert
    selected: Tensor  # [E, N] share of those that select the sub-expert at USAGE_LEVEL


class Findings:
    """Notes per MoE layer, in the partial folder."""

    def __init__(self, folder: PartialFolder) -> None:
        self._folder = folder

    def note_mass(self, number: int, module: Any, order: Tensor, n: int, given: Routed) -> None:
        """Keep what half of ``n`` slices hold; ``order`` [E, I], weights are not yet reordered."""
        kept = _kept_mass(module, order.long(), n, given)
        self._folder.save(f"mass-{number:03d}", {"kept": torch.tensor(kept)})

    def note_level(
        self, level: int, number: int, data: LayerData, given: Routed, out: Tensor
    ) -> None:
        """Keep what ``level`` did to the layer's output ``out`` [T, H]."""
        if level in ERROR_LEVELS:
            error = torch.tensor(_relative_error(data, given, out))
            self._folder.save(_error(level, number), {"error": error})
        if level == USAGE_LEVEL:
            self._folder.save(f"usage-{number:03d}", _usage(data, level, given))

    def of(self, number: int) -> LayerFindings:
        """The notes of a layer that all passes have passed."""
        mass, usage = self._kept(f"mass-{number:03d}"), self._kept(f"usage-{number:03d}")
        errors = {n: float(self._kept(_error(n, number))["error"]) for n in ERROR_LEVELS}
        kept, unsorted = mass["kept"].tolist()
        return LayerFindings(kept, unsorted, errors, usage["routed"], usage["selected"])

    def _kept(self, name: str) -> dict[str, Tensor]:
        kept = self._folder.load(name)
        assert kept is not None, f"no pass has kept {name}"
        return kept


def _error(level: int, number: int) -> str:
    return f"error-{level:03d}-{number:03d}"


def _kept_mass(module: Any, order: Tensor, n: int, given: Routed) -> tuple[float, float]:
    """Mass in the n / 2 largest slices, mean over (token, expert): as cut, and as in the source.

    It is what the swap search maximises on calibration text (see partition).
    """
    sums, count = [0.0, 0.0], 0
    for expert, tokens, _ in routed(given.index, len(order)):
        mass = neuron_mass(expert_of(module, expert), given.x[tokens])  # [I, T]
        for i, ordered in enumerate((mass[order[expert]], mass)):
            slices = ordered.view(n, -1, mass.shape[1]).sum(1)  # [N, T]
            sums[i] += float(slices.topk(n // 2, dim=0).values.sum())
        count += mass.shape[1]
    return sums[0] / max(1, count), sums[1] / max(1, count)


def _relative_error(data: LayerData, given: Routed, out: Tensor) -> float:
    """Mean over some tokens of ||reduced - full||^2 / ||full||^2."""
    some = spread(torch.arange(len(given.x)), ERROR_TOKENS).to(given.x.device)
    x, index, weights = given.x[some], given.index[some], given.weights[some].float()
    full = data.kernel.forward(data.packed, x, index, weights, None).float()
    if data.down_bias is not None:
        add_down_bias(full, index, weights, data.down_bias)
    energy = full.square().sum(1)
    loud = energy > 0
    wrong = (out[some].float() - full).square().sum(1)
    return float((wrong[loud] / energy[loud]).mean()) if bool(loud.any()) else 0.0


def _usage(data: LayerData, level: int, given: Routed) -> dict[str, Tensor]:
    """Shares of tokens that use each expert, and of these each sub-expert at ``level``."""
    x, index, weights = given.x, given.index, given.weights.float()
    theta = data.log_theta[level].expand(len(x)).contiguous()
    state = data.kernel.select(x, index, weights, data.router_weight, data.router_bias, theta)
    experts, n, _ = data.router_weight.shape
    chosen = torch.zeros(experts, n, device=x.device)
    chosen.index_add_(0, index.flatten(), (state != 0).float().flatten(0, 1))
    hits = torch.bincount(index.flatten(), minlength=experts)
    selected = chosen / hits.clamp(min=1).unsqueeze(1)
    return {"routed": (hits / len(x)).float().cpu(), "selected": selected.cpu()}
