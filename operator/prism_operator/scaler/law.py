"""The control law: (limits, signals, memory, now) -> decision. Pure, and the whole of it.

Two knobs on two time scales. The *ceiling* of the level goes down at once to the highest level that
the offered load leaves safe, and up in steps that must have been safe under the peak of a whole
window. *Replicas* go up when the ceiling stays below the preferred level, and down only at the
preferred level when one pod less is predicted safe. No data is never read as no load: it holds.

Decided here: attainment outranks the model. When the targets are missed although the model calls
the level safe, the level goes one step down and the model is trusted less (``limit``), until the
load has gone. A raise that had to be taken back doubles the wait before the next one.
"""

from dataclasses import replace

from prism_operator.scaler.ceiling import next_ceiling
from prism_operator.scaler.model import CostModel, Demand
from prism_operator.scaler.replicas import bounded, next_replicas
from prism_operator.scaler.state import (
    DEFAULT_TUNING,
    Change,
    Decision,
    Limits,
    Memory,
    Pods,
    Signals,
    Tuning,
    View,
)


def decide(
    limits: Limits,
    signals: Signals | None,
    model: CostModel | None,
    pods: Pods,
    memory: Memory,
    now: float,
    tuning: Tuning = DEFAULT_TUNING,
) -> Decision:
    """One step of the law. Without traffic or news it decides nothing and writes nothing."""
    start = _start(limits, memory)
    if signals is None or now - signals.at > limits.stale_after_s:
        return _without_data(limits, pods, memory, start, now)
    samples = _remember(memory, signals, limits, now, tuning)
    memory = replace(memory, last_data=now, samples=samples)
    view = View(limits, tuning, _with_backlog(signals, tuning), model, pods, memory, now)
    if limits.fixed is None:
        ceiling, reason, why, memory = next_ceiling(view, start)
    else:
        ceiling, reason, why = limits.fixed, "LevelPinned", f"level {limits.fixed} is set"
    view = replace(view, memory=memory)
    count, scale, below, limited = next_replicas(view, ceiling)
    memory = replace(memory, below_since=below)
    changes = _level_change(memory.ceiling or start, ceiling, reason, why)
    if scale:
        changes += (scale,)
        memory = replace(memory, scaled_at=now)
    return _finish(limits, ceiling, count, memory, pods, changes, limited=limited)


def _start(limits: Limits, memory: Memory) -> int:
    """The ceiling in force, put inside the bounds; at first, the best quality."""
    if limits.fixed is not None:
        return limits.fixed
    return min(max(memory.ceiling or limits.top, limits.floor), limits.top)


def _without_data(limits: Limits, pods: Pods, memory: Memory, start: int, now: float) -> Decision:
    since = memory.last_data if memory.last_data is not None else now
    memory = replace(memory, last_data=since)
    count = bounded(limits, pods.wanted)
    lost = now - since > limits.stale_after_s
    ceiling, why = start, f"bounds are {limits.floor} to {limits.top}"
    reason = "BoundsChanged"
    if lost and limits.fixed is None and limits.on_loss != "Hold":
        ceiling = limits.floor if limits.on_loss == "MinLevel" else limits.top
        reason = "MetricsLost"
        why = f"no measurement for {now - since:.0f} s; onMetricsLoss is {limits.on_loss}"
    changes = _level_change(memory.ceiling or start, ceiling, reason, why)
    data = "Lost" if lost else "Held"
    # Never scale in without data: only the spec's own bounds may take a pod away.
    return _finish(limits, ceiling, count, memory, pods, changes, data=data)


def _finish(
    limits: Limits,
    ceiling: int,
    count: int,
    memory: Memory,
    pods: Pods,
    changes: tuple[Change, ...],
    data: str = "Fresh",
    limited: str = "",
) -> Decision:
    floor = limits.fixed if limits.fixed is not None else limits.floor
    # A pod that knows a higher number than we do would refuse ours: overtake it.
    write = (floor, ceiling) != (memory.floor, memory.ceiling) or pods.seq > memory.seq
    if write:
        seq = max(memory.seq, pods.seq) + 1
        memory = replace(memory, seq=seq, floor=floor, ceiling=ceiling)
    return Decision(floor, ceiling, count, memory, changes, write, data, limited)


def _level_change(before: int, after: int, reason: str, why: str) -> tuple[Change, ...]:
    return (Change("Level", before, after, reason, why),) if before != after else ()


def _remember(
    memory: Memory, signals: Signals, limits: Limits, now: float, tuning: Tuning
) -> tuple[tuple[float, Demand], ...]:
    keep = max(limits.up_window_s * tuning.most_waits, tuning.remove_after_s) + 30
    demand = _with_backlog(signals, tuning).demand
    kept = tuple(sample for sample in memory.samples if now - keep <= sample[0] < now)
    # Long windows get coarser samples: the memory has to fit into a ConfigMap.
    if len(kept) >= 2 and now - kept[-2][0] < keep / tuning.most_samples:
        return (*kept[:-1], (now, kept[-1][1].peak(demand)))
    return (*kept, (now, demand))


def _with_backlog(signals: Signals, tuning: Tuning) -> Signals:
    """What waits is demand too: it should be gone after ``drain_s``."""
    demand = signals.demand
    if signals.waiting <= 0 or demand.requests <= 0:
        return signals
    grow = 1 + signals.waiting / tuning.drain_s / demand.requests
    scaled = Demand(
        demand.requests * grow, demand.prompt_tokens * grow, demand.output_tokens * grow
    )
    return replace(signals, demand=scaled)
