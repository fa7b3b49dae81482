"""How many bytes a decode batch reads: the union of what its tokens select, counted on calibration
masks.

Knows selection masks only. A batch of size B is simulated as B sequences at the same position.
Shares are of the slices of the experts that the batch hits at all, which is what an engine without
sub-experts would read.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
_POSITIONS = 16  # positions per sequence that are looked at


@dataclass(frozen=True, slots=True)
class BatchShares:
    """One entry per batch size; float64."""

    read: Tensor  # slices that at least one token of the batch selects
    dropped: Tensor  # slices that at least one token drops: their means are read
    computed: Tensor  # slices a token computes when it rides along


def batch_shares(
    selected: Tensor, index: Tensor, experts: int, sequence_length: int
) -> BatchShares:
    """Shares for ``BATCH_SIZES``; selected [T, K, N] bool, index [T, K], T = sequences x length.

    Sizes above the number of sequences repeat the last that fits.
    """
    slots, slices = selected.shape[1:]
    sequences = len(index) // sequence_length
    positions = torch.linspace(0, sequence_length - 1, min(_POSITIONS, sequence_length)).long()
    by_position = selected.view(sequences, sequence_length, slots, slices)[:, positions]
    routed = index.view(sequences, sequence_length, slots)[:, positions]
    shares: dict[str, list[float]] = {"read": [], "dropped": [], "computed": []}
    for size in BATCH_SIZES:
        size = min(size, sequences)
        used = sequences // size * size
        groups = used // size * len(positions)
        mask = by_position[:used].transpose(0, 1).reshape(groups, size * slots, slices)
        chosen = routed[:used].transpose(0, 1).reshape(groups, size * slots)
        target = chosen.unsqueeze(2).expand(-1, -1, slices)
        selected_by_any = _union(target, mask, experts)
        dropped_by_any = _union(target, ~mask, experts)
        hit = float(torch.zeros(groups, experts).scatter_(1, chosen, 1.0).sum()) * slices
        shares["read"].append(float(selected_by_any.sum()) / hit)
        shares["dropped"].append(float(dropped_by_any.sum()) / hit)
        shares["computed"].append(float(selected_by_any.gather(1, target).mean()))
    return BatchShares(**{key: torch.tensor(v, dtype=torch.float64) for key, v in shares.items()})


def _union(target: Tensor, mask: Tensor, experts: int) -> Tensor:
    """1.0 in [G, E, N] where any of the group's (token, slot) pairs sets ``mask`` [G, B K, N]."""
    groups, _, slices = mask.shape
    union = torch.zeros(groups, experts, slices)
    return union.scatter_reduce_(1, target, mask.float(), "amax")
