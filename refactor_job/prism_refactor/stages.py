"""The passes over the source's layers: cut and knots. Each goes on from what it finds.

Knows what each pass asks of the experts; numerics live with cut and reduce. The decision
worth arguing about: the knots are one pass with a stream per knot, not a pass per knot, so the
layer is loaded, permuted and packed once for all of them.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from prism.streaming import StreamedModel
from torch import Tensor

from prism_refactor.cut import Cutter
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.findings import Findings, Routed
from prism_refactor.layer_experts import full_output
from prism_refactor.layers import LayerFiles
from prism_refactor.options import KNOT_STRIDE, KNOTS, WINDOW
from prism_refactor.reduce import LayerReduction
from prism_refactor.store import PartialFolder
from prism_refactor.sweep import Answer, KeptStreams, plain, sweep

_log = logging.getLogger(__name__)
_LOOK_EVERY_S: Final = 0.5
_TELL_EVERY_S: Final = 60.0
_PATIENCE_S: Final = 4 * 3600.0  # far more than the longest layer takes
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

    @property
    def name(self) -> str:
        """Of files that belong to this block of this many."""
        return f"{self.index:03d}-of-{self.count:03d}"

    def relay(self, index: int) -> str:
        """The file in which block ``index`` - 1 hands on to block ``index``."""
        return f"relay-{index:03d}-of-{self.count:03d}"


class CutPass:
    """Full-level streams through one block of layers, which are cut on the way.

    The state between two blocks is handed on in a file: a block first runs its layers only to hand
    on what the next one waits for, then again to fit. A single block does both at once. Cuts serve
    whatever number of shards goes on with the work; states are named by it, since its blocks decide
    where they lie.
    """

    def __init__(
        self, folder: PartialFolder, files: LayerFiles, block: Block, cutter: Cutter
    ) -> None:
        self._folder = folder
        self._files = files
        self._block = block
        self._cutter = cutter
        self._findings = Findings(folder)

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
        if not block.is_last and not self._folder.has(block.relay(block.index + 1)):
            kept = KeptStreams(self._folder, f"hidden-{block.relay(block.index)}")
            hidden = sweep(model, batches, self._full, kept, start=start, end=end)
            relay = block.relay(block.index + 1)
            self._folder.save(relay, {"done": torch.tensor(end), **hidden})
        missing = self._files.missing_cuts(range(block.first, block.end))
        until = place_of[missing[0]] if missing else None
        kept = KeptStreams(self._folder, f"hidden-cut-{block.name}", until)

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
        after = PROBE if block.is_last else block.relay(block.index + 1)
        numbers = range(block.first, block.end)
        return self._folder.has(after) and not self._files.missing_cuts(numbers)

    def _received(self, model: StreamedModel) -> tuple[int, dict[str, Tensor]] | None:
        if self._block.index == 0:
            return None
        name = self._block.relay(self._block.index)
        before = f"shard {self._block.index - 1} of {self._block.count} to hand on its last state"
        wait_for(lambda: self._folder.has(name), lambda: before, self._folder)
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

        compute = plain(module)

        def probe(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if number >= self._block.first:
                order, n = self._files.cut_of(number).permutations, self._cutter.sub_experts
                self._findings.note_mass(number, module, order, n, Routed(x, index, weights))
            return compute(x, index, weights)

        return {"full": answer, PROBE: probe}


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


def wait_for(ready: Callable[[], bool], what: Callable[[], str], folder: PartialFolder) -> None:
    """Wait until other shards have left what this one needs; ``what`` is told now and then.

    Raises RefactorError (Interrupted) when nothing was written to the folder for `_PATIENCE_S`.
    """
    told = -_TELL_EVERY_S
    while not ready():
        now = time.monotonic()
        if now - told >= _TELL_EVERY_S:
            _log.info("waiting for %s", what())
            told = now
        if time.time() - folder.changed_s() > _PATIENCE_S:
            raise RefactorError(
                Reason.INTERRUPTED,
                f"{folder.path}: no shard has written anything for {_PATIENCE_S / 3600:.0f} hours "
                f"while this one waits for {what()}; start the other shards again.",
            )
        time.sleep(_LOOK_EVERY_S)
