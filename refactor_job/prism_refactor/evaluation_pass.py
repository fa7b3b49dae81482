"""The last pass: the written artifact at every level, and its baselines, layer by layer.

Knows streams and what answers for the experts in each; what losses mean is in evaluate. The
decision worth arguing about: what else a person could do (fewer whole experts for each token), and
what serving makes of a level (decode batches that ride along) run beside the levels as streams of
their own, on the same text; a report that lacks them would show half of the comparison. `make
bench-refactor` has the dearer baselines.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from prism.artifact import Artifact, OperatingPoint
from prism.batch_context import BatchContext, SelectionStats, batch_context
from prism.contract import MAX_LEVEL
from prism.expert_weights import add_down_bias
from prism.experts import LayerData, attach_layer, forward
from prism.streaming import StreamedModel
from torch import Tensor

from prism_refactor import evaluate
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.findings import Findings, Routed
from prism_refactor.options import (
    EVALUATION_LEVELS,
    SERVED_BATCHES,
    SERVED_LEVELS,
    TOP_K_SHARES,
    WINDOW,
)
from prism_refactor.stages import PROBE, PROBE_WINDOWS
from prism_refactor.store import PartialFolder
from prism_refactor.sweep import Answer, KeptStreams, plain, sweep
from prism_refactor.whole_experts import Routing, TopK

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Streams:
    """The written artifact: last hidden states of each stream, and what was selected."""

    hidden: dict[str, Tensor]  # stream -> [S, W, H]
    own: dict[str, tuple[int, int]]  # stream -> (own sub-experts, candidates)
    read: dict[str, tuple[float, float]]  # stream in batches -> shares of (bytes, compute)
    top_k: tuple[int, ...]  # the baselines among the streams
    probe: Tensor  # logits of the artifact as a stock checkpoint


@dataclass(frozen=True, slots=True)
class Measured:
    """Quality on held-out text."""

    points: tuple[OperatingPoint, ...]  # from high to low level
    top_k: dict[int, OperatingPoint]  # k -> that many whole experts for each token; no overhead
    served: dict[int, dict[str, list[float]]]  # level -> curves in decode batches (manifest)


def fewer_experts(slots: int) -> tuple[int, ...]:
    """The numbers of experts per token, below the model's own, that are measured as baselines."""
    return tuple(sorted({max(1, round(share * slots)) for share in TOP_K_SHARES} - {slots}))[::-1]


