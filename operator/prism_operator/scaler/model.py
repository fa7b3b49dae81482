"""What a load costs at each level, and what the operator offers of levels.

Pure. The figures come from the pods' own ``/admin/profile`` (seconds per token, measured there);
this module adds nothing but interpolation and sums. Cost is *engine seconds per second*: 1.0 keeps
one pod busy all the time. Demand is what clients offer, never what was completed, since completions
stop growing exactly when the model is overloaded. The constant part of a decode step is left out:
it is shared by all sequences of the batch, so a pod that is always busy may still have room.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism import contract


@dataclass(frozen=True, slots=True)
class Demand:
    """Offered to all pods together, per second; output tokens are expected ones."""

    requests: float
    prompt_tokens: float
    output_tokens: float

    def peak(self, other: "Demand") -> "Demand":
        return Demand(
            max(self.requests, other.requests),
            max(self.prompt_tokens, other.prompt_tokens),
            max(self.output_tokens, other.output_tokens),
        )


@dataclass(frozen=True, slots=True)
class LevelCost:
    """Engine seconds per prompt token and per output token at one level."""

    level: int
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs by ascending level; never empty."""

    points: tuple[LevelCost, ...]

    def work(self, demand: Demand, level: int) -> float:
        """Engine seconds per second that the demand needs when ``level`` is the ceiling."""
        prefill = self._at(self.prefill_level(level)).prefill_s
        return demand.prompt_tokens * prefill + demand.output_tokens * self._at(level).decode_s

    def prefill_level(self, ceiling: int) -> int:
        """The level at which engines read prompts under this ceiling: one of those measured."""
        allowed = [point.level for point in self.points if point.level <= ceiling]
        return max(allowed) if allowed else self.points[0].level

    def _at(self, level: int) -> LevelCost:
        levels = [point.level for point in self.points]
        i = bisect_left(levels, level)
        if i == len(levels):
            return self.points[-1]
        high = self.points[i]
        if i == 0 or high.level == level:
            return high
        low = self.points[i - 1]
        share = (level - low.level) / (high.level - low.level)
        return LevelCost(
            level,
            low.prefill_s + share * (high.prefill_s - low.prefill_s),
            low.decode_s + share * (high.decode_s - low.decode_s),
        )


def prefill_level(ceiling: int) -> int:
    """As ``CostModel.prefill_level``, where no costs are known."""
    allowed = [level for level in contract.PREFILL_LEVELS if level <= ceiling]
    return max(allowed) if allowed else min(contract.PREFILL_LEVELS)


def from_profiles(profiles: Sequence[Mapping[str, Any]]) -> CostModel | None:
    """Mean over the pods that answered; None where no pod has measured anything yet."""
    tables = [table for profile in profiles if (table := _table(profile))]
    if not tables:
        return None
    common = set.intersection(*(set(table) for table in tables))
    if not common:
        return None

    def mean(level: int, column: int) -> float:
        return sum(table[level][column] for table in tables) / len(tables)

    return CostModel(tuple(LevelCost(n, mean(n, 0), mean(n, 1)) for n in sorted(common)))


def _table(profile: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    """Level -> (prefill, decode without the step's constant part); empty where unusable.

    Levels that the engine finds no faster than 100 are left out: it does not use them.
    """
    table: dict[int, tuple[float, float]] = {}
    for row in profile.get("levels") or ():
        try:
            level = int(row["level"])
            prefill = float(row["prefill_seconds_per_token"])
            decode = float(row["decode_seconds_per_token"])
        except (KeyError, TypeError, ValueError):
            return {}
        if not (0 < prefill < 60 and 0 <= decode < 60):
            return {}
        if row.get("useful", True) or level == contract.MAX_LEVEL:
            table[level] = (prefill, decode)
    return table


def offered_levels(floor: int, ceiling: int, step: int) -> tuple[int, ...]:
    """Ceilings the operator may choose, from high to low; both bounds are among them."""
    return (*range(ceiling, floor, -step), floor) if floor < ceiling else (ceiling,)
