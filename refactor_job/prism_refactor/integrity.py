"""One reading of a source's files: what identifies each, and whether every weight is a number.

Knows bytes and dtypes. The decision worth arguing about: the digests need every byte anyway, so
weights are looked at in the same reading; a NaN in the last layer is then told in seconds, with the
tensor's own name, and not when the passes over the layers arrive there.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import torch
from prism.checkpoint import TensorEntry

from prism_refactor.errors import Reason, RefactorError

_CHUNK_BYTES: Final = 16 << 20  # a multiple of every item's size
_NAMED: Final = 5  # of many like problems
_FLOATS: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def digests(path: Path, names: Iterable[str], entries: dict[str, TensorEntry]) -> dict[str, str]:
    """sha256 (hex) of every file ``names`` of the directory ``path``, each read once.

    Raises RefactorError (CorruptCheckpoint) naming file and tensor where a weight is NaN or
    infinite.
    """
    inside: dict[Path, list[tuple[str, TensorEntry]]] = {}
    for name, entry in entries.items():
        inside.setdefault(entry.file, []).append((name, entry))
    found: dict[str, str] = {}
    problems: list[str] = []
    for name in names:
        file = path / name
        tensors = sorted(inside.get(file, []), key=lambda tensor: tensor[1].start)
        found[name], spoilt = _read(file, tensors)
        problems += [f"{file}: {tensor}" for tensor in spoilt]
    if problems:
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise RefactorError(
            Reason.CORRUPT_CHECKPOINT,
            f"{len(problems)} tensors hold values that are NaN or infinite: "
            f"{'; '.join(problems[:_NAMED])}{more}; copy the checkpoint again.",
        )
    return found


def _read(file: Path, tensors: Sequence[tuple[str, TensorEntry]]) -> tuple[str, list[str]]:
    """(digest, names of tensors with values that are no numbers)."""
    digest = hashlib.sha256()
    spoilt = []
    with file.open("rb") as stream:
        for name, entry in tensors:
            for chunk in _chunks(stream, entry.start - stream.tell()):
                digest.update(chunk)
            finite = True
            for chunk in _chunks(stream, entry.end - entry.start):
                digest.update(chunk)
                finite = finite and _finite(chunk, entry.dtype)
            if not finite:
                spoilt.append(name)
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest(), spoilt


def _chunks(stream: BinaryIO, count: int) -> Iterator[bytes]:
    while count > 0 and (chunk := stream.read(min(count, _CHUNK_BYTES))):
        count -= len(chunk)
        yield chunk


def _finite(chunk: bytes, dtype: str) -> bool:
    kind = _FLOATS.get(dtype)
    if kind is None or len(chunk) % kind.itemsize:
        return True  # no floats, or a file that shrinks while it is read: told by its reader
    # Both bounds are NaN as soon as one value is, and an infinity is always one of them.
    bounds = torch.stack(torch.aminmax(torch.frombuffer(bytearray(chunk), dtype=kind)))
    return bool(torch.isfinite(bounds).all())
