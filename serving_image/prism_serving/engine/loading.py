"""From an artifact directory to a model that is ready to run, or a reason why not.

Knows: what the engine cannot serve, how big the KV buffers may be. Must not know: requests.

One decision worth arguing about: what a model needs from attention is found by running one token
through it, not by reading its config; configs name the same thing in a dozen ways.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prism.architectures import require_servable
from prism.artifact import Artifact, ArtifactError, open_artifact, verify
from prism.experts import attach
from prism.loading import load_config, load_model

from prism_serving import logs
from prism_serving.engine import attention
from prism_serving.engine.attention import KvBuffers, ProbeResult, UnsupportedAttention
from prism_serving.engine.swaps import swap

_log = logging.getLogger(__name__)
_KV_SHARE_OF_MEMORY = 0.3
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its experts attached, and what the scheduler must know about it."""

    model: Any
    artifact: Artifact
    device: torch.device
    kv: ProbeResult
    eos: frozenset[int]
    max_context: int
    vocab: int


def load(path: Path, dtype: str, device: str, kernel: str = "auto") -> Loaded:
    """Raises ArtifactError, UnsupportedModel, UnsupportedAttention; OSError when files are gone."""
    from transformers import AttentionInterface

    artifact = open_artifact(path)
    require_servable(load_config(path))
    _require_whole(path)
    where = torch.device(device)
    model, _ = load_model(path, getattr(torch, dtype))
    model = model.to(where)
    attach(model, artifact, kernel=kernel)
    AttentionInterface.register(attention.NAME, attention.attention)
    model.set_attn_implementation(attention.NAME)
    config = model.config.get_text_config()
    kv = _probe(model, config, where)
    if where.type == "cpu":
        swap(model, kv.layers(where), kv)
    return Loaded(
        model, artifact, where, kv, _eos(model), config.max_position_embeddings, config.vocab_size
    )


def _require_whole(path: Path) -> None:
    """Digest every block before any is served: a flipped bit in an expert gives fluent nonsense.
    The bytes are read once more than needed, but the load that follows finds them in memory."""
    began = time.monotonic()
    problems = verify(path)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = problems[:_SHOWN_PROBLEMS] + ([f"and {more} more problems"] if more > 0 else [])
        raise ArtifactError("\n".join([*shown, "copy the artifact again or refactor again"]))
    _log.info(logs.fields("artifact is whole", seconds=time.monotonic() - began))


def _probe(model: Any, config: Any, device: torch.device) -> ProbeResult:
    result = ProbeResult()
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.inference_mode(), attention.attention_batch(result):
        model(input_ids=ids, position_ids=ids.clone(), use_cache=False)
    if len(result.keys) != config.num_hidden_layers:
        raise UnsupportedAttention(
            f"{len(result.keys)} of {config.num_hidden_layers} layers use plain attention; "
            "recurrent or other layers cannot be served"
        )
    return result


def _eos(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def available_bytes(device: torch.device) -> int:
    """Memory this process may still take: of the GPU, the cgroup or the machine."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    meminfo = Path("/proc/meminfo").read_text()
    line = next(x for x in meminfo.splitlines() if x.startswith("MemAvailable"))
    available = int(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return available  # no cgroup v2 limit to read: the machine's memory is the limit
    return available if limit == "max" else min(available, int(limit) - used)


def kv_tokens(loaded: Loaded, asked: int | None, max_running: int) -> int:
    """Size of the KV buffers in tokens; `asked` as given by the user wins."""
    if asked is not None:
        return asked
    per_token = loaded.kv.bytes_per_token(loaded.device)
    share = _KV_SHARE_OF_MEMORY if loaded.device.type == "cpu" else 0.9
    by_memory = int(available_bytes(loaded.device) * share) // per_token
    return max(min(by_memory, max_running * loaded.max_context), 1)


def kv_buffers(loaded: Loaded, tokens: int) -> KvBuffers:
    """The buffers; on Linux untouched CPU pages cost nothing until they are written."""
    return KvBuffers.like(loaded.kv, tokens, loaded.device)
