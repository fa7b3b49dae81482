"""What one forward pass is told beside its hidden states, and what it counts.

Knows levels, decode batches and counts; knows no model and no kernel. Model code hands nothing but
hidden states and routing to its experts, so all else lies in a context variable. Decision: bytes
are counted layer by layer and averaged over layers, each batch against the experts it hits itself:
that is what an engine without sub-experts would have read in the same step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prism.contract import MAX_LEVEL, MIN_LEVEL


def slice_overhead(width: int, table_ratio: float = 1.0) -> float:
    """Bytes of one slice's sub-router, or of its mean, over those of its weights.

    ``width``: neurons of a slice, each 3 H weights; the hidden size cancels out. ``table_ratio``:
    bytes of an element of sub-routers and means over those of a weight; the C++ kernel keeps both
    in the weights' dtype.
    """
    return table_ratio / (3 * width)


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """Slices that decode batches touch in one layer, each counted once per batch; int or [] int64.

    hit: of experts with a token of the batch; read: computed by a token of it; routers: whose
    sub-router is read (0 at level 100); means: whose mean stands in for some token.
    """

    hit: Tensor | int
    read: Tensor | int
    routers: Tensor | int
    means: Tensor | int
    table_ratio: float = 1.0  # bytes of an element of these over those of a weight


class SelectionStats:
    """Counts (token, slot, sub-expert) triples and, for batches in groups, slices read.

    Sums stay on the device until they are asked for; `per_layer` keeps one pair for each layer.
    """

    def __init__(self, *, per_layer: bool = False) -> None:
        self._per_layer = per_layer
        self._own: dict[int, Tensor | int] = {}
        self._candidates: dict[int, int] = {}
        self._ridden: Tensor | int = 0
        self._groups: dict[int, list[Tensor | int]] = {}
        self._table_ratio = 1.0

    def add(self, layer: int, own: Tensor | int, candidates: int) -> None:
        """Count `own` of `candidates` triples of one layer."""
        key = layer if self._per_layer else 0
        self._own[key] = self._own.get(key, 0) + own
        self._candidates[key] = self._candidates.get(key, 0) + candidates

    def add_groups(self, layer: int, counts: GroupCounts, ridden: Tensor | int) -> None:
        """Count what decode batches read in one layer, and the triples that rode along."""
        given = [counts.hit, counts.read, counts.routers, counts.means]
        before = self._groups.get(layer, [0, 0, 0, 0])
        self._groups[layer] = [old + new for old, new in zip(before, given, strict=True)]
        self._ridden = self._ridden + ridden
        self._table_ratio = counts.table_ratio

    @property
    def own(self) -> int:
        """Triples that tokens selected for themselves."""
        return sum(int(count) for count in self._own.values())

    @property
    def computed(self) -> int:
        """Triples computed: own ones and those that rode along."""
        return self.own + int(self._ridden)

    @property
    def candidates(self) -> int:
        """Triples there were."""
        return sum(self._candidates.values())

    @property
    def by_layer(self) -> dict[int, tuple[int, int]]:
        """layer index -> (own, candidates); a single entry 0 unless `per_layer` was asked for."""
        return {key: (int(own), self._candidates[key]) for key, own in self._own.items()}

    def bytes_share(self, width: int) -> float:
        """Bytes read over bytes of the experts hit, sub-routers and means included: mean over
        layers. ``width``: neurons of a slice.

        Raises ValueError when no batch came in groups. NB: a mean counts once per batch, whatever
        the number of knots its tokens use.
        """
        if not self._groups:
            raise ValueError("no decode batches were counted: the context had no groups")
        overhead = slice_overhead(width, self._table_ratio)
        shares = [
            (int(read) + overhead * (int(routers) + int(means))) / max(1, int(hit))
            for hit, read, routers, means in self._groups.values()
        ]
        return sum(shares) / len(shares)


@dataclass(frozen=True, slots=True)
class BatchContext:
    """What one forward pass needs beside its hidden states.

    levels: int32 [T], 10–100, in the order of the flattened tokens; an int: that level for every
    token, however many there are; None: level 100 everywhere.
    groups: int64 [T], 0 to T - 1: tokens of one number are one decode batch, in which a token also
    computes what its neighbours make the batch read; a token alone with its number (a prompt's)
    neither gives nor takes. None: nobody rides along. ride_along=False: groups are for counting.
    """

    levels: Tensor | int | None = None
    stats: SelectionStats | None = None
    groups: Tensor | None = None
    ride_along: bool = True
    full: bool = field(init=False)  # every token at 100; known once, not once per layer
    rows: Tensor | None = field(init=False)  # int64 [T]: levels given one by one, for the tables

    def __post_init__(self) -> None:
        levels = self.levels
        if isinstance(levels, Tensor):
            lowest, highest = int(levels.min().item()), int(levels.max())
        else:
            lowest = highest = MAX_LEVEL if levels is None else levels
        if lowest < MIN_LEVEL or highest > MAX_LEVEL:
            raise ValueError(f"a level of the batch is outside {MIN_LEVEL}-{MAX_LEVEL}")
        if self.groups is not None:
            _check_groups(self.groups, levels)
        rows = levels.long() if isinstance(levels, Tensor) else None
        object.__setattr__(self, "full", lowest == MAX_LEVEL)
        object.__setattr__(self, "rows", rows)

    def rows_of(self, x: Tensor) -> Tensor:
        """Levels of the tokens x [T, H] as row numbers; ValueError where their numbers differ."""
        if self.rows is None:
            level = self.levels if isinstance(self.levels, int) else MAX_LEVEL
            return torch.full((len(x),), level, dtype=torch.int64, device=x.device)
        if len(self.rows) != len(x):
            raise ValueError(f"{len(self.rows)} levels for a batch of {len(x)} tokens")
        return self.rows

    @classmethod
    def of(
        cls,
        levels: Sequence[int],
        device: torch.device | str = "cpu",
        stats: SelectionStats | None = None,
        groups: Sequence[int] | None = None,
        *,
        ride_along: bool = True,
    ) -> "BatchContext":
        """A context from plain integers."""
        numbers = None if groups is None else torch.tensor(groups, device=device)
        levels_there = torch.tensor(levels, dtype=torch.int32, device=device)
        return cls(levels_there, stats, numbers, ride_along)


def _check_groups(groups: Tensor, levels: Tensor | int | None) -> None:
    tokens = len(groups)
    if isinstance(levels, Tensor) and len(levels) != tokens:
        raise ValueError(f"{tokens} groups for {len(levels)} levels")
    if groups.dtype != torch.int64 or int(groups.min()) < 0 or int(groups.max()) >= tokens:
        raise ValueError(f"groups must be int64 from 0 to {tokens - 1}, one for each token")


_FULL = BatchContext()
_context: ContextVar[BatchContext] = ContextVar("prism_batch_context", default=_FULL)


def current() -> BatchContext:
    """The context of the running forward pass."""
    return _context.get()


@contextmanager
def batch_context(context: BatchContext) -> Iterator[None]:
    """Forward passes inside the block run with this context; outside, everything is level 100."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)
