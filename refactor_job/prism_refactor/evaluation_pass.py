"""The last pass: the written artifact at every level, and its baselines, layer by layer.

Knows streams and what answers for the experts in each; what losses mean is in evaluate. The
decision worth arguing about: fewer whole experts for each token run beside the levels as streams of
their own, on the same text. It is what a person could do without us, so a report that lacks it
would show half of the comparison. `make bench-refactor` has the dearer baselines.
"""

import logging
from collections.abc import Callable, Mapping
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
from prism_refactor.options import EVALUATION_LEVELS, TOP_K_SHARES, WINDOW
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
    top_k: tuple[int, ...]  # the baselines among the streams
    probe: Tensor  # logits of the artifact as a stock checkpoint


@dataclass(frozen=True, slots=True)
class Measured:
    """Quality on held-out text."""

    points: tuple[OperatingPoint, ...]  # from high to low level
    top_k: dict[int, OperatingPoint]  # k -> that many whole experts for each token; no overhead


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
    names = [str(level) for level in EVALUATION_LEVELS] + [_top(k) for k in smaller]
    batches = {PROBE: model.batch(ids[:PROBE_WINDOWS]), **dict.fromkeys(names, model.batch(ids))}
    renormalise = bool(getattr(model.model.config.get_text_config(), "norm_topk_prob", False))
    findings = Findings(folder)

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
                findings.note_level(level, number, module._prism, Routed(x, index, weights), out)
                return out

            return answer

        return {
            PROBE: plain(module),
            **{str(level): at(level) for level in EVALUATION_LEVELS},
            **{_top(k): _fewer(module, TopK(k, renormalise)) for k in smaller},
        }

    hidden = sweep(model, batches, answers, KeptStreams(folder, "hidden-levels"), passed=passed)
    own = {_top(k): (k, artifact.manifest.experts_per_token) for k in smaller}
    for level in EVALUATION_LEVELS:
        kept = [folder.load(_counts(level, number)) for number in range(len(model.moe))]
        total = torch.stack([counts["counts"] for counts in kept if counts]).sum(0)
        own[str(level)] = (int(total[0]), int(total[1]))
    probe = model.logits(batches[PROBE].ids, hidden.pop(PROBE))
    return Streams(hidden, own, smaller, probe)


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
    return Measured(
        points=tuple(
            evaluate.operating_point(level, found[str(level)], found[full], *shape)
            for level in EVALUATION_LEVELS
        ),
        top_k={
            k: evaluate.operating_point(MAX_LEVEL, found[_top(k)], found[full], *shape)
            for k in streams.top_k
        },
    )


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


def _counts(level: int, number: int) -> str:
    return f"counts-{level:03d}-{number:03d}"
