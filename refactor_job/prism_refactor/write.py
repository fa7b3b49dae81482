"""Write the permuted checkpoint: every byte as in the source, but for the order of expert neurons.

Knows safetensors files as ranges of bytes; needs no model class and no dtype arithmetic, so every
dtype is kept bit for bit and headers stay what they were. The decision worth arguing about: ranges
are permuted while the file streams through, so the largest thing in memory is one tensor of one
expert.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prism.architectures import find_expert_modules
from prism.blocks import block_digest
from prism.checkpoint import CheckpointError, TensorEntry
from prism.conversion import UnknownRule
from prism.places import Block, Span, expert_blocks
from torch import Tensor

from prism_refactor.errors import Reason, RefactorError
from prism_refactor.source import Checkpoint
from prism_refactor.store import sync_directory

_CHUNK_BYTES = 16 << 20


def blocks(checkpoint: Checkpoint, model: Any) -> dict[str, Block]:
    """``"{layer}.{expert}"`` -> where that expert lies; ``model`` may lie on the meta device.

    Raises RefactorError when the files do not hold the model's experts, or in a form that cannot be
    permuted in place.
    """
    try:
        return expert_blocks(model, find_expert_modules(model), checkpoint.entries)
    except UnknownRule as error:
        raise RefactorError(Reason.UNSUPPORTED_ARCHITECTURE, f"{error}.") from error
    except CheckpointError as error:
        raise RefactorError(Reason.CORRUPT_CHECKPOINT, f"{checkpoint.path}: {error}.") from error


def write_shard(shard: Path, places: dict[str, Block], orders: dict[str, Tensor], to: Path) -> None:
    """Copy one weight file to the directory ``to`` with its experts' neurons reordered.

    The file appears under its name only when it is whole.
    """
    edits = sorted(_edits(shard, places, orders), key=lambda edit: edit[0].entry.start)
    temporary = to / f"{shard.name}.tmp"
    with shard.open("rb") as source, temporary.open("wb") as target:
        for span, order in edits:
            _copy(source, target, span.entry.start - source.tell())
            data = source.read(span.entry.end - span.entry.start)
            target.write(span.permuted(data, order))
        shutil.copyfileobj(source, target, _CHUNK_BYTES)
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(to / shard.name)


def _edits(
    shard: Path, places: dict[str, Block], orders: dict[str, Tensor]
) -> Iterator[tuple[Span, Tensor]]:
    for key, block in places.items():
        for span in block.spans:
            if span.entry.file == shard:
                yield span, orders[key]


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        data = source.read(min(count, _CHUNK_BYTES))
        if not data:
            raise RefactorError(
                Reason.CORRUPT_CHECKPOINT, "A weight file shrank while it was read."
            )
        target.write(data)
        count -= len(data)


def copy_others(checkpoint: Checkpoint, to: Path) -> None:
    """Copy tokenizer, configuration, chat template, model card and licence."""
    shards = {shard.name for shard in checkpoint.shards}
    for name in checkpoint.files:
        if name not in shards:
            shutil.copyfile(checkpoint.path / name, to / name)
    sync_directory(to)


def digests(checkpoint: Checkpoint, places: dict[str, Block], written: Path) -> dict[str, str]:
    """sha256 of every expert block as it lies in the written files."""
    found = {}
    for key, block in places.items():
        found[key] = block_digest(*(_moved(entry, written).read() for entry in block.tensors))
    return found


def _moved(entry: TensorEntry, to: Path) -> TensorEntry:
    """The same range in the written copy: headers are equal, so offsets are."""
    return TensorEntry(to / entry.file.name, entry.dtype, entry.shape, entry.start, entry.end)
