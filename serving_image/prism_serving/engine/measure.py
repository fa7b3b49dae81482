"""Measure what steps cost on this machine, in the few seconds before the first request.

Knows: which shapes to run and how the cost model's numbers follow from them. Must not know:
requests, targets.

One decision worth arguing about: shapes are run through the very runner that serves, on random
tokens. Random text selects somewhat other sub-experts than real text; the online refinement
corrects that, and the ratio between levels, which the policy lives on, is right from the start.
The best of several runs counts, not the median: what the machine can do is the base, how busy it is
now is the cost model's `pace`.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Final

from prism.contract import MAX_LEVEL, PREFILL_LEVELS

from prism_serving.engine.costs import CostModel, Curve, pairs_of
from prism_serving.engine.policy import Wish
from prism_serving.engine.scheduler import Chunk, Running, StepPlan
from prism_serving.protocol import Sampling

ROWS: Final = (1, 4, 16, 64, 256, 512)
_DECODE_SEQUENCES: Final = 8
_REPEATS: Final = 8


@dataclass(frozen=True, slots=True)
class Measuring:
    """`run` computes a plan; sizes are bounded by `kv_tokens`, `max_context` and `budget`."""

    run: Callable[[StepPlan], object]
    vocab: int
    kv_tokens: int
    max_context: int
    budget: int
    seconds: float

    @property
    def longest(self) -> int:
        """Longest sequence that can be run."""
        return min(self.max_context, self.kv_tokens)

    def time_s(self, chunks: list[tuple[int, int, int]], level: int, repeats: int) -> float:
        """Best seconds of a step of (kv start, past, rows) chunks at `level`."""
        plan = StepPlan(tuple(self._chunk(*c, level) for c in chunks))
        return min(self._once_s(plan) for _ in range(repeats))

    def _once_s(self, plan: StepPlan) -> float:
        began = time.perf_counter()
        self.run(plan)
        return time.perf_counter() - began

    def _chunk(self, kv_start: int, past: int, rows: int, level: int) -> Chunk:
        draw = random.Random(kv_start * 7919 + past + rows)
        tokens = [draw.randrange(self.vocab) for _ in range(past + rows)]
        sequence = Running(
            "measure", tokens, past + rows, 1, Sampling(), Wish(), 0.0, past, kv_start
        )
        return Chunk(sequence, past, rows, level)


def measure(m: Measuring) -> CostModel:
    """Run the shapes and fit the model. Takes about `seconds`, at least one run of each level."""
    m.time_s([(0, 0, min(16, m.longest))], MAX_LEVEL, 2)  # warm up: allocator, thread pools
    sizes = _sizes(m)
    per_pair_s, per_key_s = _context_costs(m)
    best = _best_s(m, sizes, _repeats(m, sizes[-1]))
    curves = {
        level: Curve(
            sizes,
            tuple(
                max(_smooth_s(best, level, n) - per_pair_s * pairs_of(n, 0), 1e-6) for n in sizes
            ),
        )
        for level in PREFILL_LEVELS
    }
    return CostModel(
        curves, _sequence_cost_s(m, curves[MAX_LEVEL], per_key_s), per_pair_s, per_key_s
    )


def _best_s(m: Measuring, sizes: tuple[int, ...], repeats: int) -> dict[tuple[int, int], float]:
    """Best seconds per (level, rows). Levels take turns, so that a busy moment of the machine
    meets all of them and not the one that happened to be measured."""
    best: dict[tuple[int, int], float] = {}
    for _ in range(repeats):
        for n in sizes:
            for level in PREFILL_LEVELS:
                seconds = m.time_s([(0, 0, n)], level, 1)
                best[level, n] = min(best.get((level, n), seconds), seconds)
    return best


def _smooth_s(best: dict[tuple[int, int], float], level: int, rows: int) -> float:
    """Seconds of a step, the levels below 100 drawn onto one line in the level (least squares).

    What a level saves is proportional to the sub-experts it drops, so three noisy points make one
    good line; 100 runs no selection and stands for itself.
    """
    if level == MAX_LEVEL:
        return best[level, rows]
    levels = [x for x in PREFILL_LEVELS if x < MAX_LEVEL]
    slope, at_zero = linear_regression(levels, [best[x, rows] for x in levels])
    mean = at_zero + slope * fmean(levels)
    return mean + max(slope, 0.0) * (level - fmean(levels))


def _sizes(m: Measuring) -> tuple[int, ...]:
    """Sizes that fit and whose single run takes at most a small part of the time we have."""
    fitting = [n for n in ROWS if n <= min(m.longest, m.budget)]
    for i, n in enumerate(fitting[1:], start=1):
        if m.time_s([(0, 0, n)], MAX_LEVEL, 1) > m.seconds / 10:
            return tuple(fitting[: i + 1])
    return tuple(fitting)


def _repeats(m: Measuring, largest: int) -> int:
    once_s = m.time_s([(0, 0, largest)], MAX_LEVEL, 1)
    affordable = m.seconds / (once_s * len(PREFILL_LEVELS) * 2 + 1e-9)
    return max(1, min(_REPEATS, int(affordable)))


def _context_costs(m: Measuring) -> tuple[float, float]:
    """(seconds per query-key pair of prefill, per key read by decode), at level 100."""
    rows = min(256, m.longest // 2, m.budget)
    past = m.longest - rows if m.longest < 2 * rows + 256 else rows + 256
    if rows < 16:
        return 0.0, 0.0
    short, long = m.time_s([(0, 0, rows)], 100, 3), m.time_s([(0, past, rows)], 100, 3)
    per_pair_s = max(long - short, 0.0) / (rows * past)
    n = min(_DECODE_SEQUENCES, m.kv_tokens // m.longest)
    if n < 1:
        return per_pair_s, 0.0
    far = m.longest - 1
    decode = [[(i * m.longest, at, 1) for i in range(n)] for at in (1, far)]
    near_s, far_s = (m.time_s(chunks, 100, 3) for chunks in decode)
    return per_pair_s, max(far_s - near_s, 0.0) / (n * max(far - 1, 1))


def _sequence_cost_s(m: Measuring, curve: Curve, per_key_s: float) -> float:
    """What each sequence in a decode step costs beside its row: calls, lm_head."""
    n = min(16, m.kv_tokens // 4)
    if n < 2:
        return 0.0
    batch_s = m.time_s([(i * 4, 2, 1) for i in range(n)], MAX_LEVEL, 3)
    return max(batch_s - curve.at(n) - per_key_s * 3 * n, 0.0) / n
