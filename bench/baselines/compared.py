"""Many ways of running one model, measured on the same tokens.

Knows hidden states and losses. The decision worth arguing about: batches of text are the outer loop
and methods the inner one, so the original model's logits are computed once for all of them and all
differences are paired, token by token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from prism.batch_context import (
    BatchContext,
    SelectionStats,
    batch_context,
    slice_overhead,
)
from prism.contract import MAX_LEVEL
from prism_refactor.evaluate import Sample
from prism_refactor.measure import Subject
from prism_refactor.paired import compare, last_hidden
from prism_refactor.text import Windows
from torch import Tensor

from bench.baselines.original import Method, Original

_SEQUENCES = 16


class Shares(NamedTuple):
    """Of the experts' parameters: computed, the same with what chooses them, and bytes read by one
    token over those of bf16 weights (None: not counted)."""

    own: float
    active: float
    read: float | None = None


@dataclass(slots=True)
class Entry:
    """One operating point to measure; `shares` may be asked after all text has passed.

    every: measured on each that many batches of text only; bounds that nobody can run need no more.
    """

    method: str
    asked: float
    hidden: Callable[[Tensor], Tensor]  # ids [S, W] -> [S, W, H]
    shares: Callable[[], Shares]
    every: int = 1
    found: list[Sample] = field(default_factory=list)  # their losses are differences to the model's


@dataclass(frozen=True, slots=True)
class Row:
    """What an entry gave; shares 0-1, loss and its standard error in percent of perplexity."""

    method: str
    asked: float
    own_share: float
    active_share: float
    loss: float
    se: float
    kl: float
    top1: float
    bytes_share: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """Two neighbouring levels: how much the lower one loses over the higher, paired, in percent."""

    high: float
    low: float
    difference: float
    se: float


def of_method(original: Original, method: Method, bytes_share: float | None = None) -> Entry:
    """A fitted baseline."""
    held = original.weights[0]

    def shares() -> Shares:
        own = method.tally.share
        return Shares(own, own + method.extra(held.hidden, held.intermediate), bytes_share)

    def hidden(ids: Tensor) -> Tensor:
        return original.hidden(ids, method.answer)

    return Entry(method.name, method.asked, hidden, shares)


def of_level(subject: Subject, name: str, level: int) -> Entry:
    """An artifact at one level, each token alone."""
    stats = SelectionStats()

    def shares() -> Shares:
        own = stats.own / max(1, stats.candidates)
        if level == MAX_LEVEL:
            return Shares(own, own, own)
        n, hidden = subject.artifact.manifest.sub_experts, subject.hidden
        extra = n * (hidden + 1 + (1 - own) * hidden) / (3 * hidden * subject.width)
        read = own + slice_overhead(subject.width // n) * (2 - own)
        return Shares(own, own + extra, read)

    def hidden(ids: Tensor) -> Tensor:
        levels = torch.full((ids.numel(),), level, dtype=torch.int32)
        with batch_context(BatchContext(levels, stats)):
            return last_hidden(subject.model, ids)

    return Entry(name, level / 100, hidden, shares)


def measure(
    original: Original, windows: Tensor, entries: Sequence[Entry], told: Callable[[float], None]
) -> tuple[float, list[Row]]:
    """(the original's mean loss, one row per entry) on windows [S, W + 1]; `told` hears how far."""
    losses: list[Tensor] = []
    mixed = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    batches = Windows(windows[mixed]).batches(_SEQUENCES)  # each a sample of all of the text
    for number, ids in enumerate(batches, start=1):
        due = [entry for entry in entries if (number - 1) % entry.every == 0]
        full = original.hidden(ids[:, :-1])
        runs = [entry.hidden(ids[:, :-1]) for entry in due]
        base, *samples = compare(original.model, ids, full, runs)
        losses.append(base.loss)
        for entry, sample in zip(due, samples, strict=True):
            entry.found.append(replace(sample, loss=sample.loss - base.loss))
        told(number / len(batches))
    return float(torch.cat(losses).double().mean()), [_row(entry) for entry in entries]


def steps(entries: Sequence[Entry]) -> list[Step]:
    """Differences between neighbours of one method's entries, which go from high to low level."""
    found = []
    for high, low in pairwise(entries):
        before, after = (_differences(entry) for entry in (high, low))
        mean, se = loss_percent(after - before)
        found.append(Step(high.asked, low.asked, mean, se))
    return found


def loss_percent(difference: Tensor) -> tuple[float, float]:
    """(100 (exp(mean) - 1), its standard error) of paired differences of loss."""
    mean = float(difference.mean())
    error = float(difference.std()) / math.sqrt(len(difference))
    return 100 * math.expm1(mean), 100 * math.exp(mean) * error


def _differences(entry: Entry) -> Tensor:
    """float64 [t]: loss minus that of the full model."""
    return torch.cat([sample.loss for sample in entry.found]).double()


def _row(entry: Entry) -> Row:
    loss, se = loss_percent(_differences(entry))
    own, active, read = entry.shares()
    kl = float(torch.cat([sample.kl for sample in entry.found]).double().mean())
    top1 = float(torch.cat([sample.agrees for sample in entry.found]).double().mean())
    return Row(entry.method, entry.asked, own, active, loss, se, kl, top1, read)
