"""Write the permuted checkpoint: every byte as in the source, but for the order of expert neurons.

Knows safetensors files as ranges of bytes; needs no model class and no dtype arithmetic, so every
dtype is kept bit for bit and headers stay what they were. The decision worth arguing about: ranges
are permuted while the file streams through, so the largest thing in memory is one projection of one
expert.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from prism.checkpoint import BlockEntries, CheckpointError, TensorEntry, block_digest, block_entries
from torch import Tensor

from prism_refactor.errors import Reason, RefactorError
from prism_refactor.source import Checkpoint
from prism_refactor.store import sync_directory

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Edit:
    """One projection: its place, and the order its rows (gate, up) or columns (down) get."""

    entry: TensorEntry
    order: Tensor  # [I] int64
    columns: bool


def blocks(checkpoint: Checkpoint, experts: int) -> dict[str, BlockEntries]:
    """``"{layer}.{expert}"`` -> where that expert lies.

    Raises RefactorError when the files do not hold an expert in a layout we know.
    """
    try:
        return {
            f"{layer}.{expert}": block_entries(checkpoint.entries, layer, expert)
            for layer in checkpoint.layers
            for expert in range(experts)
        }
    except CheckpointError as error:
        raise RefactorError(Reason.CORRUPT_CHECKPOINT, f"{checkpoint.path}: {error}.") from error


def write_shard(
    shard: Path, places: dict[str, BlockEntries], orders: dict[str, Tensor], to: Path
) -> None:
    """Copy one weight file to the directory ``to`` with its experts' neurons reordered.

    The file appears under its name only when it is whole.
    """
    edits = sorted(_edits(shard, places, orders), key=lambda edit: edit.entry.start)
    temporary = to / f"{shard.name}.tmp"
    with shard.open("rb") as source, temporary.open("wb") as target:
        for edit in edits:
            _copy(source, target, edit.entry.start - source.tell())
            data = source.read(edit.entry.end - edit.entry.start)
            target.write(_reordered(data, edit))
        shutil.copyfileobj(source, target, _CHUNK_BYTES)
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(to / shard.name)


def _edits(
    shard: Path, places: dict[str, BlockEntries], orders: dict[str, Tensor]
) -> Iterator[_Edit]:
    for key, block in places.items():
        for entry, columns in ((block.gate, False), (block.up, False), (block.down, True)):
            if entry.file == shard:
                yield _Edit(entry, orders[key], columns)


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        data = source.read(min(count, _CHUNK_BYTES))
        if not data:
            raise RefactorError(
                Reason.CORRUPT_CHECKPOINT, "A weight file shrank while it was read."
            )
        target.write(data)
        count -= len(data)


def _reordered(data: bytes, edit: _Edit) -> bytes:
    rows, columns = edit.entry.shape
    item = len(data) // (rows * columns)
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, columns, item)
    moved = values[:, edit.order] if edit.columns else values[edit.order]
    return moved.numpy().tobytes()


def copy_others(checkpoint: Checkpoint, to: Path) -> None:
    """Copy tokenizer, configuration, chat template, model card and licence."""
    shards = {shard.name for shard in checkpoint.shards}
    for name in checkpoint.files:
        if name not in shards:
            shutil.copyfile(checkpoint.path / name, to / name)
    sync_directory(to)


def digests(
    checkpoint: Checkpoint, places: dict[str, BlockEntries], written: Path
) -> dict[str, str]:
    """sha256 of every expert block as it lies in the written files."""
    found = {}
    for key, block in places.items():
        found[key] = block_digest(*(_moved(entry, written).read() for entry in block))
    return found


def _moved(entry: TensorEntry, to: Path) -> TensorEntry:
    """The same range in the written copy: headers are equal, so offsets are."""
    return TensorEntry(to / entry.file.name, entry.dtype, entry.shape, entry.start, entry.end)
