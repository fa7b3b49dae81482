"""Contiguous token ranges inside a pool of fixed size: who owns which part of the KV buffers.

Knows: free ranges, best fit, joining neighbours on release. Must not know: tensors, sequences.

One decision worth arguing about: a sequence reserves one contiguous range for prompt plus all the
tokens it may produce. It is what plain SDPA reads without a gather, and nothing is ever preempted;
the price is memory held for tokens that may not come.
"""

from bisect import insort
from dataclasses import dataclass, field


@dataclass(slots=True)
class RangePool:
    """`size` tokens; ranges are (start, length) pairs."""

    size: int
    _free: list[tuple[int, int]] = field(init=False)
    _owned: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"a KV pool needs at least one token, got {self.size}")
        self._free = [(0, self.size)]

    @property
    def used(self) -> int:
        """Tokens reserved now."""
        return sum(self._owned.values())

    def can_reserve(self, length: int) -> bool:
        """Whether one free range is long enough."""
        return any(free >= length for _, free in self._free)

    def reserve(self, length: int) -> int | None:
        """Start of a range of `length` tokens (best fit), or None when none is long enough."""
        if length <= 0:
            raise ValueError(f"a range needs a positive length, got {length}")
        fitting = [(free, start) for start, free in self._free if free >= length]
        if not fitting:
            return None
        free, start = min(fitting)
        self._free.remove((start, free))
        if free > length:
            insort(self._free, (start + length, free - length))
        self._owned[start] = length
        return start

    def release(self, start: int) -> None:
        """Give a range back. Raises KeyError for one that is not reserved."""
        insort(self._free, (start, self._owned.pop(start)))
        joined: list[tuple[int, int]] = []
        for begin, length in self._free:
            if joined and joined[-1][0] + joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((begin, length))
        self._free = joined
