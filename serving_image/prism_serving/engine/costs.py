"""What a step costs: seconds per level, measured at start and refined while serving.

Knows: the model below and its updates. Must not know: torch, the queue, the targets.

    step = rows(T) + sequence * S + pair * P + key * C

T rows (tokens) in the step, S sequences, P query-key pairs of prefill, C keys read by decode. The
rows of several levels in one step cost their share of each level's curve: measured, mixing is
cheaper than splitting, and the curve depends on T (weights are read once per step), not on phase.

Refinement: one `pace` for the whole machine follows the ratio observed/predicted fast (a noisy
neighbour slows every level alike), one factor per level follows the remainder slowly. So a level
not served for an hour still feels that the machine got slower.

One decision worth arguing about: curves are piecewise linear through measured points, not a fitted
formula. No formula held from 1 to 512 rows on both a small and a large model; points always do.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from prism import contract

_PACE_RATE: Final = 0.1
_LEVEL_RATE: Final = 0.01
_PACE_BOUNDS: Final = (0.2, 20.0)
_FORGET: Final = 0.999
_LEVEL_BOUNDS: Final = (0.5, 2.0)
_OUTLIER: Final = 8.0  # a step this many times off says something else happened
USEFUL_GAIN: Final = 0.97  # a level must cost at most this share of level 100 to be used


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of one step by number of rows; linear between points and beyond the last two."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.seconds) or not self.rows:
            raise ValueError(f"a curve needs as many rows as seconds: {self.rows}, {self.seconds}")
        if list(self.rows) != sorted(set(self.rows)):
            raise ValueError(f"rows of a curve must increase: {self.rows}")

    def at(self, rows: float) -> float:
        """Seconds for this many rows."""
        if len(self.rows) == 1:
            return self.seconds[0]
        i = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        r0, r1 = self.rows[i - 1], self.rows[i]
        s0, s1 = self.seconds[i - 1], self.seconds[i]
        return max(s0 + (s1 - s0) * (rows - r0) / (r1 - r0), min(self.seconds) * 0.5)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes: rows per level, sequences, prefill pairs, keys read by decode."""

    rows: Mapping[int, int]
    sequences: int = 0
    pairs: int = 0
    keys: int = 0

    @property
    def total_rows(self) -> int:
        """Rows of all levels."""
        return sum(self.rows.values())


@dataclass(slots=True)
class CostModel:
    """Predicts a step in seconds. `curves` maps measured levels to their curve."""

    curves: dict[int, Curve]
    per_sequence_s: float = 0.0
    per_pair_s: float = 0.0
    per_key_s: float = 0.0
    pace: float = 1.0
    factors: dict[int, float] = field(default_factory=dict)
    error_ratio: float = 0.0  # EWMA of |observed/predicted - 1|

    def __post_init__(self) -> None:
        if contract.MAX_LEVEL not in self.curves:
            raise ValueError(f"a cost model needs level {contract.MAX_LEVEL}: {list(self.curves)}")

    def _neighbours(self, level: int) -> tuple[int, int, float]:
        levels = sorted(self.curves)
        if level <= levels[0]:
            return levels[0], levels[0], 0.0
        if level >= levels[-1]:
            return levels[-1], levels[-1], 0.0
        i = bisect_left(levels, level)
        low, high = levels[i - 1], levels[i]
        # NB: just below 100 selection starts to cost; 99 is not nearly as cheap as 100 is.
        return low, high, (level - low) / (high - low)

    def rows_s(self, level: int, rows: float) -> float:
        """Seconds of a step of `rows` rows all at `level`, attention and sampling excluded."""
        low, high, share = self._neighbours(level)
        low_s = self.curves[low].at(rows) * self.factors.get(low, 1.0)
        high_s = self.curves[high].at(rows) * self.factors.get(high, 1.0)
        return (low_s + (high_s - low_s) * share) * self.pace

    def step_s(self, shape: StepShape) -> float:
        """Predicted seconds of a step."""
        total = shape.total_rows
        if not total:
            return 0.0
        rows_s = sum(n / total * self.rows_s(level, total) for level, n in shape.rows.items() if n)
        rest = (
            self.per_sequence_s * shape.sequences
            + self.per_pair_s * shape.pairs
            + self.per_key_s * shape.keys
        )
        return rows_s + rest * self.pace

    def prefill_s(self, level: int, tokens: int, past: int = 0, chunk: int = 512) -> float:
        """Seconds to prefill `tokens` after `past`, `chunk` rows a step with full steps."""
        if tokens <= 0:
            return 0.0
        rows = max(chunk, 1)
        per_token = self.rows_s(level, rows) / rows
        pairs = pairs_of(tokens, past)
        return tokens * per_token + (self.per_pair_s * pairs + self.per_sequence_s) * self.pace

    def decode_s_per_token(self, level: int, sequences: int, mean_keys: int) -> float:
        """Seconds per token and sequence in a decode batch of this size, step overhead left out."""
        n = max(sequences, 1)
        shape = StepShape({level: n}, n, 0, n * mean_keys)
        return max(self.step_s(shape) - self.overhead_s(), 0.0) / n

    def overhead_s(self) -> float:
        """What a step costs before its first row: the intercept of level 100's curve."""
        curve = self.curves[contract.MAX_LEVEL]
        if len(curve.rows) < 2:
            return 0.0
        slope = (curve.seconds[1] - curve.seconds[0]) / (curve.rows[1] - curve.rows[0])
        return max(curve.seconds[0] - slope * curve.rows[0], 0.0) * self.pace

    def is_useful(self, level: int, rows: int) -> bool:
        """Whether `level` is faster than 100 at this size; 100 itself always is."""
        if level >= contract.MAX_LEVEL:
            return True
        return self.rows_s(level, rows) <= USEFUL_GAIN * self.rows_s(contract.MAX_LEVEL, rows)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn from one step that took `seconds`."""
        predicted = self.step_s(shape)
        if predicted <= 0 or seconds <= 0:
            return
        ratio = seconds / predicted
        self.error_ratio += 0.05 * (min(abs(ratio - 1), 1.0) - self.error_ratio)
        # NB: clipped, not dropped: a machine that became 10x slower must still be followed.
        ratio = min(max(ratio, 1 / _OUTLIER), _OUTLIER)
        self.pace = _clamp(self.pace * ratio**_PACE_RATE, _PACE_BOUNDS)
        total = shape.total_rows
        for level, factor in self.factors.items():
            self.factors[level] = factor**_FORGET  # a level not served returns to its measurement
        for level, n in shape.rows.items():
            low, high, share = self._neighbours(level)
            for knot, weight in ((low, 1 - share), (high, share)):
                step = ratio ** (_LEVEL_RATE * weight * n / total)
                self.factors[knot] = _clamp(self.factors.get(knot, 1.0) * step, _LEVEL_BOUNDS)


def _clamp(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def pairs_of(tokens: int, past: int) -> int:
    """Query-key pairs of `tokens` causal queries after `past` cached ones."""
    return tokens * past + tokens * (tokens + 1) // 2


def flat_model(seconds_per_row: float, overhead_s: float, levels: Sequence[int]) -> CostModel:
    """A model before any measurement: rows cost in proportion to the level.

    Used while the engine measures itself and in tests; never to take a decision that lasts.
    """
    curves = {
        level: Curve(
            (1, 1001),
            (
                overhead_s + seconds_per_row * level / 100,
                overhead_s + 1001 * seconds_per_row * level / 100,
            ),
        )
        for level in {*levels, contract.MAX_LEVEL}
    }
    return CostModel(curves)