def run_levels(
    model: StreamedModel,
    artifact: Artifact,
    ids: Tensor,
    folder: PartialFolder,
    passed: Callable[[int], None],
) -> Streams:
    """Run the artifact, loaded as ``model``, on held-out ids [S, W], all streams side by side."""
    smaller = fewer_experts(artifact.manifest.experts_per_token)
    ways = [Way(level) for level in EVALUATION_LEVELS]
    ways += [Way(x, batch) for batch in _batches(len(ids)) for x in SERVED_LEVELS]
    names = [way.name for way in ways] + [_top(k) for k in smaller]
    batches = {PROBE: model.batch(ids[:PROBE_WINDOWS]), **dict.fromkeys(names, model.batch(ids))}
    renormalise = bool(getattr(model.model.config.get_text_config(), "norm_topk_prob", False))
    findings = Findings(folder)

    def answers(number: int, module: Any) -> Mapping[str, Answer]:
        def at(way: Way) -> Answer:
            def answer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
                if not hasattr(module, "_prism"):  # the probe has passed: now it may be packed
                    attach_layer(module, artifact, number)
                stats = SelectionStats()
                rows = torch.full((len(x),), way.level, dtype=torch.int32, device=x.device)
                groups = way.groups(len(ids), ids.shape[1], x.device)
                with batch_context(BatchContext(rows, stats, groups)):
                    out = forward(module, x, index, weights)
                if way.batch == 1:
                    routed = Routed(x, index, weights)
                    findings.note_level(way.level, number, module._prism, routed, out)
                width = module._prism.packed.width
                read = stats.bytes_share(width) if way.batch > 1 else 0.0
                kept = [stats.own, stats.candidates, stats.computed, read]
                counts = torch.tensor(kept, dtype=torch.float64)
                folder.save(_counts(way.name, number), {"counts": counts})
                return out

            return answer

        return {
            PROBE: plain(module),
            **{way.name: at(way) for way in ways},
            **{_top(k): _fewer(module, TopK(k, renormalise)) for k in smaller},
        }

    hidden = sweep(model, batches, answers, KeptStreams(folder, "hidden-levels"), passed=passed)
    own = {_top(k): (k, artifact.manifest.experts_per_token) for k in smaller}
    read = {}
    for way in ways:
        kept = [folder.load(_counts(way.name, number)) for number in range(len(model.moe))]
        counts = torch.stack([counts["counts"] for counts in kept if counts])
        total = counts.sum(0)
        own[way.name] = (int(total[0]), int(total[1]))
        if way.batch > 1:
            read[way.name] = (float(counts[:, 3].mean()), float(total[2] / total[1]))
    probe = model.logits(batches[PROBE].ids, hidden.pop(PROBE))
    return Streams(hidden, own, read, smaller, probe)


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running the artifact: every token alone, or in decode batches that ride along."""

    level: int
    batch: int = 1

    @property
    def name(self) -> str:
        return str(self.level) if self.batch == 1 else f"{self.level} in {self.batch}"

    def groups(self, sequences: int, window: int, device: torch.device) -> Tensor | None:
        """Decode batch of each token of [S, W] flattened: sequences that lie far apart in the text
        meet at each position. Those that fill no batch make smaller ones."""
        if self.batch == 1:
            return None
        count = -(-sequences // self.batch)
        group = torch.arange(sequences, device=device) % count * window
        return (group.unsqueeze(1) + torch.arange(window, device=device)).flatten()


def _batches(sequences: int) -> list[int]:
    """Sizes of decode batches that are measured: a short text fills none of the larger ones."""
    return sorted({min(batch, sequences) for batch in SERVED_BATCHES} - {1})


def _fewer(module: Any, rule: TopK) -> Answer:
    """Whole experts, of which each token uses its heaviest, as its router would weigh them."""

    def answer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        data: LayerData = module._prism  # the levels have passed: it is packed
        packed = data.packed
        _, kept = rule(Routing(index, weights.float(), None, index[:, 0], packed.experts))
        state = (kept > 0).to(torch.uint8).unsqueeze(-1).repeat(1, 1, packed.sub_experts)
        out: Tensor = data.kernel.forward(packed, x, index, kept, state)
        if data.down_bias is not None:
            add_down_bias(out, index, kept, data.down_bias)
        return out

    return answer


def measure_streams(
    model: StreamedModel, ids: Tensor, streams: Streams, shape: tuple[int, int, int]
) -> Measured:
    """Losses of all streams, paired with level 100; ids [S, W + 1].

    ``shape``: sub-experts, hidden size, neurons of an expert.
    """
    vocabulary = int(model.model.get_output_embeddings().weight.shape[0])
    rows = evaluate.batch_sequences(WINDOW, vocabulary)
    full = str(MAX_LEVEL)
    found = evaluate.compare_streams(model.logits, ids, streams.hidden, streams.own, rows, full)
    ways = [Way(level, batch) for level in SERVED_LEVELS for batch in _batches(len(ids))]

    def point(way: Way) -> OperatingPoint:
        return evaluate.operating_point(way.level, found[way.name], found[full], *shape)

    return Measured(
        points=tuple(point(Way(level)) for level in EVALUATION_LEVELS),
        top_k={
            k: evaluate.operating_point(MAX_LEVEL, found[_top(k)], found[full], *shape)
            for k in streams.top_k
        },
        served={
            level: _curves(
                [(way, streams.read[way.name], point(way)) for way in ways if way.level == level]
            )
            for level in SERVED_LEVELS
        },
    )


def _curves(
    rows: Sequence[tuple[Way, tuple[float, float], OperatingPoint]],
) -> dict[str, list[float]]:
    """One entry per batch size, by the names that the manifest tells."""
    return {
        "measured_batch": [float(way.batch) for way, _, _ in rows],
        "measured_bytes_share": [read for _, (read, _), _ in rows],
        "measured_computed_share": [computed for _, (_, computed), _ in rows],
        "measured_loss_percent": [point.quality_loss_percent for _, _, point in rows],
        "measured_loss_se": [point.quality_loss_se for _, _, point in rows],
        "measured_kl": [point.kl for _, _, point in rows],
    }


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


def _top(k: int) -> str:
    return f"top-{k}"


def _counts(stream: str, number: int) -> str:
    return f"counts-{stream.replace(' ', '-')}-{number:03d}"
