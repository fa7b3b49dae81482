"""A Hugging Face checkpoint directory as files: headers, tensor names, block digests.

Reads headers and bytes only and needs the standard library alone: names, shapes and digests of a
70 GB checkpoint are known in milliseconds, without torch. Decision: a block (one expert of one
layer) is digested over its bytes as they lie in the file, found by the names that the manifest
records, so `verify` needs neither the model class nor the dtype, and a corrupt expert is named as
such.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1}
_ITEM_BYTES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}

# Names of an expert's tensors in artifacts whose manifest does not say them, by what the path of
# the experts module is called in the files.
_NAMINGS = (
    (("", ""), ("gate_proj", "up_proj", "down_proj")),
    ((".mlp.experts", ".block_sparse_moe.experts"), ("w1", "w3", "w2")),
)
_PART = re.compile(r"(.*)\[(\d+)\]")


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated or not what its index says, with the file."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, end) of `file`, counted from the file's first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def part(self, index: int) -> "TensorEntry":
        """The place of one index of the first axis."""
        size = (self.end - self.start) // self.shape[0]
        start = self.start + index * size
        return TensorEntry(self.file, self.dtype, self.shape[1:], start, start + size)

    def read(self) -> bytes:
        """The tensor's bytes as stored."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            data = stream.read(self.end - self.start)
        if len(data) != self.end - self.start:
            raise CheckpointError(f"{self.file}: ends before byte {self.end}; copy it again")
        return data


class BlockNames(NamedTuple):
    """Tensor names of one expert."""

    gate: str
    up: str
    down: str


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file; raises CheckpointError when it is corrupt or truncated."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: {size} bytes cannot hold a header of {length}; truncated or no "
                    "safetensors file; copy it again"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: header is not JSON; not a safetensors file") from error
    entries = _entries(file, header, 8 + length)
    end = max((entry.end for entry in entries.values()), default=8 + length)
    if end != size:
        raise CheckpointError(
            f"{file}: {size} bytes where its header says {end}; truncated? copy it again"
        )
    return entries


def _entries(file: Path, header: Any, base: int) -> dict[str, TensorEntry]:
    entries = {}
    try:
        for name, info in header.items():
            if name == "__metadata__":
                continue
            start, end = info["data_offsets"]
            shape = tuple(int(n) for n in info["shape"])
            item = _ITEM_BYTES.get(info["dtype"])
            if end < start or (item is not None and prod(shape) * item != end - start):
                raise CheckpointError(f"{file}: {name}: {end - start} bytes for shape {shape}")
            entries[name] = TensorEntry(file, info["dtype"], shape, base + start, base + end)
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: header entry is malformed ({error})") from error
    return entries


def open_checkpoint(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of a single-file or sharded checkpoint; raises CheckpointError, all problems."""
    index = directory / INDEX_FILE
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a weight index ({error})") from error
    elif (directory / SINGLE_FILE).exists():
        files = [SINGLE_FILE]
    else:
        raise CheckpointError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    entries: dict[str, TensorEntry] = {}
    problems = []
    for name in files:
        try:
            entries |= read_header(directory / name)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    return entries


def block_names(names: Iterable[str], layer: str, expert: int) -> BlockNames:
    """Tensor names of expert `expert` of the experts module `layer`, whichever naming is used.

    Raises CheckpointError when the checkpoint stores experts in no per-expert layout we know.
    """
    known = names if isinstance(names, set | dict | frozenset) else set(names)
    for (old, new), parts in _NAMINGS:
        prefix = layer.replace(old, new) if old else layer
        block = BlockNames(*(f"{prefix}.{expert}.{part}.weight" for part in parts))
        if all(name in known for name in block):
            return block
    raise CheckpointError(
        f"{layer}: no gate, up and down tensors for expert {expert} under any known naming"
    )


def part_name(name: str, expert: int) -> str:
    """How a block names its part of a tensor that holds all experts of a layer."""
    return f"{name}[{expert}]"


def block_tensors(
    entries: dict[str, TensorEntry], layer: str, expert: int, templates: Sequence[str] = ()
) -> tuple[TensorEntry, ...]:
    """Where one expert's tensors lie. `templates`: their names with "{}" for the expert's number,
    as the manifest has them; without them the namings of older artifacts are tried.

    Raises CheckpointError when a tensor is not there.
    """
    if templates:
        names = [template.replace("{}", str(expert)) for template in templates]
        return tuple(_place(entries, layer, name) for name in names)
    fused = [f"{layer}.{part}" for part in ("gate_up_proj", "down_proj")]
    if all(name in entries for name in fused):
        return tuple(_place(entries, layer, part_name(name, expert)) for name in fused)
    return tuple(entries[name] for name in block_names(entries, layer, expert))


def _place(entries: dict[str, TensorEntry], layer: str, name: str) -> TensorEntry:
    match = _PART.fullmatch(name)
    entry = entries.get(match[1] if match else name)
    if entry is None:
        raise CheckpointError(f"{layer}: the files have no tensor {name}")
    if match is None:
        return entry
    if not entry.shape or int(match[2]) >= entry.shape[0]:
        raise CheckpointError(f"{entry.file}: {name}: the tensor's shape is {entry.shape}")
    return entry.part(int(match[2]))


def block_digest(*tensors: bytes) -> str:
    """sha256 (hex) over an expert's stored bytes, in the order of its tensors in the manifest."""
    digest = hashlib.sha256()
    for data in tensors:
        digest.update(data)
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """sha256 (hex) of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
