"""The whole refactoring, stage after stage; each stage leaves files, so the next run goes on from
there.

Knows the order of stages and what each hands to the next; numerics, files and messages live in
their own modules. The decision worth arguing about: evaluation loads the written artifact and runs
what serving runs, so the numbers in the manifest describe the files on disk, and a writer's mistake
cannot go unseen.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from prism import contract
from prism.artifact import Artifact
from prism.checkpoint import CheckpointError
from prism.contract import ExitCode
from prism.places import Block as Places
from prism.streaming import StreamedModel

from prism_refactor import finish, granularity, reading, request, text, write
from prism_refactor.cut import Cutter
from prism_refactor.errors import Reason, RefactorError, from_exception
from prism_refactor.evaluation_pass import Measured, measure_streams, require_same, run_levels
from prism_refactor.layer_experts import expert_shape
from prism_refactor.layers import LayerFiles
from prism_refactor.machine import compute_dtype, device
from prism_refactor.options import (
    EVALUATION_LEVELS,
    KNOTS,
    SERVED_BATCHES,
    SERVED_LEVELS,
    TOP_K_SHARES,
    Options,
)
from prism_refactor.progress import Progress, Stage
from prism_refactor.resources import Needs, require_resources
from prism_refactor.source import Checkpoint, open_source, require_divisible
from prism_refactor.stage_costs import StageCosts
from prism_refactor.stages import PROBE, Block, CutPass, run_knots, wait_for
from prism_refactor.store import PartialFolder

_log = logging.getLogger(__name__)
_SAME_LOGITS: Final = 1e-4  # share of the largest logit, in fp32
_SAME_LOGITS_16_BIT: Final = 0.2  # share of the largest logit: other orders of summation round

_STREAMS: Final = (
    len(EVALUATION_LEVELS) + len(TOP_K_SHARES) + len(SERVED_LEVELS) * len(SERVED_BATCHES)
)

Stages = Callable[[list[Stage]], Progress]


def refactor(options: Options, progress_of: Stages) -> Artifact | None:
    """Make, continue or confirm the artifact at ``options.out``.

    None: a shard other than the first has done its part. Raises RefactorError; OSError and
    MemoryError pass through (see errors.from_exception).
    """
    torch.manual_seed(options.seed)
    request.require_place(options)
    given = options.source, options.source_uri, options.source_wait_s
    checkpoint = open_source(*given, servable=options.servable)
    corpus = text.read_corpus(options.calibration)
    folder = PartialFolder(options.out)
    if options.out.exists():
        return request.confirm(options, checkpoint.digests(), corpus.digest, folder)
    run = _Run(options, checkpoint, folder, progress_of)
    run.check(corpus)
    files = checkpoint.digests()  # reads every byte: what can be told without it was told before
    options.out.parent.mkdir(parents=True, exist_ok=True)
    key = request.key_of(options, files, corpus.digest)
    with _nothing_left_of_bad_input(options, folder):
        with folder.claimed(key, options.shard):
            run.cut()
            if options.shard[0]:
                return None
            run.wait()
        with folder.locked(key):
            done = run.finish(files)
            folder.publish()
    return Artifact(options.out, done.manifest, done.digest)


@contextmanager
def _nothing_left_of_bad_input(options: Options, folder: PartialFolder) -> Iterator[None]:
    """Work made from an input that cannot be right is of no use to any later run; other shards,
    which find the same out for themselves, may still stand in the folder."""
    try:
        yield
    except (RefactorError, CheckpointError) as error:
        found = from_exception(error)
        if found and found.exit_code is ExitCode.BAD_INPUT and options.shard[1] == 1:
            folder.remove()
        raise


class _Run:
    """One run over the stages, resuming what ``folder`` holds."""

    def __init__(
        self,
        options: Options,
        checkpoint: Checkpoint,
        folder: PartialFolder,
        progress_of: Stages,
    ) -> None:
        self._options = options
        self._checkpoint = checkpoint
        self._folder = folder
        self._progress_of = progress_of
        self._count = len(checkpoint.layers)
        self._block = Block(*options.shard, self._count)
        self._layers = LayerFiles(folder)
        self._costs = StageCosts(folder, options.shard[0])

    def check(self, corpus: text.Corpus) -> None:
        """Raise RefactorError where the work cannot be done; no weight of a decoder layer is read.

        As in `Needs.of`, the finest cut is what a trial may choose.
        """
        if self._block.count > self._count:
            raise RefactorError(
                Reason.BAD_INPUT,
                f"{self._block.count} shards for {self._count} MoE layers: use at most as many "
                "shards as layers (--shard, spec.refactor.parallelism).",
            )
        self._dtype = compute_dtype(self._checkpoint)
        self._model = StreamedModel(self._checkpoint.path, self._dtype, device())
        module = self._model.experts(next(iter(self._model.moe)))
        experts, self._hidden, self._width = expert_shape(module)
        slots = self._checkpoint.experts_per_token
        reader = reading.Reader(self._model.tokenizer, self._model.vocabulary, slots, experts)
        self._texts = reading.read(corpus, reader, self._options)
        finest = self._options.sub_experts or max(
            granularity.candidates(self._width), default=contract.DEFAULT_SUB_EXPERTS
        )
        require_divisible(self._checkpoint, finest, self._width)
        self._places = write.blocks(self._checkpoint, self._model.model)
        needs = Needs.of(self._checkpoint, self._options.tokens, finest, self._dtype)
        require_resources(needs, self._folder)

    def cut(self) -> None:
        """Cut this shard's layers."""
        self._sub_experts = self._chosen_sub_experts()
        self._progress = self._progress_of(self._stages())
        workers = max(1, torch.get_num_threads())
        cutter = Cutter(self._sub_experts, self._options.seed, workers)
        cut = CutPass(self._folder, self._layers, self._block, cutter)
        found = set(range(self._block.first, self._block.end))
        found -= set(self._layers.missing_cuts(range(self._count)))

        def passed(number: int) -> None:
            self._progress.advance("partition", found=number in found)

        if cut.is_done:
            for number in range(self._block.first, self._block.end):
                passed(number)
            return
        ids = self._texts.calibration.ids[:, :-1]
        with self._costs.stage("partition"):
            cut.run(self._model, ids, self._texts.evaluation.ids[:, :-1], passed)

    def finish(self, files: dict[str, str]) -> Artifact:
        """All stages after the cuts; the finished artifact still lies in the partial folder."""
        with self._costs.stage("knots"):
            self._fit_knots()
        del self._model
        with self._costs.stage("write"):
            self._write(self._places)
        record = finish.Origin(self._checkpoint, files, self._texts.record)
        with self._costs.stage("digests"):
            digests = write.digests(self._checkpoint, self._places, self._folder.artifact)
        manifest = finish.manifest_of(record, self._options, self._layers, self._places, digests)
        artifact = finish.write_prism_folder(self._folder, self._layers, manifest)
        with self._costs.stage("evaluate"):
            measured = self._evaluate(artifact)
        done = finish.write_prism_folder(self._folder, self._layers, manifest, measured)
        finish.write_report(self._folder, done, measured, self._texts, self._options)
        return done

    def _chosen_sub_experts(self) -> int:
        """What was asked for, or what a trial of the first shard finds best."""
        if self._options.sub_experts is not None:
            return self._options.sub_experts
        if self._options.shard[0]:
            what = "shard 0 to choose the number of sub-experts"
            wait_for(lambda: self._folder.has("choice"), lambda: what, self._folder)
        kept = self._folder.load("choice")
        if kept is not None:
            return int(kept["sub_experts"])
        ids = self._texts.calibration.ids[:, :-1]
        with self._costs.stage("granularity"):
            chosen = granularity.choose(self._model, ids, self._width, self._options.seed)
        self._folder.save("choice", {"sub_experts": torch.tensor(chosen)})
        return chosen

    def wait(self) -> None:
        """Until all shards have cut their layers."""

        def missing() -> list[int]:
            return self._layers.missing_cuts(range(self._count))

        wait_for(
            lambda: not missing() and self._folder.has(PROBE),
            lambda: f"the other shards (uncut MoE layers: {', '.join(map(str, missing()))})",
            self._folder,
        )

    def _stages(self) -> list[Stage]:
        mine = self._block.end - self._block.first
        cut = Stage("partition", mine, 4.0)
        if self._options.shard[0]:
            return [cut]
        share = sum(KNOTS) / 100 * 0.5
        return [
            cut,
            Stage("knots", self._count, 2.0 + share),
            Stage("write", len(self._checkpoint.shards), 0.5),
            Stage("evaluate", self._count, 0.13 * _STREAMS * 3),
        ]

    def _fit_knots(self) -> None:
        found = {n for n in range(self._count) if self._layers.has_knots(KNOTS, n)}

        def passed(number: int) -> None:
            self._progress.advance("knots", found=number in found)

        if len(found) == self._count:
            for number in range(self._count):
                passed(number)
            return
        ids = self._texts.calibration.ids[:, :-1]
        run_knots(self._model, ids, self._folder, self._layers, passed)

    def _write(self, places: dict[str, Places]) -> None:
        orders = {
            f"{name}.{expert}": order.long()
            for number, name in enumerate(self._checkpoint.layers)
            for expert, order in enumerate(self._layers.cut_of(number).permutations)
        }
        for shard in self._checkpoint.shards:
            there = (self._folder.artifact / shard.name).exists()
            if not there:
                write.write_shard(shard, places, orders, self._folder.artifact)
            self._progress.advance("write", found=there)
        write.copy_others(self._checkpoint, self._folder.artifact)

    def _evaluate(self, artifact: Artifact) -> Measured:
        model = StreamedModel(artifact.path, self._dtype, device())
        ids = self._texts.evaluation.ids

        def passed(number: int) -> None:
            self._progress.advance("evaluate")

        streams = run_levels(model, artifact, ids[:, :-1], self._folder, passed)
        limit = _SAME_LOGITS if self._dtype == torch.float32 else _SAME_LOGITS_16_BIT
        require_same(streams.probe, self._folder, limit)
        shape = self._sub_experts, self._hidden, self._width
        return measure_streams(model, ids, streams, shape)
