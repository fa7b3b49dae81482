"""The whole refactoring, stage after stage; each stage leaves files, so the next run goes on from
there.

Knows the order of stages and what each hands to the next; numerics, files and messages live in
their own modules. The decision worth arguing about: evaluation loads the written artifact and runs
what serving runs, so the numbers in the manifest describe the files on disk, and a writer's mistake
cannot go unseen.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from prism import artifact as artifacts
from prism.artifact import (
    Artifact,
    Calibration,
    Knot,
    LayerTensors,
    Manifest,
    OperatingPoint,
    Source,
)
from prism.checkpoint import BlockEntries
from prism.contract import MAX_LEVEL, PRISM_SUBFOLDER, REPORT_FILE
from prism.experts import attach, find_expert_modules
from prism.loading import load_model
from torch import Tensor

from prism_refactor import evaluate, report, request, text, write
from prism_refactor.calibrate import run_layers
from prism_refactor.cut import Cut, CutVisitor
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.layer_experts import permute_neurons, weight
from prism_refactor.machine import compute_dtype
from prism_refactor.options import (
    EVALUATION_LEVELS,
    EVALUATION_TOKENS,
    KNOT_STRIDE,
    KNOTS,
    METHODS,
    MIN_CALIBRATION_TOKENS,
    MIN_EVALUATION_TOKENS,
    WINDOW,
    Options,
)
from prism_refactor.progress import Progress, Stage
from prism_refactor.reduce import LayerKnot, ReduceVisitor, batch_curves
from prism_refactor.source import Checkpoint, open_source, require_divisible
from prism_refactor.store import KeptHidden, PartialFolder, write_atomically

_log = logging.getLogger(__name__)
_SAME_LOGITS: Final = 1e-4  # share of the largest logit, in fp32
_SAME_LOGITS_16_BIT: Final = 0.2  # share of the largest logit: other orders of summation round
_SPACE_MARGIN: Final = 1.1

Stages = Callable[[list[Stage]], Progress]


@dataclass(frozen=True, slots=True)
class Text:
    """Windows to fit on and to measure on, and what identifies them."""

    calibration: text.Windows
    evaluation: text.Windows
    record: Calibration


def refactor(options: Options, progress_of: Stages) -> Artifact:
    """Make, continue or confirm the artifact at ``options.out``.

    Raises RefactorError; OSError and MemoryError pass through (see errors.from_exception).
    """
    torch.manual_seed(options.seed)
    request.require_place(options)
    checkpoint = open_source(options.source, options.source_uri, options.source_wait_s)
    corpus = text.read_corpus(options.calibration)
    files = checkpoint.digests()
    folder = PartialFolder(options.out)
    if options.out.exists():
        return request.confirm(options, files, corpus.digest, folder)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    key = request.key_of(options, files, corpus.digest)
    with folder.locked(key):
        done = _Run(options, checkpoint, files, folder, progress_of).run(corpus)
        folder.publish()
    return Artifact(options.out, done.manifest, done.digest)


class _Run:
    """One run over the stages, resuming what ``folder`` holds."""

    def __init__(
        self,
        options: Options,
        checkpoint: Checkpoint,
        files: dict[str, str],
        folder: PartialFolder,
        progress_of: Stages,
    ) -> None:
        self._options = options
        self._checkpoint = checkpoint
        self._files = files
        self._folder = folder
        self._progress_of = progress_of
        self._layers = len(checkpoint.layers)

    def run(self, corpus: text.Corpus) -> Artifact:
        """All stages; the finished artifact still lies in the partial folder."""
        dtype = compute_dtype(self._checkpoint)
        model, tokenizer = load_model(self._checkpoint.path, dtype)
        texts = self._texts(corpus, tokenizer)
        experts = find_expert_modules(model)[0][1]
        count, hidden, width = weight(experts, "down_proj").shape
        require_divisible(self._checkpoint, self._options.sub_experts, width)
        places = write.blocks(self._checkpoint, count)
        self._require_space(texts, hidden, count)
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self._batches = texts.evaluation.batches(evaluate.batch_sequences(WINDOW, vocabulary))
        self._progress = self._progress_of(self._stages())
        probe = self._probe(model, texts)
        self._cut(model, texts)
        self._reduce(model, texts)
        del model
        self._write(places)
        self._write_prism(places, texts, ())
        points = self._evaluate(dtype, probe, (hidden, width))
        return self._write_prism(places, texts, points)

    def _stages(self) -> list[Stage]:
        levels = len(EVALUATION_LEVELS)
        return [
            Stage("partition", self._layers, 4.0),
            *(Stage(f"level {level}", self._layers, 1.0) for level in KNOTS),
            Stage("write", len(self._checkpoint.shards), 0.5),
            Stage("evaluate", len(self._batches), 0.13 * levels * self._layers),
        ]

    def _texts(self, corpus: text.Corpus, tokenizer: Any) -> Text:
        def encode(document: str) -> list[int]:
            ids: list[int] = tokenizer(document, add_special_tokens=False).input_ids
            return ids

        calibration, evaluation = text.split(corpus)
        end = tokenizer.eos_token_id
        fit = text.windows(calibration, encode, end, self._options.tokens, MIN_CALIBRATION_TOKENS)
        held = text.windows(evaluation, encode, end, EVALUATION_TOKENS, MIN_EVALUATION_TOKENS)
        _log.info(
            "text: %s, split by document: %d tokens to calibrate on, %d others to measure on",
            *(corpus.name, fit.tokens, held.tokens),
        )
        return Text(fit, held, Calibration(corpus.name, corpus.digest, fit.tokens))

    def _require_space(self, texts: Text, hidden: int, experts: int) -> None:
        """Raise RefactorError (NoSpaceLeft) before the work rather than in the middle of it."""
        fitted = self._layers * experts * self._options.sub_experts * hidden * 4
        needed = _SPACE_MARGIN * (
            self._checkpoint.size_bytes
            + 2 * fitted * (1 + len(KNOTS))
            + 2 * texts.calibration.tokens * hidden * 4
        )
        there = sum(f.stat().st_size for f in self._folder.path.rglob("*") if f.is_file())
        free = shutil.disk_usage(self._folder.path).free
        if free + there < needed:
            raise RefactorError(
                Reason.NO_SPACE_LEFT,
                f"{self._folder.path.parent} has {free / 1e9:.2f} GB free where the refactoring "
                f"needs {(needed - there) / 1e9:.2f} GB; enlarge the volume or free space.",
            )

    def _probe(self, model: Any, texts: Text) -> Tensor:
        """Logits of the original model on two held-out windows, to hold the written one against."""
        with torch.inference_mode():
            logits: Tensor = model(texts.evaluation.ids[:2, :-1], use_cache=False).logits.float()
        return logits

    def _cut(self, model: Any, texts: Text) -> None:
        def save(layer: int, cut: Cut) -> None:
            self._folder.save(f"cut-{layer:03d}", cut.tensors())
            self._progress.advance("partition")

        states = KeptHidden(self._folder, "hidden-cut", self._layers)
        self._count_found("partition", "cut-{:03d}")
        options = self._options
        workers = max(1, torch.get_num_threads())
        visitor = CutVisitor(
            options.sub_experts, options.seed, workers, self._layers, self._kept_cut, save
        )
        run_layers(model, texts.calibration.ids[:, :-1], visitor, states)
        for layer, (_, module) in enumerate(find_expert_modules(model)):
            permute_neurons(module, self._cut_of(layer).permutations.long())

    def _reduce(self, model: Any, texts: Text) -> None:
        for level in KNOTS:

            def load(layer: int, level: int = level) -> LayerKnot | None:
                kept = self._folder.load(_knot_name(level, layer))
                return LayerKnot(**kept) if kept else None

            def save(layer: int, knot: LayerKnot, level: int = level) -> None:
                self._folder.save(_knot_name(level, layer), knot.tensors())
                self._progress.advance(f"level {level}")

            self._count_found(f"level {level}", f"knot-{level:03d}-{{:03d}}")
            states = KeptHidden(self._folder, f"hidden-{level:03d}", self._layers)
            visitor = ReduceVisitor(level, WINDOW, self._layers, self._cut_of, load, save)
            run_layers(model, texts.calibration.ids[::KNOT_STRIDE, :-1], visitor, states)

    def _count_found(self, stage: str, pattern: str) -> None:
        for layer in range(self._layers):
            if (self._folder.work / f"{pattern.format(layer)}.safetensors").exists():
                self._progress.advance(stage, found=True)

    def _kept_cut(self, layer: int) -> Cut | None:
        kept = self._folder.load(f"cut-{layer:03d}")
        return Cut(**kept) if kept else None

    def _cut_of(self, layer: int) -> Cut:
        cut = self._kept_cut(layer)
        assert cut is not None, f"layer {layer} has no partition"
        return cut

    def _knot_of(self, level: int, layer: int) -> LayerKnot:
        kept = self._folder.load(_knot_name(level, layer))
        assert kept is not None, f"layer {layer} has no knot at {level}"
        return LayerKnot(**kept)

    def _write(self, places: dict[str, BlockEntries]) -> None:
        orders = {
            f"{name}.{expert}": order.long()
            for layer, name in enumerate(self._checkpoint.layers)
            for expert, order in enumerate(self._cut_of(layer).permutations)
        }
        for shard in self._checkpoint.shards:
            there = (self._folder.artifact / shard.name).exists()
            if not there:
                write.write_shard(shard, places, orders, self._folder.artifact)
            self._progress.advance("write", found=there)
        write.copy_others(self._checkpoint, self._folder.artifact)

    def _write_prism(
        self,
        places: dict[str, BlockEntries],
        texts: Text,
        points: tuple[OperatingPoint, ...],
    ) -> Artifact:
        checkpoint, options = self._checkpoint, self._options
        config = checkpoint.config.get_text_config()
        knots = [[self._knot_of(level, layer) for layer in range(self._layers)] for level in KNOTS]
        cuts = [self._cut_of(layer) for layer in range(self._layers)]
        experts, sub_experts = cuts[0].router_bias.shape
        manifest = Manifest(
            schema_version=artifacts.SCHEMA_VERSION,
            source=Source(checkpoint.uri, checkpoint.revision, self._files),
            architecture=(checkpoint.config.architectures or [type(config).__name__])[0],
            model_type=checkpoint.config.model_type,
            sub_experts=sub_experts,
            num_experts=experts,
            experts_per_token=int(config.num_experts_per_tok),
            layers=checkpoint.layers,
            seed=options.seed,
            calibration=texts.record,
            knots=tuple(
                Knot(level, tuple(float(knot.log_theta) for knot in row))
                for level, row in zip(KNOTS, knots, strict=True)
            ),
            operating_points=points,
            batch_curves=batch_curves(knots, cuts[0].permutations.shape[1] // sub_experts),
            methods=METHODS | {"tokens_asked": str(options.tokens)},
            block_digests=write.digests(checkpoint, places, self._folder.artifact),
        )
        layers = [
            LayerTensors(
                cut.router_weight,
                cut.router_bias,
                torch.stack([row[layer].means for row in knots]),
                torch.stack([row[layer].scalars for row in knots]),
                cut.usage,
            )
            for layer, cut in enumerate(cuts)
        ]
        artifacts.write_prism_folder(self._folder.artifact, manifest, layers)
        page = self._folder.artifact / PRISM_SUBFOLDER / REPORT_FILE
        write_atomically(page, report.render(manifest).encode())
        return artifacts.open_artifact(self._folder.artifact)

    def _evaluate(
        self, dtype: torch.dtype, probe: Tensor, shape: tuple[int, int]
    ) -> tuple[OperatingPoint, ...]:
        artifact = artifacts.open_artifact(self._folder.artifact)
        model, _ = load_model(artifact.path, dtype)
        self._require_same(model, probe)
        attach(model, artifact)
        samples: dict[int, list[evaluate.Sample]] = {level: [] for level in EVALUATION_LEVELS}
        for number, ids in enumerate(self._batches):
            name = f"evaluation-{number:04d}"
            kept = self._folder.load(name)
            if kept is None:
                measured = evaluate.evaluate_batch(model, ids, EVALUATION_LEVELS)
                self._folder.save(name, evaluate.packed(measured))
            else:
                measured = evaluate.unpacked(kept)
            for level, sample in measured.items():
                samples[level].append(sample)
            self._progress.advance("evaluate", found=kept is not None)
        merged = {level: evaluate.joined(found) for level, found in samples.items()}
        sub_experts = self._options.sub_experts
        return tuple(
            evaluate.operating_point(level, merged[level], merged[MAX_LEVEL], sub_experts, *shape)
            for level in EVALUATION_LEVELS
        )

    def _require_same(self, model: Any, probe: Tensor) -> None:
        """The written checkpoint, loaded plainly, must compute what the source computes."""
        with torch.inference_mode():
            logits = model(self._batches[0][: len(probe), :-1], use_cache=False).logits.float()
        difference = float((logits - probe).abs().max())
        scale = max(1.0, float(probe.abs().max()))
        limit = _SAME_LOGITS if model.dtype == torch.float32 else _SAME_LOGITS_16_BIT
        _log.info("written checkpoint against source: logits differ by at most %.1e", difference)
        if difference > limit * scale:
            raise RefactorError(
                Reason.INTERNAL_ERROR,
                f"The permuted checkpoint differs from its source (logits by {difference:.3g}); "
                "this is a defect in Prism, please report the architecture.",
            )


def _knot_name(level: int, layer: int) -> str:
    return f"knot-{level:03d}-{layer:03d}"
