"""Status of a PrismModel: conditions, phase, columns, decisions, and the Events that go with them.

Pure. Two kinds of difference: one that a person or an alert waits for (phase, a condition's status
or reason, a decision, a replica count) is written at once; measured figures wait until the last
write is ``QUIET_S`` old. Without traffic no figure changes, so nothing is written.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from prism_operator import conditions
from prism_operator.api import Json, Model, selector
from prism_operator.conditions import Condition
from prism_operator.observe import Observed
from prism_operator.plan import Measured, Plan, Report
from prism_operator.pod_words import Trouble
from prism_operator.scaler.state import Change

QUIET_S: Final = 35.0
MAX_DECISIONS: Final = 10


@dataclass(frozen=True, slots=True)
class Notice:
    """A Kubernetes Event on the PrismModel."""

    warning: bool
    reason: str
    message: str


def build(
    model: Model, seen: Observed, plan: Plan, measured: Measured, old: Mapping[str, Any], now: float
) -> Json:
    """The whole status to have."""
    stamp = iso(now)
    if plan.blocked and plan.blocked.reason == "Paused":
        # What runs goes on running, so what was said about it stays.
        return {**old, "observedGeneration": model.generation, "phase": "Paused"}
    found = _conditions(model, seen, plan, measured)
    merged = conditions.merge(found, old.get("conditions") or (), model.generation, stamp)
    wanted, ready = _wanted(seen, plan), len(seen.ready_pods)
    status: Json = {
        "observedGeneration": model.generation,
        "phase": _phase(seen, plan, wanted),
        "replicas": seen.deployment.replicas if seen.deployment else 0,
        "readyReplicas": ready,
        "selector": ",".join(f"{key}={value}" for key, value in selector(model.name).items()),
        "display": _display(model, plan, measured.report, ready, wanted),
        "conditions": merged,
    }
    if artifact := plan.refactoring.artifact or old.get("artifact"):
        status["artifact"] = artifact
    if seen.deployment:
        status["image"] = seen.deployment.image
        status["servingHash"] = seen.deployment.spec_hash
    if plan.decision:
        status["level"] = _level(plan, measured, old, stamp)
    if figures := _figures(measured.report):
        status["slo"] = figures
    if decisions := _decisions(plan, old, stamp):
        status["decisions"] = decisions
    return status


def must_write(old: Mapping[str, Any], new: Json, since_last_s: float) -> bool:
    """Whether ``new`` is worth a write now."""
    if new == old:
        return False
    return since_last_s >= QUIET_S or _steady(new) != _steady(old)


def notices(plan: Plan, old: Mapping[str, Any], new: Json) -> list[Notice]:
    """Events for what was decided and for conditions that changed their status or reason."""
    found = [_change_notice(change) for change in (plan.decision.changes if plan.decision else ())]
    before = {c["type"]: c for c in old.get("conditions") or ()}
    for condition in new.get("conditions") or ():
        if condition["type"] not in _TOLD:
            continue
        last = before.get(condition["type"], {})
        if (last.get("status"), last.get("reason")) == (condition["status"], condition["reason"]):
            continue
        if not last and condition["status"] != "True" and condition["reason"] in _QUIET_REASONS:
            continue
        bad = condition["status"] == "False" and condition["reason"] not in _QUIET_REASONS
        notice = Notice(bad, condition["reason"], condition["message"] or condition["reason"])
        if notice not in found:  # Ready often says what Refactored says
            found.append(notice)
    return found


_TOLD: Final = (conditions.ACCEPTED, conditions.REFACTORED, conditions.READY)
_QUIET_REASONS: Final = (
    "Valid", "Starting", "Running", "Restarting", "Verifying", "NotDeployed", "RollingOut",
    "Refactoring", "Stopped", "CleaningUp",
)  # fmt: skip


def iso(now: float) -> str:
    """RFC 3339, whole seconds."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _steady(status: Mapping[str, Any]) -> Json:
    """Status without figures and wordings: what is worth a write of its own."""
    kept = deepcopy(dict(status))
    for key in ("slo", "display"):
        kept.pop(key, None)
    for key in ("current", "applied"):
        (kept.get("level") or {}).pop(key, None)
    for condition in kept.get("conditions") or ():
        condition.pop("message", None)
    return kept


