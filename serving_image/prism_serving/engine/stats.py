"""What the engine reports between two Stats messages.

Knows: which numbers, and that they are increments. Must not know: metric names (the gateway's).

One decision worth arguing about: increments, not totals. The gateway adds them to its own counters,
so an engine restart resets nothing and the pod's page stays monotone.
"""

from dataclasses import dataclass, field
from typing import Final

from prism.contract import PREFILL_LEVELS

from prism_serving.engine.runner import Runner
from prism_serving.engine.scheduler import Scheduler, StepPlan
from prism_serving.protocol import LevelProfile, Stats, StepRecord

INTERVAL_S: Final = 0.5


@dataclass(slots=True)
class StatsWindow:
    """Sums since `since_s`."""

    since_s: float
    steps: list[StepRecord] = field(default_factory=list)
    busy_s: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)
    weighted: dict[str, float] = field(default_factory=dict)
    own: int = 0
    candidates: int = 0
    batch: int = 1
    mean_keys: int = 256

    def record(self, plan: StepPlan, seconds: float) -> None:
        """Add one computed step."""
        self.steps.append(StepRecord(phase=plan.phase, seconds=seconds, tokens=plan.rows))
        self.busy_s += seconds
        for c in plan.chunks:
            phase = "decode" if c.is_decode else "prefill"
            self.tokens[phase] = self.tokens.get(phase, 0) + c.count
            self.weighted[phase] = self.weighted.get(phase, 0.0) + c.count * c.level / 100
        decoding = [c.start + 1 for c in plan.chunks if c.is_decode]
        if decoding:
            self.batch, self.mean_keys = len(decoding), sum(decoding) // len(decoding)

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to report."""
        return now_s - self.since_s >= INTERVAL_S

    def take(self, scheduler: Scheduler, runner: Runner, now_s: float) -> Stats:
        """The report, and start anew."""
        costs, bounds = scheduler.costs, scheduler.bounds
        message = Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_used=scheduler.pool.used,
            kv_total=scheduler.pool.size,
            seq=bounds.seq,
            floor=bounds.floor,
            ceiling=bounds.ceiling,
            steps=self.steps,
            busy_s=self.busy_s,
            level_tokens=self.tokens,
            level_weighted=self.weighted,
            own=runner.own - self.own,
            candidates=runner.candidates - self.candidates,
            profile=[
                LevelProfile(
                    level=level,
                    prefill_seconds_per_token=costs.prefill_s(
                        level, scheduler.budget, 0, scheduler.budget
                    )
                    / scheduler.budget,
                    decode_seconds_per_token=costs.decode_s_per_token(
                        level, self.batch, self.mean_keys
                    ),
                    useful=costs.is_useful(level, scheduler.budget),
                )
                for level in PREFILL_LEVELS
            ],
            step_overhead_s=costs.overhead_s(),
            prediction_error_ratio=costs.error_ratio,
            decode_level=scheduler.decode_level,
        )
        self.since_s, self.steps, self.busy_s = now_s, [], 0.0
        self.tokens, self.weighted = {}, {}
        self.own, self.candidates = runner.own, runner.candidates
        return message
