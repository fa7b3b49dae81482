"""How many bytes a decode batch reads: the union of what its tokens select, counted on calibration
masks.

Knows selection masks only. A batch of size B is simulated as B sequences at the same position.
Shares are of the slices of the experts that the batch hits at all, which is what an engine without
sub-experts would read. The decision worth arguing about: who meets in a batch is drawn anew at each
position, because neighbours in a text route alike and read up to 1.3 points less than the strangers
that meet while serving (batch 32, level 25).
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
_POSITIONS = 64  # positions per sequence that are looked at
_SEED = 0


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
    positions = _midpoints(sequence_length)
    strangers = _drawn(sequences, len(positions)), positions
    by_position = selected.view(sequences, sequence_length, slots, slices)[strangers]
    routed = index.view(sequences, sequence_length, slots)[strangers]
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


def _midpoints(length: int) -> Tensor:
    """Positions [P] evenly over a sequence; the first token, a sink, counts no more than others."""
    count = min(_POSITIONS, length)
    return ((torch.arange(count) + 0.5) * length / count).long()


def _drawn(sequences: int, positions: int) -> Tensor:
    """[S, P] int64: each column all sequences, in an order of its own."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.rand(sequences, positions, generator=generator).argsort(0)


def _union(target: Tensor, mask: Tensor, experts: int) -> Tensor:
    """1.0 in [G, E, N] where any of the group's (token, slot) pairs sets ``mask`` [G, B K, N]."""
    groups, _, slices = mask.shape
    union = torch.zeros(groups, experts, slices)
    return union.scatter_reduce_(1, target, mask.float(), "amax")