def _wanted(seen: Observed, plan: Plan) -> int:
    if plan.decision:
        return plan.decision.replicas
    return seen.deployment.replicas if seen.deployment else 0


def _conditions(model: Model, seen: Observed, plan: Plan, measured: Measured) -> list[Condition]:
    blocked, refactoring = plan.blocked, plan.refactoring
    if blocked:
        return [
            Condition(conditions.ACCEPTED, False, blocked.reason, blocked.message),
            Condition(conditions.READY, False, blocked.reason, blocked.message),
        ]
    found = [
        _accepted(plan),
        Condition(
            conditions.REFACTORED,
            refactoring.done,
            refactoring.reason,
            refactoring.message,
        ),
    ]
    workloads = _workloads(seen, plan)
    if plan.served:
        found += [workloads, _metrics(seen, plan, measured)]
        if (slo := _slo(model, measured.report)) is not None:
            found.append(slo)
        found.append(_degraded(seen, plan))
        if model.autoscaling:
            found.append(_limited(seen, plan))
    return [*found, _ready(seen, plan, workloads)]


def _accepted(plan: Plan) -> Condition:
    if plan.refused:
        return Condition(conditions.ACCEPTED, False, plan.refused.reason, plan.refused.message)
    return Condition(conditions.ACCEPTED, True, "Valid", "")


def _workloads(seen: Observed, plan: Plan) -> Condition:
    kind, view, wanted = conditions.WORKLOADS_READY, seen.deployment, _wanted(seen, plan)
    if view is None:
        return Condition(kind, False, "NotDeployed", "there are no pods yet")
    if trouble := _pod_trouble(seen):
        return Condition(kind, False, trouble.reason, trouble.message)
    if not view.up_to_date or view.artifact != plan.served:
        return Condition(kind, False, "RollingOut", "new pods replace the old ones")
    if len(seen.ready_pods) < wanted:
        return Condition(kind, False, "Starting", "not all pods are ready")
    return Condition(kind, True, "AllReplicasReady", "")


def _pod_trouble(seen: Observed) -> Trouble | None:
    if seen.deployment and seen.deployment.trouble:
        return seen.deployment.trouble
    return next((pod.trouble for pod in seen.pods if pod.trouble and not pod.going), None)


def _metrics(seen: Observed, plan: Plan, measured: Measured) -> Condition:
    kind = conditions.METRICS_AVAILABLE
    if not seen.ready_pods:
        return Condition(kind, None, "NoPods", "there is no ready pod to measure")
    data = plan.decision.data if plan.decision else "Held"
    if data == "Fresh":
        return Condition(kind, True, measured.source or "MetricsFound", measured.problem)
    reason = "MetricsLost" if data == "Lost" else "MetricsMissing"
    return Condition(kind, None if data == "Held" else False, reason, measured.problem)


def _slo(model: Model, report: Report) -> Condition | None:
    rows = [
        (name, objective, share)
        for name, objective, share in (
            ("TTFT", model.ttft, report.ttft_attainment),
            ("ITL", model.itl, report.itl_attainment),
        )
        if objective is not None
    ]
    if not rows:
        return None
    kind = conditions.SLO_MET
    known = [(name, share >= o.percentile) for name, o, share in rows if share is not None]
    if not known:
        return Condition(kind, None, "NoTraffic", "nothing happened in the window")
    if missed := [name for name, met in known if not met]:
        return Condition(kind, False, "Violated", f"{' and '.join(missed)} outside the target")
    return Condition(kind, True, "WithinTarget", "")


def _degraded(seen: Observed, plan: Plan) -> Condition:
    kind, decision = conditions.DEGRADED, plan.decision
    if decision and plan.limits and decision.ceiling < plan.limits.preferred:
        text = f"the level's ceiling is below the preferred level {plan.limits.preferred}"
        return Condition(kind, True, "BelowPreferredLevel", text)
    if 0 < len(seen.ready_pods) < _wanted(seen, plan):
        return Condition(kind, True, "PodsMissing", "fewer pods are ready than wanted")
    return Condition(kind, False, "AsWanted", "")


