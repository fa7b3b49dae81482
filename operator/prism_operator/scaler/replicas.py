"""The slow knob: how many pods. Pure; see law.py for the whole.

Up when the level stays below the preferred one although all that was added is ready; down one by
one, and only when the peak of minutes would leave one pod less safe at the preferred level.
"""

import math

from prism_operator.scaler.ceiling import missed
from prism_operator.scaler.model import prefill_level
from prism_operator.scaler.state import Change, Limits, View


def next_replicas(view: View, ceiling: int) -> tuple[int, Change | None, float | None, str]:
    """(count, change, since when the level is below the preferred one, why not more)."""
    limits, pods, now = view.limits, view.pods, view.now
    current = bounded(limits, pods.wanted)
    short = ceiling < limits.preferred or _falls_short(view)
    since = view.memory.below_since if view.memory.below_since is not None else now
    below = since if short else None
    if not limits.autoscaling:
        return current, None, below, ""
    if pods.wanted != current:
        text = f"bounds are {limits.min_replicas} to {limits.max_replicas} replicas"
        return current, Change("Replicas", pods.wanted, current, "BoundsChanged", text), below, ""
    if short:
        lasting = now - since >= view.tuning.add_after_s
        return _add(view, ceiling, current, below) if lasting else (current, None, below, "")
    return _remove(view, ceiling, current)


def _falls_short(view: View) -> bool:
    """Under a ceiling that is as preferred: engines serve less, or a pinned level is too slow."""
    served = view.signals.served_level
    if served is not None and served < prefill_level(view.limits.preferred) - 2:
        return True
    if view.limits.fixed is None:
        return False
    busy = view.model and view.use(view.signals.demand, view.limits.fixed) > view.memory.limit
    return bool(busy) or missed(view) is not None


def _add(
    view: View, ceiling: int, current: int, below: float | None
) -> tuple[int, Change | None, float | None, str]:
    limits, pods = view.limits, view.pods
    if pods.ready < current:  # what was added is still coming; more would come too late as well
        return current, None, below, ""
    if current >= limits.max_replicas:
        return current, None, below, f"level {ceiling} with all {current} replicas allowed"
    wanted = current + 1
    if view.model:
        load = view.model.work(view.signals.demand, limits.preferred)
        wanted = max(wanted, min(math.ceil(load / view.memory.limit), 2 * current))
    count = min(wanted, limits.max_replicas)
    why = (
        f"level {ceiling} is below the preferred {limits.preferred} "
        f"for {view.tuning.add_after_s:.0f} s at {view.signals.demand.requests:.1f} requests/s"
    )
    return count, Change("Replicas", current, count, "BelowPreferredLevel", why), None, ""


def _remove(view: View, ceiling: int, current: int) -> tuple[int, Change | None, float | None, str]:
    limits, window = view.limits, view.tuning.remove_after_s
    stay = (current, None, None, "")
    changed = max(view.memory.scaled_at, view.memory.lowered_at)
    if current <= limits.min_replicas or view.model is None or view.now - changed < window:
        return stay
    peak = view.peak(window)
    if peak is None or view.pods.ready < current or missed(view):
        return stay
    use = view.use(peak, limits.preferred, current - 1)
    if use > view.tuning.raise_share * view.memory.limit:
        return stay
    why = (
        f"{current - 1} pod(s) would be used to {100 * use:.0f} % at the preferred level "
        f"{limits.preferred} by the peak of the last {window:.0f} s"
    )
    return current - 1, Change("Replicas", current, current - 1, "CapacityToSpare", why), None, ""


def bounded(limits: Limits, count: int) -> int:
    if not limits.autoscaling:
        return limits.replicas
    return min(max(count, limits.min_replicas), limits.max_replicas)
