"""The tensors of one expert in a checkpoint's files: their names, their place, their digest.

Knows names and bytes; needs neither the model class nor torch. Decision: a block (one expert of one
layer) is digested over its bytes as they lie in the file, found by the names that the manifest
records, so `verify` needs no dtype either, and a corrupt expert is named as such.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from prism.checkpoint import CheckpointError, TensorEntry

# Names of an expert's tensors in artifacts whose manifest does not say them, by what the path of
# the experts module is called in the files.
_NAMINGS = (
    (("", ""), ("gate_proj", "up_proj", "down_proj")),
    ((".mlp.experts", ".block_sparse_moe.experts"), ("w1", "w3", "w2")),
)
_PART = re.compile(r"(.*)\[(\d+)\]")


class BlockNames(NamedTuple):
    """Tensor names of one expert."""

    gate: str
    up: str
    down: str


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
