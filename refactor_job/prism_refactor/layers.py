"""What the stages keep of each MoE layer in the partial folder: one file per layer and result.

Knows names of files. The decision worth arguing about: a layer's result is a file of its own, so a
killed run loses the layer it was at and no other, and shards that work side by side never write the
same file.
"""

from prism_refactor.cut import Cut
from prism_refactor.reduce import LayerKnot
from prism_refactor.store import PartialFolder


class LayerFiles:
    """Cuts and knots by the number of their MoE layer."""

    def __init__(self, folder: PartialFolder) -> None:
        self._folder = folder

    def cut(self, number: int) -> Cut | None:
        """The cut kept for a layer."""
        kept = self._folder.load(_cut_name(number))
        return Cut(**kept) if kept else None

    def save_cut(self, number: int, cut: Cut) -> None:
        """Keep a layer's cut."""
        self._folder.save(_cut_name(number), cut.tensors())

    def cut_of(self, number: int) -> Cut:
        """The cut of a layer that is known to have one."""
        cut = self.cut(number)
        assert cut is not None, f"layer {number} has no partition"
        return cut

    def missing_cuts(self, numbers: range) -> list[int]:
        """Those of the layers that have no cut yet."""
        return [number for number in numbers if not self._folder.has(_cut_name(number))]

    def knot(self, level: int, number: int) -> LayerKnot | None:
        """The knot kept for a level and layer."""
        kept = self._folder.load(_knot_name(level, number))
        return LayerKnot(**kept) if kept else None

    def save_knot(self, level: int, number: int, knot: LayerKnot) -> None:
        """Keep a layer's knot."""
        self._folder.save(_knot_name(level, number), knot.tensors())

    def knot_of(self, level: int, number: int) -> LayerKnot:
        """The knot of a level and layer that are known to have one."""
        knot = self.knot(level, number)
        assert knot is not None, f"layer {number} has no knot at {level}"
        return knot

    def has_knots(self, levels: tuple[int, ...], number: int) -> bool:
        """Whether a layer has a knot at every level."""
        return all(self._folder.has(_knot_name(level, number)) for level in levels)


def _cut_name(number: int) -> str:
    return f"cut-{number:03d}"


def _knot_name(level: int, number: int) -> str:
    return f"knot-{level:03d}-{number:03d}"
