"""One forward pass of a step plan through transformers' own model code.

Knows: how a plan becomes tensors, the batch contexts of attention and experts. Must not know:
queues, targets, sockets.

One decision worth arguing about: all rows of a step form one sequence of batch size 1 ("[1, T]").
Model code sees positions, never padding; who may attend to whom is the attention function's
business, and the level of each row is the experts function's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from prism.contract import MAX_LEVEL
from prism.experts import BatchContext, SelectionStats, batch_context
from prism.kernels.layers import StepRows

from prism_serving.engine.attention import AttentionBatch, KvBuffers, attention_batch
from prism_serving.engine.scheduler import Chunk, StepPlan


class Runner:
    """Holds the model and its KV buffers; `own` and `candidates` count selected sub-experts."""

    def __init__(self, model: Any, buffers: KvBuffers, device: torch.device) -> None:
        self._model = model
        self._buffers = buffers
        self._device = device
        self.own = 0
        self.candidates = 0

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Compute the step; returns logits [sampling chunks, vocab] in the model's dtype."""
        chunks = plan.chunks
        ids = [t for c in chunks for t in c.sequence.tokens[c.start : c.start + c.count]]
        positions = np.concatenate([np.arange(c.start, c.start + c.count) for c in chunks])
        counts = [c.count for c in chunks]
        ends = np.cumsum(counts)
        starts = np.repeat([_kv_start(c) for c in chunks], counts)
        keep = [end - 1 for c, end in zip(chunks, ends.tolist(), strict=True) if c.samples]
        segments = [
            (end - c.count, end, _kv_start(c), c.start)
            for c, end in zip(chunks, ends.tolist(), strict=True)
        ]
        rows = StepRows(torch.tensor(segments), self._tensor(starts + positions))
        batch = AttentionBatch(self._buffers, rows)
        stats = SelectionStats()
        with attention_batch(batch), batch_context(self._levels(chunks, counts, stats)):
            out = self._model(
                input_ids=self._tensor(np.array(ids))[None],
                position_ids=self._tensor(positions)[None],
                use_cache=False,
                logits_to_keep=self._tensor(np.array(keep or [len(ids) - 1])),
            )
        self.own += stats.own
        self.candidates += stats.candidates
        logits: torch.Tensor = out.logits[0]
        return logits[: len(keep)]

    def _tensor(self, values: "np.ndarray[Any, Any]") -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(self._device)

    def _levels(
        self, chunks: Sequence[Chunk], counts: list[int], stats: SelectionStats
    ) -> BatchContext:
        levels = [c.level for c in chunks]
        if all(level == MAX_LEVEL for level in levels):
            return BatchContext(None, stats)
        rows = torch.from_numpy(np.repeat(np.array(levels, dtype=np.int32), counts))
        return BatchContext(rows.to(self._device), stats)


def _kv_start(chunk: Chunk) -> int:
    start = chunk.sequence.kv_start
    assert start is not None, "a planned sequence holds KV memory"
    return start