def _limited(seen: Observed, plan: Plan) -> Condition:
    kind = conditions.SCALING_LIMITED
    if plan.decision and plan.decision.limited:
        return Condition(kind, True, "TooFewReplicasAllowed", plan.decision.limited)
    stuck = next(
        (p.trouble for p in seen.pods if p.trouble and "nschedul" in p.trouble.reason), None
    )
    if stuck:
        return Condition(kind, True, "NoCapacity", stuck.message)
    return Condition(kind, False, "WithinLimits", "")


def _ready(seen: Observed, plan: Plan, workloads: Condition) -> Condition:
    kind = conditions.READY
    if plan.decision and plan.decision.replicas == 0:
        return Condition(kind, False, "Stopped", "spec.serving.replicas is 0")
    if not plan.served:  # pods that are there now were a namesake's
        return Condition(kind, False, plan.refactoring.reason, plan.refactoring.message)
    if seen.ready_pods:
        return Condition(kind, True, "Serving", "")
    return Condition(kind, False, workloads.reason, workloads.message)


def _phase(seen: Observed, plan: Plan, wanted: int) -> str:
    if plan.blocked:
        return "Failed"
    if plan.served:
        if wanted == 0:
            return "Stopped"
        if not seen.ready_pods:
            return "Deploying"
        return "Degraded" if _pod_trouble(seen) else "Serving"
    if plan.refactoring.failed:
        return "Failed"
    return "Refactoring" if plan.refactoring.reason == "Running" else "Pending"


def _display(model: Model, plan: Plan, report: Report, ready: int, wanted: int) -> Json:
    display: Json = {"model": model.served_name, "replicas": f"{ready}/{wanted}"}
    if plan.decision:
        served = f" ({report.level}%)" if report.level is not None else ""
        display["level"] = f"{plan.decision.ceiling}%{served}"
    for key, value in (("ttft", report.ttft_ms), ("itl", report.itl_ms)):
        if value is not None:
            display[key] = f"{value}ms"
    return display


def _level(plan: Plan, measured: Measured, old: Mapping[str, Any], stamp: str) -> Json:
    assert plan.decision is not None
    decision, before = plan.decision, old.get("level") or {}
    last = next((c for c in decision.changes if c.kind == "Level"), None)
    level: Json = {
        "desired": decision.ceiling,
        "floor": decision.floor,
        "seq": decision.memory.seq,
        "applied": measured.applied,
        "reason": last.reason if last else before.get("reason", "Initial"),
        "lastChangeTime": stamp if last or not before else before.get("lastChangeTime", stamp),
    }
    if measured.report.level is not None:
        level["current"] = measured.report.level
    return level


def _figures(report: Report) -> Json:
    figures = {
        "ttftMilliseconds": report.ttft_ms,
        "itlMilliseconds": report.itl_ms,
        "ttftAttainmentPercent": report.ttft_attainment,
        "itlAttainmentPercent": report.itl_attainment,
    }
    return {key: value for key, value in figures.items() if value is not None}


def _decisions(plan: Plan, old: Mapping[str, Any], stamp: str) -> list[Json]:
    changes = plan.decision.changes if plan.decision else ()
    new = [
        {
            "time": stamp,
            "kind": change.kind,
            "from": change.before,
            "to": change.after,
            "reason": change.reason,
            "observed": change.why[:512],
        }
        for change in changes
    ]
    return [*new, *(old.get("decisions") or ())][:MAX_DECISIONS]


def _change_notice(change: Change) -> Notice:
    up = change.after > change.before
    verb = {"Level": ("LevelLowered", "LevelRaised"), "Replicas": ("ScaledDown", "ScaledUp")}
    text = (
        f"{change.kind.lower()} {change.before} to {change.after} ({change.reason}): {change.why}"
    )
    return Notice(change.kind == "Level" and not up, verb[change.kind][up], text)
