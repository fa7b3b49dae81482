"""Quality at a level, measured on held-out text with what serving runs.

Knows logits and levels. Losses are paired: the same tokens at the level and at 100, so the standard
error is that of the difference. The decision worth arguing about: batches are the outer loop and
levels the inner one, so full-level logits of one small batch are all that is ever kept, whatever
the vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from prism.artifact import OperatingPoint
from prism.contract import MAX_LEVEL
from prism.experts import BatchContext, SelectionStats, batch_context
from torch import Tensor
from torch.nn import functional

_LOGIT_BYTES: Final = 128 << 20  # of one batch's fp32 logits
_MOST_SEQUENCES: Final = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """Per-token results at one level; fp32 [t], and counts of sub-experts."""

    loss: Tensor  # negative log likelihood of the next token
    kl: Tensor  # KL(full || level) over the next token's distribution
    agrees: Tensor  # 1 where the most likely token is that of level 100
    own: int
    candidates: int


def batch_sequences(window: int, vocabulary: int) -> int:
    """Sequences per batch so that logits stay below a fixed size."""
    return max(1, min(_MOST_SEQUENCES, _LOGIT_BYTES // (window * vocabulary * 4)))


def evaluate_batch(model: Any, ids: Tensor, levels: Sequence[int]) -> dict[int, Sample]:
    """One Sample per level for ids [S, W + 1]; ``model`` has its experts attached.

    Level 100 is always in the result: it is what the others are compared with.
    """
    target = ids[:, 1:].reshape(-1)
    full, own, candidates = _log_probabilities(model, ids, MAX_LEVEL)
    samples = {MAX_LEVEL: compared(full, full, target, own, candidates)}
    for level in levels:
        if level != MAX_LEVEL:
            reduced, own, candidates = _log_probabilities(model, ids, level)
            samples[level] = compared(full, reduced, target, own, candidates)
    return samples


def compared(full: Tensor, reduced: Tensor, target: Tensor, own: int, candidates: int) -> Sample:
    """A Sample of log-probabilities [t, V] beside those of level 100; target [t] token ids."""
    return Sample(
        loss=-reduced.gather(1, target[:, None]).squeeze(1),
        kl=(full.exp() * (full - reduced)).sum(-1),
        agrees=(reduced.argmax(-1) == full.argmax(-1)).float(),
        own=own,
        candidates=candidates,
    )


def compare_streams(
    logits: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    hidden: Mapping[str, Tensor],
    counts: Mapping[str, tuple[int, int]],
    rows: int,
    base: str,
) -> dict[str, Sample]:
    """One Sample per stream of last hidden states [S, W, H], beside ``base``; ids [S, W + 1].

    ``logits`` (ids, hidden) -> [s, W, V] is asked for ``rows`` sequences at a time; ``counts`` are
    (own, candidates) over all of them.
    """
    found: dict[str, list[Sample]] = {name: [] for name in hidden}
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        target = part[:, 1:].reshape(-1)

        def log_probabilities(name: str, start: int = start, part: Tensor = part) -> Tensor:
            raw = logits(part[:, :-1], hidden[name][start : start + rows])
            return functional.log_softmax(raw.float().flatten(0, 1), dim=-1).cpu()

        full = log_probabilities(base)
        for name in hidden:
            reduced = full if name == base else log_probabilities(name)
            found[name].append(compared(full, reduced, target, 0, 0))
    return {
        name: replace(joined(samples), own=counts[name][0], candidates=counts[name][1])
        for name, samples in found.items()
    }


def _log_probabilities(model: Any, ids: Tensor, level: int) -> tuple[Tensor, int, int]:
    """(log-probabilities [t, V] fp32, own sub-experts, candidates) of ids [S, W + 1] at a level."""
    inputs = ids[:, :-1]
    stats = SelectionStats()
    levels = torch.full((inputs.numel(),), level, dtype=torch.int32)
    with torch.inference_mode(), batch_context(BatchContext(levels, stats)):
        logits = model(input_ids=inputs, use_cache=False).logits
        flat = functional.log_softmax(logits.float().flatten(0, 1), dim=-1)
    return flat, stats.own, stats.candidates


def joined(samples: Sequence[Sample]) -> Sample:
    """Samples of several batches as one."""
    return Sample(
        torch.cat([sample.loss for sample in samples]),
        torch.cat([sample.kl for sample in samples]),
        torch.cat([sample.agrees for sample in samples]),
        sum(sample.own for sample in samples),
        sum(sample.candidates for sample in samples),
    )


def operating_point(
    level: int, sample: Sample, base: Sample, sub_experts: int, hidden: int, width: int
) -> OperatingPoint:
    """What ``sample`` says of ``level`` beside the full-level ``base``; experts [width, hidden].

    Loss in percent is 100 (exp(mean difference) - 1), its error by the delta method. The active
    share adds the sub-router (N (H + 1)) and the means read for dropped sub-experts (N H each) to
    the parameters of an expert (3 H I).
    """
    own = sample.own / max(1, sample.candidates)
    difference = (sample.loss - base.loss).double()
    mean = float(difference.mean())
    extra = 0.0
    if level != MAX_LEVEL:
        extra = sub_experts * (hidden + 1 + (1 - own) * hidden) / (3 * hidden * width)
    agreement = float(sample.agrees.double().mean())
    return OperatingPoint(
        level=level,
        own_share=own,
        active_share=own + extra,
        perplexity=math.exp(float(sample.loss.double().mean())),
        quality_loss_percent=100 * math.expm1(mean),
        quality_loss_se=100 * math.exp(mean) * _standard_error(difference),
        kl=float(sample.kl.double().mean()),
        kl_se=_standard_error(sample.kl.double()),
        top1_agreement=agreement,
        top1_se=math.sqrt(agreement * (1 - agreement) / len(sample.agrees)),
    )


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
