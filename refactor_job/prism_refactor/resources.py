"""What a refactoring will need: memory, disk and time, and whether they are there.

Knows shapes, counts of operations and the order of stages; measures this machine for a moment to
turn operations into seconds. The decision worth arguing about: memory and disk are refused when
they are surely too small, before any work; time is only told, because a guess within a factor of
two is of use to a person and to nobody else.
"""

import re
import shutil
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Final

import torch

from prism_refactor import machine
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.options import (
    COMPENSATION_TOKENS,
    EVALUATION_LEVELS,
    EVALUATION_TOKENS,
    FIT_TOKENS,
    KNOT_STRIDE,
    KNOTS,
    SEARCH_PROPOSALS_PER_NEURON,
    SEARCH_TOKENS,
    SERVED_BATCHES,
    SERVED_LEVELS,
    TOP_K_SHARES,
)
from prism_refactor.source import Checkpoint
from prism_refactor.store import PartialFolder

_LAYER: Final = re.compile(r"\blayers\.(\d+)\.")
_PROGRAM_BYTES: Final = 700 << 20  # Python, torch, transformers and one batch's logits
_ACTIVATIONS: Final = 12  # hidden states of a stream that a layer's forward holds at its peak
_MARGIN: Final = 1.1


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that the needs follow from; bytes are in the dtype that the model runs in."""

    moe_layers: int
    experts: int
    slots: int  # experts per token
    hidden: int
    width: int
    vocabulary: int
    layer_bytes: int  # the largest decoder layer
    resident_bytes: int  # everything outside the decoder layers
    dense_parameters: int  # of all decoder layers, routed experts excluded
    item_bytes: int


@dataclass(frozen=True, slots=True)
class Needs:
    """What the whole work needs; operations are multiply-adds times two."""

    memory_bytes: int
    disk_bytes: int
    operations: dict[str, float]  # stage -> floating-point operations
    search_work: float  # work of the swap search: proposals x tokens
    written_bytes: int

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, tokens: int, sub_experts: int, dtype: torch.dtype
    ) -> "Needs":
        """Needs of refactoring ``checkpoint`` on ``tokens`` tokens in ``dtype``."""
        shape = shape_of(checkpoint, dtype)
        return needs_of(shape, tokens, sub_experts, checkpoint.size_bytes)


def shape_of(checkpoint: Checkpoint, dtype: torch.dtype) -> Shape:
    """Read the sizes off headers and configuration; no weight is read."""
    from prism.architectures import find_expert_modules
    from transformers import AutoModelForCausalLM

    from prism_refactor.layer_experts import expert_shape

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=False)
    modules = find_expert_modules(model)
    experts, hidden, width = expert_shape(modules[0][1])
    text = checkpoint.config.get_text_config()
    inside: Counter[int] = Counter()
    outside = 0
    for name, entry in checkpoint.entries.items():
        match = _LAYER.search(name)
        if match:
            inside[int(match.group(1))] += prod(entry.shape)
        else:
            outside += prod(entry.shape)
    routed = sum(parameter.numel() for _, module in modules for parameter in module.parameters())
    return Shape(
        moe_layers=len(modules),
        experts=experts,
        slots=checkpoint.experts_per_token,
        hidden=hidden,
        width=width,
        vocabulary=int(text.vocab_size),
        layer_bytes=max(inside.values()) * dtype.itemsize,
        resident_bytes=outside * dtype.itemsize,
        dense_parameters=max(0, sum(inside.values()) - routed),
        item_bytes=dtype.itemsize,
    )


def needs_of(shape: Shape, tokens: int, sub_experts: int, checkpoint_bytes: int) -> Needs:
    """The sums behind ``prism plan``."""
    held = EVALUATION_TOKENS
    stream = tokens * shape.hidden * shape.item_bytes
    knots = len(KNOTS) * stream // KNOT_STRIDE
    streams = len(EVALUATION_LEVELS) + len(TOP_K_SHARES) + len(SERVED_LEVELS) * len(SERVED_BATCHES)
    levels = streams * held * shape.hidden * shape.item_bytes
    fitted = shape.moe_layers * shape.experts * sub_experts * shape.hidden * 4
    fitted *= 1 + len(KNOTS)
    working = _ACTIVATIONS * max(tokens, held) * shape.hidden * max(shape.item_bytes, 4) // 2
    memory = (
        _PROGRAM_BYTES
        + shape.resident_bytes
        + max(
            2 * shape.layer_bytes + max(stream, knots, levels) + working,
            2 * fitted,
        )
    )
    disk = int(_MARGIN * (checkpoint_bytes + 2 * fitted + stream + knots + levels))
    expert = 6.0 * shape.hidden * shape.width  # operations of one token in one expert
    dense = 2.0 * shape.dense_parameters
    routed = shape.moe_layers * shape.slots * expert
    per_expert = min(tokens * shape.slots / shape.experts, FIT_TOKENS)
    all_experts = shape.moe_layers * shape.experts
    ridge = 2.0 * per_expert * shape.hidden**2 + shape.hidden**3
    compensated = min(tokens / KNOT_STRIDE * shape.slots / shape.experts, COMPENSATION_TOKENS)
    share = sum(KNOTS) / 100
    measured = sum(EVALUATION_LEVELS) / 100 + sum(TOP_K_SHARES)
    measured += sum(SERVED_LEVELS) / 100 * len(SERVED_BATCHES)
    operations = {
        "partition": tokens * (dense + routed)
        + all_experts * (expert * (min(SEARCH_TOKENS, per_expert) + per_expert) + ridge),
        "knots": tokens / KNOT_STRIDE * (len(KNOTS) * dense + share * routed)
        + all_experts * len(KNOTS) * compensated * 2 * expert,
        "evaluate": held * streams * (dense + 2.0 * shape.hidden * shape.vocabulary)
        + held * measured * routed,
    }
    proposals = SEARCH_PROPOSALS_PER_NEURON * shape.width
    search = float(all_experts) * proposals * min(SEARCH_TOKENS, int(per_expert))
    return Needs(memory, disk, operations, search, checkpoint_bytes)


def require_resources(needs: Needs, folder: PartialFolder) -> None:
    """Raise RefactorError (NoSpaceLeft, OutOfMemory) before the work, not in the middle of it."""
    there = sum(f.stat().st_size for f in folder.path.rglob("*") if f.is_file())
    place = next(path for path in folder.path.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if free + there < needs.disk_bytes:
        raise RefactorError(
            Reason.NO_SPACE_LEFT,
            f"{folder.path.parent} has {free / 1e9:.2f} GB free where the refactoring needs "
            f"{(needs.disk_bytes - there) / 1e9:.2f} GB; enlarge the volume or free space.",
        )
    available = machine.available_bytes()
    if available < needs.memory_bytes:
        raise RefactorError(
            Reason.OUT_OF_MEMORY,
            f"{available / 1e9:.2f} GB of memory are available where the refactoring needs about "
            f"{needs.memory_bytes / 1e9:.2f} GB; give the Job more memory "
            "(spec.refactor.resources) or fewer calibration tokens (--tokens).",
        )
