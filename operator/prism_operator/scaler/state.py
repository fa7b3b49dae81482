"""What the control law reads, remembers and answers: data without rules.

Pure. ``Memory`` goes into the ConfigMap with each decision, so that a restarted operator goes on
with the clocks of the one before; its samples are the demand of the last minutes, for the peaks.
"""

from dataclasses import dataclass
from typing import Any, Final

from prism_operator.scaler.model import CostModel, Demand, offered_levels


@dataclass(frozen=True, slots=True)
class Tuning:
    """Constants of the law. ``limit`` is the utilisation that still holds a tail latency."""

    limit: float = 0.85
    lowest_limit: float = 0.4
    raise_share: float = 0.9  # a raise, or one pod less, must be this much safer than needed
    quiet_share: float = 0.5  # below this share of the load that was too much, it is forgotten
    window_s: float = 15.0  # what the signals look back on
    drain_s: float = 15.0  # a backlog should be gone after this long
    least_misses: int = 3  # fewer are chance
    add_after_s: float = 30.0
    remove_after_s: float = 300.0
    most_waits: int = 8
    most_samples: int = 120


DEFAULT_TUNING: Final = Tuning()


@dataclass(frozen=True, slots=True)
class Limits:
    """What the spec allows. ``fixed`` is the level of mode Manual and Off, else None."""

    floor: int
    top: int
    preferred: int
    fixed: int | None = None
    step: int = 5
    up_window_s: float = 30
    up_step: int = 20
    down_window_s: float = 15
    down_step: int = 100
    autoscaling: bool = False
    replicas: int = 1
    min_replicas: int = 1
    max_replicas: int = 1
    stale_after_s: float = 60
    on_loss: str = "Hold"
    ttft_percentile: int | None = None
    itl_percentile: int | None = None


@dataclass(frozen=True, slots=True)
class Events:
    """Events of one objective in the control window."""

    good: float
    total: float


@dataclass(frozen=True, slots=True)
class Signals:
    """What was measured; ``at`` is the time of the newest sample, in seconds since the epoch."""

    at: float
    demand: Demand
    waiting: float = 0.0
    running: float = 0.0
    ttft: Events = Events(0, 0)
    itl: Events = Events(0, 0)
    served_level: float | None = None


@dataclass(frozen=True, slots=True)
class Pods:
    """``wanted`` is the Deployment's replica count; ``seq`` the highest that a pod knows."""

    wanted: int
    ready: int
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """What one pass leaves to the next. ``samples`` are (time, demand), oldest first."""

    seq: int = 0
    floor: int = 0
    ceiling: int = 0
    limit: float = 0.85
    waits: int = 1
    trouble: float = 0.0  # utilisation at full level when the level was last lowered
    lowered_at: float = 0.0
    raised_at: float = 0.0
    scaled_at: float = 0.0
    below_since: float | None = None
    last_data: float | None = None
    samples: tuple[tuple[float, Demand], ...] = ()

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in _CLOCKS}
        rows = [[round(t, 1), _r(d.requests), _r(d.prompt_tokens), _r(d.output_tokens)]
                for t, d in self.samples]  # fmt: skip
        return {**data, "samples": rows}


_CLOCKS: Final = (
    "seq", "floor", "ceiling", "limit", "waits", "trouble", "lowered_at", "raised_at", "scaled_at",
    "below_since", "last_data",
)  # fmt: skip
_UNSET: Final = ((None, "below_since"), (None, "last_data"))


def memory_from_json(data: dict[str, Any]) -> Memory:
    """Memory as an earlier process left it; raises KeyError, TypeError or ValueError."""
    samples = tuple((float(t), Demand(float(r), float(p), float(o)))
                    for t, r, p, o in data["samples"])  # fmt: skip
    for name in _CLOCKS:
        if not isinstance(data[name], (int, float)) and (data[name], name) not in _UNSET:
            raise TypeError(f"{name} is {data[name]!r}")
    return Memory(**{name: data[name] for name in _CLOCKS}, samples=samples)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing decided, with a reason in a word and in a sentence."""

    kind: str  # Level or Replicas
    before: int
    after: int
    reason: str
    why: str


@dataclass(frozen=True, slots=True)
class Decision:
    """``write`` says that the pods' bounds changed, so the ConfigMap must be written."""

    floor: int
    ceiling: int
    replicas: int
    memory: Memory
    changes: tuple[Change, ...] = ()
    write: bool = False
    data: str = "Fresh"  # Fresh, Held (no data yet) or Lost (for longer than allowed)
    limited: str = ""  # why no replica can be added although one is wanted


@dataclass(frozen=True, slots=True)
class View:
    """All that the steps of one decision look at."""

    limits: Limits
    tuning: Tuning
    signals: Signals
    model: CostModel | None
    pods: Pods
    memory: Memory
    now: float

    def use(self, demand: Demand, level: int, pods: int | None = None) -> float:
        """Predicted utilisation of each of ``pods`` (default: the ready ones)."""
        assert self.model is not None
        return self.model.work(demand, level) / max(1, self.pods.ready if pods is None else pods)

    def peak(self, window_s: float) -> Demand | None:
        """Highest demand in the window; None where it was not watched for so long."""
        since = self.now - window_s
        if not self.memory.samples or self.memory.samples[0][0] > since:
            return None
        recent = [demand for at, demand in self.memory.samples if at >= since]
        result = self.signals.demand
        for demand in recent:
            result = result.peak(demand)
        return result

    def grid(self) -> tuple[int, ...]:
        """Allowed ceilings, high to low."""
        return offered_levels(self.limits.floor, self.limits.top, self.limits.step)

    def levels(self) -> tuple[int, ...]:
        """The grid without levels that cost no less than the one above: no use going there."""
        offered = self.grid()
        if self.model is None:
            return offered
        unit, kept = Demand(1, 1, 1), [offered[0]]
        for level in offered[1:]:
            if self.model.work(unit, level) < self.model.work(unit, kept[-1]):
                kept.append(level)
        return tuple(kept)


def _r(value: float) -> float:
    return float(f"{value:.4g}")
