"""Ours with ride-along and whole experts shared, in decode batches, at the bytes that marks name.

Knows artifacts that run. The decision worth arguing about: the level that reads a given share of
the bytes is found by measuring bytes on a part of the text, not taken from the artifact's own
curves, which are a claim of the refactoring and not to be used against others.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from prism.contract import MIN_LEVEL
from prism_refactor.measure import Subject
from prism_refactor.paired import last_hidden
from prism_refactor.served import (
    Run,
    ServedPoint,
    decode_batches,
    group_numbers,
    level_run,
    run_batches,
)
from prism_refactor.text import Windows
from prism_refactor.whole_experts import Form, Shared, deciding

SHARED = "whole experts shared"
GRID = (75, 50, 25, 12)
_LOOK_WINDOWS = 64  # to find a level on
_MARGIN = 0.003  # of the bytes: the whole text may read a little more than the part


def serve(
    subject: Subject, targets: Mapping[int, Sequence[float]], told: Callable[[str], None]
) -> list[ServedPoint]:
    """For each batch size: ours at GRID and at the levels that read at most the targets' bytes, and
    whole experts shared at those bytes."""
    found: list[ServedPoint] = []
    for batch, shares in targets.items():
        levels = set(GRID)
        for share in shares:
            level = level_reading(subject, batch, share - _MARGIN)
            told(f"batch {batch}: level {level} reads at most {100 * share:.0f} % of the bytes")
            levels.add(level)
        ours = [level_run(level, True) for level in sorted(levels, reverse=True)]
        found += run_batches(subject, batch, [*ours, *_shared(subject, shares)])
    return found


def level_reading(subject: Subject, batch: int, share: float) -> int:
    """The highest level that reads at most `share` of the bytes, by bisection; or the lowest."""
    ids = decode_batches(subject.windows.ids, batch)
    part = Windows(ids[: max(batch, _LOOK_WINDOWS // batch * batch)])
    low, high = MIN_LEVEL, 100  # high reads too much
    while high - low > 1:
        middle = (low + high) // 2
        if _bytes_share(subject, batch, part, level_run(middle, True)) <= share:
            low = middle
        else:
            high = middle
    return low


def _bytes_share(subject: Subject, batch: int, part: Windows, run: Run) -> float:
    for ids in part.batches(max(1, 16 // batch) * batch):
        groups = group_numbers(len(ids), ids.shape[1] - 1, batch)
        with run.around(groups, run.stats):
            last_hidden(subject.model, ids[:, :-1])
    return run.stats.bytes_share(subject.width // subject.artifact.manifest.sub_experts)


def _shared(subject: Subject, shares: Sequence[float]) -> list[Run]:
    forms: tuple[Form, ...] = ("dropped", "masked", "re-routed")
    return [
        Run(f"{SHARED}, {form}", None, False, partial(deciding, subject.model, Shared(share, form)))
        for share in shares
        for form in forms
    ]
