"""Quality as a decode batch is served: B sequences at one position are one batch, which reads the
union of what its tokens select.

Knows artifacts that run, and decode batches. The decision worth arguing about: sequences of one
batch lie as far apart in the text as they can, because requests that meet in a batch have nothing
to do with each other; neighbours in a text route alike and would read less. The whole sequence runs
at the level, its context too, so what is measured is the worst case of a conversation at it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from prism.artifact import OperatingPoint
from prism.batch_context import BatchContext, SelectionStats, batch_context
from prism.contract import MAX_LEVEL
from torch import Tensor

from prism_refactor import evaluate
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.evaluate import Sample
from prism_refactor.measure import Subject, open_subject
from prism_refactor.paired import compare, last_hidden
from prism_refactor.text import Windows
from prism_refactor.whole_experts import Form, Rule, Shared, TopK, deciding

_FORMS: Final[tuple[Form, ...]] = ("re-routed", "dropped")
_SEQUENCES: Final = 16  # per forward pass, unless one batch has more

Around = Callable[[Tensor, SelectionStats], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class ServedPoint:
    """What one way of serving decode batches of one size gave. Shares are 0-1."""

    method: str
    batch: int
    ride_along: bool
    computed_share: float  # of the triples (token, slot, sub-expert)
    bytes_share: float  # read, over those of the experts that the batch hits
    point: OperatingPoint  # at level 100 for the baselines, which have none
    level: int | None = None  # None: a baseline


@dataclass(slots=True)
class Run:
    """One way of running decode batches, and what it gave so far."""

    method: str
    level: int | None
    ride_along: bool
    around: Around
    stats: SelectionStats = field(default_factory=SelectionStats)
    samples: list[Sample] = field(default_factory=list)


def measure_served(
    directory: Path,
    data: Path,
    levels: Sequence[int],
    batches: Sequence[int],
    *,
    ride_along: bool,
    baselines: bool,
    tokens: int,
    dtype: str,
) -> list[ServedPoint]:
    """For each batch size one point per level, from high to low, then the baselines.

    Baselines: whole experts shared at the bytes of each level, and lower top-k. Raises
    ArtifactError and RefactorError; too few sequences for one batch is the latter.
    """
    subject = open_subject(directory, data, tokens=tokens, dtype=dtype)
    found: list[ServedPoint] = []
    for batch in batches:
        ours = run_batches(
            subject, batch, [level_run(level, ride_along) for level in sorted(levels, reverse=True)]
        )
        found += ours
        if baselines:
            shares = [point.bytes_share for point in ours if point.level != MAX_LEVEL]
            slots = subject.artifact.manifest.experts_per_token
            found += run_batches(subject, batch, baseline_runs(subject.model, slots, shares))
    return found


def level_run(level: int, ride_along: bool) -> Run:
    """Every token at ``level``."""
    return Run(f"level {level}", level, ride_along, partial(_at_level, level, ride_along))


def _at_level(
    level: int, ride_along: bool, groups: Tensor, stats: SelectionStats
) -> AbstractContextManager[None]:
    levels = torch.full((len(groups),), level, dtype=torch.int32)
    return batch_context(BatchContext(levels, stats, groups, ride_along))


def baseline_runs(model: Any, slots: int, shares: Sequence[float]) -> list[Run]:
    """Whole experts shared at each of ``shares`` of the bytes, and each k below ``slots``."""
    config = model.config.get_text_config()
    normalised = bool(getattr(config, "norm_topk_prob", False))
    rules: list[tuple[str, Rule]] = []
    for share in shares:
        for form in _FORMS:
            rules.append((f"experts shared, {100 * share:.0f} %, {form}", Shared(share, form)))
    for k in range(slots - 1, 0, -1):
        rules.append((f"top-{k}", TopK(k, normalised)))
    return [Run(name, None, False, partial(deciding, model, rule)) for name, rule in rules]


def run_batches(subject: Subject, batch: int, runs: Sequence[Run]) -> list[ServedPoint]:
    """All ``runs`` over the text in decode batches of one size; losses are paired with level 100.

    Raises RefactorError (TooLittleCalibrationText) where the text fills no batch.
    """
    ids = decode_batches(subject.windows.ids, batch)
    window = ids.shape[1] - 1
    full: list[Sample] = []
    for part in Windows(ids).batches(max(1, _SEQUENCES // batch) * batch):
        groups = group_numbers(len(part), window, batch)
        base = last_hidden(subject.model, part[:, :-1])
        reduced = []
        for run in runs:
            with run.around(groups, run.stats):
                reduced.append(last_hidden(subject.model, part[:, :-1]))
        samples = compare(subject.model, part, base, reduced)
        full.append(samples[0])
        for run, sample in zip(runs, samples[1:], strict=True):
            run.samples.append(sample)
    return [_point(subject, batch, run, evaluate.joined(full)) for run in runs]


def decode_batches(ids: Tensor, batch: int) -> Tensor:
    """Rows of ids [S, W + 1] so that each ``batch`` rows are one batch, far apart in the text.

    Rows that fill no batch are left out; raises RefactorError when there is not one batch.
    """
    count = len(ids) // batch
    if count == 0:
        raise RefactorError(
            Reason.TOO_LITTLE_TEXT,
            f"The text gives {len(ids)} sequences of {ids.shape[1] - 1} tokens where a batch of "
            f"{batch} needs {batch}; give more text or ask for more tokens.",
        )
    return ids[torch.arange(count * batch).view(batch, count).t().flatten()]


def group_numbers(sequences: int, window: int, batch: int) -> Tensor:
    """Decode batch of each token of ``sequences`` x ``window`` flattened; int64, all below T."""
    first = torch.arange(sequences) // batch * window  # [S]
    return (first.unsqueeze(1) + torch.arange(window)).flatten()


def _point(subject: Subject, batch: int, run: Run, base: Sample) -> ServedPoint:
    joined = evaluate.joined(run.samples)
    stats, n = run.stats, subject.artifact.manifest.sub_experts
    sample = replace(joined, own=stats.own, candidates=stats.candidates)
    level = MAX_LEVEL if run.level is None else run.level
    point = evaluate.operating_point(level, sample, base, n, subject.hidden, subject.width)
    computed = stats.computed / max(1, stats.candidates)
    read = stats.bytes_share(subject.width // n)
    return ServedPoint(run.method, batch, run.ride_along, computed, read, point, run.level)
