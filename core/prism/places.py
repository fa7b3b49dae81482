"""Where in a checkpoint's files the neurons of each expert lie, and how they are reordered there.

Knows layouts of experts modules and byte ranges; knows no level. Decision: an expert's place is
described per neuron (a strided view whose axis 0 is the neuron), whatever the layout, and a span of
bytes is permuted as a whole, so fused, interleaved, transposed and biased experts cost whoever
streams files no extra case.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from prism.blocks import part_name
from prism.checkpoint import TensorEntry
from prism.conversion import Row, UnknownRule, View, expert_rows

_BY_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Span:
    """A contiguous range of one file that belongs to one expert, and the neurons in it.

    `views` [I, …] have offsets in items from the range's start.
    """

    entry: TensorEntry
    name: str  # the tensor's, as blocks.part_name has it where it holds all experts
    views: tuple[View, ...]

    def permuted(self, data: bytes, order: Tensor) -> bytes:
        """The range's bytes with new neuron i what was neuron order[i] (int64 [I])."""
        size = len(data) // prod(self.entry.shape)
        items = torch.frombuffer(bytearray(data), dtype=_BY_SIZE[size])
        for view in self.views:
            neurons = items.as_strided(view.shape, view.strides, view.offset)
            neurons.copy_(neurons.index_select(0, order))
        return items.numpy().tobytes()


@dataclass(frozen=True, slots=True)
class Block:
    """One expert of one layer in the files: gate, up and down, and the biases of its neurons."""

    spans: tuple[Span, ...]

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """The ranges alone, in the order in which the block's digest takes them."""
        return tuple(span.entry for span in self.spans)


def expert_blocks(
    model: Any, modules: list[tuple[str, Any]], entries: Mapping[str, TensorEntry]
) -> dict[str, Block]:
    """ "{layer}.{expert}" -> its block, for all experts modules of a model on any device.

    Raises CheckpointError when a tensor is missing, has another shape, or when the files hold
    experts in a form that cannot be permuted in place (conversion.UnknownRule).
    """
    parameters = {name: _parameters(module) for name, module in modules}
    rows = expert_rows(
        model, [f"{name}.{part}" for name, held in parameters.items() for part in held], entries
    )
    return {
        f"{name}.{expert}": _block(name, module, expert, rows, entries)
        for name, module in modules
        for expert in range(module.down_proj.shape[0])
    }


def block_templates(
    blocks: Mapping[str, Block], modules: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """module -> names of an expert's tensors, "{}" for its number: what the manifest records, so
    that blocks are found again without the model's class."""
    return {name: _templates(name, blocks) for name in modules}


def _templates(module: str, blocks: Mapping[str, Block]) -> tuple[str, ...]:
    """Pieces of the names of expert 0 and 1 that differ are the number; the others must agree."""
    names = [[span.name for span in blocks[f"{module}.{e}"].spans] for e in range(2)]
    found = tuple(_template(*pair) for pair in zip(*names, strict=True))
    expert = 0
    while (block := blocks.get(f"{module}.{expert}")) is not None:
        for template, span in zip(found, block.spans, strict=True):
            if template.format(expert) != span.name:
                raise UnknownRule(f"{span.name}: no name by the pattern {template}")
        expert += 1
    return found


def _template(zero: str, one: str) -> str:
    pieces = [re.split(r"(\d+)", name) for name in (zero, one)]
    return "".join("{}" if a != b else a for a, b in zip(*pieces, strict=True))


def _parameters(module: Any) -> list[str]:
    """Parameters with an axis of neurons; the bias of down has none."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return [first, *([f"{first}_bias"] if module.has_bias else []), "down_proj"]


def _block(
    name: str,
    module: Any,
    expert: int,
    rows: Mapping[str, list[Row]],
    entries: Mapping[str, TensorEntry],
) -> Block:
    spans: dict[tuple[str, int], list[View]] = {}
    for part in _parameters(module):
        for view in _neurons(module, part, rows[f"{name}.{part}"][expert]):
            spans.setdefault((view.name, view.expert), []).append(view)
    return Block(tuple(_span(entries[key[0]], *key, views) for key, views in spans.items()))


def _neurons(module: Any, part: str, row: Row) -> list[View]:
    """Views [I, …] of what a parameter holds of the neurons: gate and up, or one of both."""
    if part == "down_proj":
        axis = 1 if module.is_transposed else 2
        views = [row.cut(axis, 0, row.shape[axis])]
    else:
        axis = 2 if module.is_transposed and not part.endswith("bias") else 1
        width = row.shape[axis]
        if not module.has_gate:
            views = [row.cut(axis, 0, width)]
        elif module.is_concatenated:
            views = [row.cut(axis, start, width // 2) for start in (0, width // 2)]
        else:
            views = [row.cut(axis, start, width // 2, 2) for start in (0, 1)]
    return [_neuron_first(view, axis) for view in views]


def _neuron_first(view: View, axis: int) -> View:
    """[1, …, I, …] -> [I, …]."""
    front = view.swapped(1, axis)
    return replace(front, shape=front.shape[1:], strides=front.strides[1:])


def _span(entry: TensorEntry, name: str, expert: int, views: list[View]) -> Span:
    if expert < 0:
        return Span(entry, name, tuple(views))
    part = entry.part(expert)
    first = expert * prod(part.shape)
    moved = tuple(replace(view, offset=view.offset - first) for view in views)
    return Span(part, part_name(name, expert), moved)
