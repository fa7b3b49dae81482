"""The passes over a model's layers: cut, knots, evaluation. Each goes on from what it finds.

Knows what each pass asks of the experts; numerics live with cut, reduce and evaluate. The decision
worth arguing about: the knots are one pass with a stream per knot, not a pass per knot, so the
layer is loaded, permuted and packed once for all of them.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from prism.artifact import Artifact
from prism.batch_context import BatchContext, SelectionStats, batch_context
from prism.experts import attach_layer, forward
from prism.streaming import StreamedModel
from torch import Tensor

from prism_refactor.cut import Cutter
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.layer_experts import full_output
from prism_refactor.layers import LayerFiles
from prism_refactor.options import KNOT_STRIDE, KNOTS, WINDOW
from prism_refactor.reduce import LayerReduction
from prism_refactor.store import PartialFolder
from prism_refactor.sweep import Answer, KeptStreams, plain, sweep

_log = logging.getLogger(__name__)
_LOOK_EVERY_S: Final = 0.5
PROBE: Final = "probe"  # a small stream of held-out text, computed by transformers' own code
PROBE_WINDOWS: Final = 2


@dataclass(frozen=True, slots=True)
class Block:
    """The MoE layers that one shard cuts: ``first`` to ``end`` - 1 of ``layers``."""

    index: int
    count: int
    layers: int

    @property
    def first(self) -> int:
        return self.index * self.layers // self.count

    @property
    def end(self) -> int:
        return (self.index + 1) * self.layers // self.count

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


class CutPass:
    """Full-level streams through one block of layers, which are cut on the way.

    The state between two blocks is handed on in a file: a block first runs its layers only to hand
    on what the next one waits for, then again to fit. A single block does both at once.
    """

    def __init__(
        self, folder: PartialFolder, files: LayerFiles, block: Block, cutter: Cutter
    ) -> None:
        self._folder = folder
        self._files = files
        self._block = block
        self._cutter = cutter

    def run(
        self, model: StreamedModel, fit: Tensor, held: Tensor, passed: Callable[[int], None]
    ) -> None:
        """Cut this block's layers on ids ``fit`` [S, W]; probe logits come of ``held``.

        ``passed`` is told of each layer of the block.
        """
        block = self._block
        batches = {"full": model.batch(fit), PROBE: model.batch(held[:PROBE_WINDOWS])}
        start = self._received(model)
        place_of = {number: place for place, number in model.moe.items()}
        end = len(model.layers) if block.is_last else place_of[block.end]
        if not block.is_last and not self._folder.has(_relay(block.index + 1)):
            kept = KeptStreams(self._folder, f"hidden-relay-{block.index:03d}")
            hidden = sweep(model, batches, self._full, kept, start=start, end=end)
            self._folder.save(_relay(block.index + 1), {"done": torch.tensor(end), **hidden})
        kept = KeptStreams(self._folder, f"hidden-cut-{block.index:03d}")

        def told(number: int) -> None:
            if number >= block.first:
                passed(number)

        hidden = sweep(model, batches, self._cut, kept, start=start, end=end, passed=told)
        if block.is_last:
            logits = model.logits(batches[PROBE].ids, hidden[PROBE])
            self._folder.save(PROBE, {"logits": logits})

    @property
    def is_done(self) -> bool:
        """Nothing of this block is left to do."""
        block = self._block
        after = PROBE if block.is_last else _relay(block.index + 1)
        numbers = range(block.first, block.end)
        return self._folder.has(after) and not self._files.missing_cuts(numbers)

    def _received(self, model: StreamedModel) -> tuple[int, dict[str, Tensor]] | None:
        if self._block.index == 0:
            return None
        name = _relay(self._block.index)
        wait_for(lambda: self._folder.has(name), f"shard {self._block.index - 1} to hand on")
        kept = self._folder.load(name)
        assert kept is not None
        return int(kept.pop("done")), {n: hidden.to(model.device) for n, hidden in kept.items()}

    def _full(self, number: int, module: Any) -> Mapping[str, Answer]:
        def answer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return full_output(module, x, index, weights)

        return {"full": answer, PROBE: plain(module)}

    def _cut(self, number: int, module: Any) -> Mapping[str, Answer]:
        def answer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if self._files.missing_cuts(range(number, number + 1)):
                self._files.save_cut(number, self._cutter.fit(number, module, x, index, weights))
            if number == self._block.end - 1:
                return torch.zeros_like(x)  # nobody of this block reads what comes after
            return full_output(module, x, index, weights)

        return {"full": answer, PROBE: plain(module)}


def run_knots(
    model: StreamedModel,
    ids: Tensor,
    folder: PartialFolder,
    files: LayerFiles,
    passed: Callable[[int], None],
) -> None:
    """Fit every knot on ids [S, W], each on its own stream."""
    batch = model.batch(ids[::KNOT_STRIDE])
    last = len(model.moe) - 1

    def answers(number: int, module: Any) -> Mapping[str, Answer]:
        layer = LayerReduction(module, files.cut_of(number), WINDOW)

        def at(level: int) -> Answer:
            def answer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
                knot = files.knot(level, number)
                if knot is None:
                    knot = layer.fit(level, x, index, weights)
                    files.save_knot(level, number, knot)
                if number == last:
                    return torch.zeros_like(x)  # nobody reads what comes after the last experts
                return layer.output(knot, x, index, weights)

            return answer

        return {str(level): at(level) for level in KNOTS}

    kept = KeptStreams(folder, "hidden-knots")
    sweep(model, dict.fromkeys(map(str, KNOTS), batch), answers, kept, passed=passed)


@dataclass(frozen=True, slots=True)
class LevelStreams:
    """The written artifact at every level: last hidden states, and what was selected."""

    hidden: dict[int, Tensor]  # level -> [S, W, H]
    own: dict[int, tuple[int, int]]  # level -> (own sub-experts, candidates)
    probe: Tensor  # logits of the artifact as a stock checkpoint


def run_levels(
    model: StreamedModel,
    artifact: Artifact,
    ids: Tensor,
    levels: tuple[int, ...],
    folder: PartialFolder,
    passed: Callable[[int], None],
) -> LevelStreams:
    """Run the artifact, loaded as ``model``, on held-out ids [S, W] at all levels side by side."""
    batch = model.batch(ids)
    batches = {PROBE: model.batch(ids[:PROBE_WINDOWS]), **{str(level): batch for level in levels}}

    def answers(number: int, module: Any) -> Mapping[str, Answer]:
        def at(level: int) -> Answer:
            def answer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
                if not hasattr(module, "_prism"):  # the probe has passed: now it may be packed
                    attach_layer(module, artifact, number)
                stats = SelectionStats()
                rows = torch.full((len(x),), level, dtype=torch.int32, device=x.device)
                with batch_context(BatchContext(rows, stats)):
                    out = forward(module, x, index, weights)
                counts = torch.tensor([stats.own, stats.candidates])
                folder.save(_counts(level, number), {"counts": counts})
                return out

            return answer

        return {PROBE: plain(module), **{str(level): at(level) for level in levels}}

    hidden = sweep(model, batches, answers, KeptStreams(folder, "hidden-levels"), passed=passed)
    own = {}
    for level in levels:
        kept = [folder.load(_counts(level, number)) for number in range(len(model.moe))]
        total = torch.stack([counts["counts"] for counts in kept if counts]).sum(0)
        own[level] = (int(total[0]), int(total[1]))
    probe = model.logits(batches[PROBE].ids, hidden.pop(PROBE))
    return LevelStreams({int(level): state for level, state in hidden.items()}, own, probe)


def require_same(found: Tensor, folder: PartialFolder, limit: float) -> None:
    """The written checkpoint, loaded plainly, must compute what the source computed.

    ``limit`` is a share of the largest logit. Raises RefactorError (InternalError).
    """
    kept = folder.load(PROBE)
    assert kept is not None, "no logits of the source were kept"
    expected = kept["logits"]
    difference = float((found.cpu() - expected).abs().max())
    _log.info("written checkpoint against source: logits differ by at most %.1e", difference)
    if not difference <= limit * max(1.0, float(expected.abs().max())):
        raise RefactorError(
            Reason.INTERNAL_ERROR,
            f"The permuted checkpoint differs from its source (logits by {difference:.3g}); "
            "this is a defect in Prism, please report the architecture.",
        )


def wait_for(ready: Callable[[], bool], what: str) -> None:
    """Wait until other shards have left what this one needs; the Job's deadline bounds it."""
    told = False
    while not ready():
        if not told:
            _log.info("waiting for %s", what)
            told = True
        time.sleep(_LOOK_EVERY_S)


def _relay(index: int) -> str:
    return f"relay-{index:03d}"


def _counts(level: int, number: int) -> str:
    return f"counts-{level:03d}-{number:03d}"
