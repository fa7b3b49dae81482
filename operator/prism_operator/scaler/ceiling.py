"""The fast knob: the next ceiling of the level. Pure; see law.py for the whole.

Down at once, to the highest level the offered load leaves safe; up by one bounded step per window,
to what the window's peak leaves safe with room to spare.
"""

import math
from dataclasses import replace

from prism_operator.scaler.state import Memory, View


def next_ceiling(view: View, level: int) -> tuple[int, str, str, Memory]:
    """The next ceiling, its reason in a word and in a sentence, and what to remember of it."""
    memory = _forgive(view)
    view = replace(view, memory=memory)
    lower, reason, why, limit = _lower(view, level)
    if lower < level:
        soon = view.now - memory.raised_at < 2 * view.limits.up_window_s * memory.waits
        waits = min(memory.waits * 2, view.tuning.most_waits) if soon else memory.waits
        trouble = view.use(view.signals.demand, view.limits.top) if view.model else 0.0
        memory = replace(memory, lowered_at=view.now, limit=limit, waits=waits, trouble=trouble)
        return lower, reason, why, memory
    if reason:  # at risk, and nothing lower to go to or not yet the time
        return level, reason, why, memory
    higher, why = _raise(view, level)
    if higher > level:
        return higher, "LoadAllowsMore", why, replace(memory, raised_at=view.now)
    return level, "BoundsChanged", f"bounds are {view.limits.floor} to {view.limits.top}", memory


def _forgive(view: View) -> Memory:
    """With the load gone, the model is trusted and raises are quick again."""
    quiet = view.signals.demand.requests <= 0
    if view.model and not quiet:
        use = view.use(view.signals.demand, view.limits.top)
        quiet = use < view.tuning.quiet_share * view.memory.trouble
    return replace(view.memory, limit=view.tuning.limit, waits=1) if quiet else view.memory


def _lower(view: View, level: int) -> tuple[int, str, str, float]:
    """(ceiling, reason, why, limit); reason is empty where the level is safe as it is."""
    memory, demand = view.memory, view.signals.demand
    target, limit = level, memory.limit
    reason, why = "", ""
    levels = [n for n in view.levels() if n <= level] or [level]
    if view.model and view.use(demand, level) > limit * (1 + _chance(view)):
        safe = [n for n in levels if view.use(demand, n) <= limit]
        target = safe[0] if safe else levels[-1]
        reason, why = "LoadAboveCapacity", _load_text(view, level, target)
    miss = missed(view)
    if miss and target == level and _level_matters(view, level):
        target = next((n for n in levels if n < level), level)
        reason, why = miss
        if view.model:
            limit = max(view.tuning.lowest_limit, limit * 0.9)
    if target < level and view.now - memory.lowered_at < view.limits.down_window_s:
        return level, reason, why, memory.limit
    return max(target, _reach_down(view, level)), reason, why, limit


def _reach_down(view: View, level: int) -> int:
    """How far one lowering may go; at least one step of the grid, should it be wider."""
    below = [n for n in view.grid() if n < level]
    within = [n for n in below if n >= level - view.limits.down_step]
    return min(within) if within else max(below, default=level)


def _level_matters(view: View, level: int) -> bool:
    """A miss on a pod that is not busy has another cause, which less quality would not cure."""
    if view.model is None:
        return True
    return view.use(view.signals.demand, level) > view.tuning.quiet_share * view.memory.limit


def _chance(view: View) -> float:
    """Half a standard deviation of arrivals that come by chance, as a share of them."""
    arrived = view.signals.demand.requests * view.tuning.window_s
    return 0.5 / math.sqrt(arrived) if arrived > 1 else 0.5


def missed(view: View) -> tuple[str, str] | None:
    limits, signals = view.limits, view.signals
    for name, percentile, events in (
        ("TTFT", limits.ttft_percentile, signals.ttft),
        ("ITL", limits.itl_percentile, signals.itl),
    ):
        misses = events.total - events.good
        if percentile is None or events.total <= 0:
            continue
        allowed = events.total * (100 - percentile) / 100
        share = 100 * events.good / events.total
        if misses >= view.tuning.least_misses and misses > allowed + 2 * math.sqrt(allowed):
            text = f"{share:.0f} % of {events.total:.0f} events within target, {percentile} % asked"
            return f"{name}AtRisk", f"{name} {text}"
    return None


def _load_text(view: View, level: int, target: int) -> str:
    demand = view.signals.demand
    return (
        f"offered {demand.requests:.1f} requests/s with {demand.prompt_tokens:.0f} prompt tokens/s "
        f"would use {100 * view.use(demand, level):.0f} % of {max(1, view.pods.ready)} pod(s) at "
        f"level {level}, {100 * view.use(demand, target):.0f} % at {target}"
    )


def _raise(view: View, level: int) -> tuple[int, str]:
    """The highest level one step allows that the peak of the whole window leaves safe."""
    memory, limits = view.memory, view.limits
    window = limits.up_window_s * memory.waits
    if view.now - max(memory.lowered_at, memory.raised_at) < window:
        return level, ""
    above = [n for n in view.grid() if n > level]  # also those that cost the same: more quality
    candidates = [n for n in above if n <= level + limits.up_step] or above[-1:]
    if view.model is None:
        calm = view.signals.waiting <= 0
        return (candidates[-1], "targets held for a window") if candidates and calm else (level, "")
    peak = view.peak(window)
    if peak is None:
        return level, ""
    bar = view.tuning.raise_share * memory.limit
    for target in candidates:
        if (use := view.use(peak, target)) <= bar:
            return target, (
                f"the peak of the last {window:.0f} s, {peak.requests:.1f} requests/s, "
                f"would use {100 * use:.0f} % at level {target}"
            )
    return level, ""
