"""A Hugging Face checkpoint directory as files: safetensors headers and the weight index.

Reads headers only and needs the standard library alone: names and shapes of a 70 GB checkpoint are
known in milliseconds, without torch. Decision: headers and index come from strangers, so they are
read more strictly than the format's own library does, before any byte of a weight is trusted:
whole ranges, no tensor twice, no file elsewhere; every problem is told at once.
"""

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1}
_TOO_MANY = 1 << 62  # bytes or items: no file is that large
_NAMED = 5  # of many like problems
_ITEM_BYTES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


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


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file; raises CheckpointError when it is corrupt or truncated.

    Tensors must cover the bytes after the header without hole or overlap, as the format demands.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: {size} bytes cannot hold a header of {length}; truncated or no "
                    "safetensors file; copy it again"
                )
            header = json.loads(stream.read(length), object_pairs_hook=_each_once)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except _TwiceError as error:
        raise CheckpointError(f"{file}: header names {error} twice") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: header is not JSON; not a safetensors file") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is no JSON object; not a safetensors file")
    entries = {
        name: _entry(file, name, info, 8 + length)
        for name, info in header.items()
        if name != "__metadata__"
    }
    _require_covered(file, entries, 8 + length, size)
    return entries


class _TwiceError(Exception):
    """A name that occurs twice in one JSON object."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwiceError(name)
        found[name] = value
    return found


def _entry(file: Path, name: str, info: Any, base: int) -> TensorEntry:
    info = info if isinstance(info, dict) else {}
    dtype, shape, offsets = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets, 2):
        raise CheckpointError(
            f"{file}: {name}: header entry is malformed (dtype {dtype!r:.40}, shape {shape!r:.40}, "
            f"offsets {offsets!r:.40})"
        )
    start, end = offsets
    item = _ITEM_BYTES.get(dtype)
    if end < start or (item is not None and prod(shape) * item != end - start):
        raise CheckpointError(f"{file}: {name}: {end - start} bytes for shape {tuple(shape)}")
    return TensorEntry(file, dtype, tuple(shape), base + start, base + end)


def _counts(value: Any, length: int | None = None) -> bool:
    """Whether it is a list of whole numbers from 0 that a file's size can be (JSON knows more)."""
    if not isinstance(value, list) or len(value) != (len(value) if length is None else length):
        return False
    return all(type(number) is int and 0 <= number < _TOO_MANY for number in value)


def _require_covered(file: Path, entries: dict[str, TensorEntry], base: int, size: int) -> None:
    at, before = base, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            what = "overlaps" if entry.start < at else "leaves a hole behind"
            raise CheckpointError(f"{file}: {name} {what} {before}; corrupt: copy it again")
        at, before = entry.end, name
    if at != size:
        raise CheckpointError(
            f"{file}: {size} bytes where its header says {at}; truncated? copy it again"
        )


def open_checkpoint(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of a single-file or sharded checkpoint; raises CheckpointError, all problems.

    With an index every tensor that it promises is in its file, and no tensor is in two files.
    """
    index = directory / INDEX_FILE
    promised: dict[str, str] = {}
    if index.exists():
        promised = _read_index(index)
        files = sorted(set(promised.values()))
    elif (directory / SINGLE_FILE).exists():
        files = [SINGLE_FILE]
    else:
        raise CheckpointError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    entries: dict[str, TensorEntry] = {}
    problems = []
    for name in files:
        try:
            found = read_header(directory / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{directory}: {tensor} is in {entries[tensor].file.name} and in {name}; which one "
            "counts is anybody's guess: keep one"
            for tensor in sorted(found.keys() & entries.keys())[:_NAMED]
        ]
        entries |= found
    problems = problems or _broken_promises(index, promised, entries)
    if problems:
        raise CheckpointError("\n".join(problems))
    return entries


def _read_index(index: Path) -> dict[str, str]:
    """tensor -> file name in the same directory; a path that leads elsewhere is refused."""
    try:
        promised = json.loads(index.read_bytes())["weight_map"]
        files = set(promised.values())
    except OSError as error:
        raise CheckpointError(f"{index}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a weight index ({error!r:.80})") from error
    for name in files:
        if not isinstance(name, str) or not name or {"/", "\\", "\0"} & set(name) or name == "..":
            raise CheckpointError(f"{index}: {name!r:.80} is no name of a file beside it")
    return dict(promised)


def _broken_promises(
    index: Path, promised: dict[str, str], entries: dict[str, TensorEntry]
) -> list[str]:
    missing = [
        name
        for name, file in promised.items()
        if name not in entries or entries[name].file.name != file
    ]
    if not missing:
        return []
    return [
        f"{index} names {len(missing)} tensors that are not in their file, first {missing[0]}; "
        "copy the checkpoint again"
    ]


def file_digest(file: Path) -> str:
    """sha256 (hex) of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
