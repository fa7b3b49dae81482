"""Conditions of a PrismModel: metav1.Condition with a lastTransitionTime that means something.

Pure. A condition's time changes with its status only, never with reason or message; messages hold
no measured numbers, since a text that changes each tick would be a write each tick.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

ACCEPTED: Final = "Accepted"
REFACTORED: Final = "Refactored"
WORKLOADS_READY: Final = "WorkloadsReady"
METRICS_AVAILABLE: Final = "MetricsAvailable"
SLO_MET: Final = "SLOMet"
DEGRADED: Final = "Degraded"
SCALING_LIMITED: Final = "ScalingLimited"
READY: Final = "Ready"
MAX_MESSAGE: Final = 1024


@dataclass(frozen=True, slots=True)
class Condition:
    """``status`` True, False or None for Unknown."""

    type: str
    status: bool | None
    reason: str
    message: str = ""


def merge(
    new: Iterable[Condition],
    old: Iterable[Mapping[str, Any]],
    generation: int,
    now: str,
) -> list[dict[str, Any]]:
    """The list for status, in the order given; a condition that is not among ``new`` is dropped."""
    before = {str(condition.get("type")): condition for condition in old}
    return [_render(condition, before.get(condition.type), generation, now) for condition in new]


def _render(
    condition: Condition, before: Mapping[str, Any] | None, generation: int, now: str
) -> dict[str, Any]:
    status = {True: "True", False: "False", None: "Unknown"}[condition.status]
    same = before is not None and before.get("status") == status
    return {
        "type": condition.type,
        "status": status,
        "reason": condition.reason,
        "message": condition.message[:MAX_MESSAGE],
        "observedGeneration": generation,
        "lastTransitionTime": str(before["lastTransitionTime"]) if before and same else now,
    }
