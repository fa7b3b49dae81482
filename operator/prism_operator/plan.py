"""The heart: what to do next for one PrismModel, from what is seen and nothing else.

Pure: ``make(...) -> Plan``. The plan is data (apply this, create that, push a level, the status to
have); the shell executes it in order. Each part is a guard that adds actions only where what is
seen differs from what is wanted, so a second pass over its own result is empty, and a pass that was
killed between two actions is finished by the next. The spec is never written.

Decided here: old pods serve until the new artifact is ready. So what is *wanted* and what is
*served* are two hashes, and everything about pods follows the second.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from prism import contract

from prism_operator import manifests, names, quality
from prism_operator.api import Json, Model
from prism_operator.observe import Observed
from prism_operator.pod_words import Trouble
from prism_operator.pods import Context
from prism_operator.refactor_jobs import JobView
from prism_operator.scaler import law
from prism_operator.scaler.model import CostModel
from prism_operator.scaler.state import Decision, Limits, Memory, Pods, Signals

MAX_WARNINGS: Final = 4  # and the length of each, as in the CRD
MAX_WARNING: Final = 512
UNSETTLED_S: Final = 10.0  # look again this soon while something is on its way
# Waits that end with objects whose events wake nobody.
UNWATCHED: Final = ("NameTaken", "CleaningUp", "ClaimNotFound")


@dataclass(frozen=True, slots=True)
class Apply:
    manifest: Json
    manager: str = contract.FIELD_MANAGER


@dataclass(frozen=True, slots=True)
class Create:
    manifest: Json


@dataclass(frozen=True, slots=True)
class Delete:
    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Push:
    """Tell all ready pods the bounds; not a write to the API server."""

    level: Mapping[str, int]


Action = Apply | Create | Delete | Push


@dataclass(frozen=True, slots=True)
class Report:
    """Figures for status, over the window of ``slo.windowSeconds``; None where nothing happened."""

    ttft_ms: int | None = None
    itl_ms: int | None = None
    ttft_attainment: int | None = None
    itl_attainment: int | None = None
    level: int | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What the telemetry knows of one PrismModel; ``applied`` pods hold the newest bounds."""

    signals: Signals | None = None
    costs: CostModel | None = None
    report: Report = field(default_factory=Report)
    source: str = ""
    problem: str = ""
    top_seq: int = 0
    applied: int = 0


@dataclass(frozen=True, slots=True)
class Refactoring:
    """How far the wanted artifact is. ``artifact`` is set once it is ready.

    ``done``: it is there and good enough; one whose levels all fail the quality gate is served at
    100, but is not what was asked for.
    """

    reason: str
    message: str
    artifact: Json | None = None
    failed: bool = False
    gate_failed: bool = False

    @property
    def done(self) -> bool:
        return self.artifact is not None and not self.gate_failed


@dataclass(frozen=True, slots=True)
class Plan:
    """``memory`` is for the next pass of this process; ``served`` the hash of what pods serve."""

    actions: tuple[Action, ...]
    refactoring: Refactoring
    served: str
    decision: Decision | None
    requeue_s: float
    limits: Limits | None = None
    blocked: Trouble | None = None
    refused: Trouble | None = None  # set by the shell: the API server said no to an action

    @property
    def memory(self) -> Memory | None:
        return self.decision.memory if self.decision else None

    @property
    def blind(self) -> bool:
        """Nothing will tell us when the wait is over: the next pass has to list anew."""
        return self.refactoring.reason in UNWATCHED


def make(
    model: Model,
    seen: Observed,
    status: Mapping[str, Any],
    measured: Measured,
    memory: Memory,
    context: Context,
    now: float,
    tick_s: float = 5.0,
) -> Plan:
    """What to do now. ``status`` is the last one written; ``now`` is seconds since the epoch."""
    old = dict(status.get("artifact") or {})
    if seen.foreign:
        return _blocked("NameTaken", f"{', '.join(seen.foreign)} exists and is not ours", old)
    if seen.leftover:
        text = f"waiting for {', '.join(seen.leftover)} of the deleted namesake to go"
        return Plan((), Refactoring("CleaningUp", text), "", None, UNSETTLED_S)
    if model.paused:
        return _blocked("Paused", "spec.paused is true; nothing is changed", old)
    wanted = manifests.artifact_hash(model)
    actions, found = _refactor(model, seen, old, wanted, context)
    refactoring = _warned(_gated(model, found))
    served = wanted if refactoring.artifact else _still_served(seen, old)
    actions = [*_claim(model, seen), *actions, *_superseded(seen, {wanted, served})]
    if not served:
        return Plan(tuple(actions), refactoring, "", None, UNSETTLED_S)
    artifact = refactoring.artifact or old
    limits = limits_of(model, artifact)
    decision = law.decide(
        limits, *_inputs(seen, measured), _pods(model, seen, measured), _known(memory, seen), now
    )
    lowest = _judged(model, artifact).floor if model.refactor.gate else None
    actions += _children(model, seen, context, served, decision, measured, lowest)
    return Plan(tuple(actions), refactoring, served, decision, tick_s, limits)


def _judged(model: Model, artifact: Mapping[str, Any]) -> quality.Verdict:
    return quality.judge(model.refactor.gate, artifact.get("points") or ())


def limits_of(model: Model, artifact: Mapping[str, Any]) -> Limits:
    """The spec's bounds, with the floor raised to what the quality gate lets pass."""
    part = model.elasticity
    gate = _judged(model, artifact).floor
    floor = max(part.min_level, gate)
    top = max(part.max_level, floor)
    fixed = {"Off": contract.MAX_LEVEL, "Manual": max(part.level, gate)}.get(part.mode)
    return Limits(
        floor=floor if fixed is None else fixed,
        top=top if fixed is None else fixed,
        preferred=max(part.preferred_level, floor) if fixed is None else fixed,
        fixed=fixed,
        step=part.step,
        up_window_s=part.up.window_s,
        up_step=part.up.max_step,
        down_window_s=part.down.window_s,
        down_step=part.down.max_step,
        autoscaling=model.autoscaling,
        replicas=model.serving.replicas,
        min_replicas=model.min_replicas,
        max_replicas=model.max_replicas,
        stale_after_s=model.stale_after_s,
        on_loss=model.on_metrics_loss,
        ttft_percentile=model.ttft.percentile if model.ttft else None,
        itl_percentile=model.itl.percentile if model.itl else None,
    )


def _blocked(reason: str, message: str, old: Json) -> Plan:
    waiting = Refactoring(reason, message)
    served = str(old.get("hash") or "")
    return Plan((), waiting, served, None, UNSETTLED_S, blocked=Trouble(reason, message))


def _claim(model: Model, seen: Observed) -> list[Action]:
    if model.cache.create is None:
        return []
    return _unless_same(seen, manifests.claim(model))


def _refactor(
    model: Model, seen: Observed, old: Json, wanted: str, context: Context
) -> tuple[list[Action], Refactoring]:
    """Bring the wanted artifact about: one Job, named by a hash of its inputs."""
    job = next((job for job in seen.jobs if job.artifact == wanted), None)
    if old.get("hash") == wanted:
        return [], Refactoring("Refactored", _summary(old), old)
    if job is None:
        if missing := [name for name, phase in (seen.claims or {}).items() if phase == "Missing"]:
            text = f"claim {', '.join(missing)} does not exist in namespace {model.namespace}"
            return [], Refactoring("ClaimNotFound", text)
        return [Create(manifests.job(model, context))], Refactoring("Starting", "the Job is made")
    if job.going:
        return [], Refactoring("Restarting", f"Job {job.name} is being deleted, then tried again")
    if job.state == "Complete":
        return _completed(model, job, wanted)
    retry = job.settings != manifests.job_hash(model)
    if job.state == "Failed" and retry:
        text = f"Job {job.name} is tried again with its new settings"
        return [Delete("Job", job.name)], Refactoring("Restarting", text)
    if job.state == "Failed":
        trouble = job.trouble or Trouble("JobFailed", f"Job {job.name} failed")
        text = f"{trouble.message} (to try again, delete Job {job.name})"
        return [], Refactoring(trouble.reason, text, failed=True)
    if job.trouble:
        return [], Refactoring(job.trouble.reason, job.trouble.message)
    return [], Refactoring("Running", f"Job {job.name} is running")


def _completed(model: Model, job: JobView, wanted: str) -> tuple[list[Action], Refactoring]:
    if job.result is None and not job.has_pod:
        # The pod is gone, and its words with it. A new one verifies and says them again.
        text = f"Job {job.name} ended and its pod is gone; it runs again to verify the artifact"
        return [Delete("Job", job.name)], Refactoring("Verifying", text)
    if job.result is None or job.result.get("result") != "ok":
        text = f"Job {job.name} succeeded without a readable result (to run it again, delete it)"
        return [], Refactoring("NoResult", text, failed=True)
    try:
        artifact = _artifact(model, job.result, wanted)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        text = f"the result of Job {job.name} cannot be used: {type(error).__name__} {error}"
        return [], Refactoring("NoResult", f"{text} (to run it again, delete it)", failed=True)
    return [], Refactoring("Refactored", _summary(artifact), artifact)


def _artifact(model: Model, result: Mapping[str, Any], wanted: str) -> Json:
    """The artifact as status shows it; integers only, as Kubernetes asks of an API."""
    warnings = [str(one)[:MAX_WARNING] for one in result.get("warnings") or ()][:MAX_WARNINGS]
    facts = {
        "hash": wanted,
        "path": names.artifact_path(model.cache.sub_path, wanted),
        "digest": result.get("digest"),
        "revision": result.get("revision"),
        "architecture": result.get("architecture"),
        "subExperts": result.get("sub_experts"),
        "refactorSeconds": round(float(result.get("seconds") or 0)),
        "warnings": warnings or None,
        "points": quality.points(result),
    }
    return {key: value for key, value in facts.items() if value not in (None, "")}


def _gated(model: Model, found: Refactoring) -> Refactoring:
    """What the quality gate says of an artifact that is ready."""
    if model.refactor.gate is None or found.artifact is None:
        return found
    verdict = _judged(model, found.artifact)
    if verdict.failed:
        return replace(found, reason="QualityGateFailed", message=verdict.text, gate_failed=True)
    return replace(found, reason="QualityGatePassed", message=f"{found.message}; {verdict.text}")


def _warned(found: Refactoring) -> Refactoring:
    """What the Job found odd about the calibration text stands where its result is told."""
    warnings = (found.artifact or {}).get("warnings") or ()
    return replace(found, message="; ".join((found.message, *(f"warning: {w}" for w in warnings))))


def _summary(artifact: Mapping[str, Any]) -> str:
    points = artifact.get("points") or ()
    losses = ", ".join(
        f"{p['lossBasisPoints'] / 100:.2f} % at level {p['levelPercent']}" for p in points
    )
    return f"artifact {artifact.get('hash')} is ready" + (f"; loss {losses}" if losses else "")


def _still_served(seen: Observed, old: Json) -> str:
    """What pods go on serving while the wanted artifact is not ready."""
    if old.get("hash"):
        return str(old["hash"])
    return seen.deployment.artifact if seen.deployment else ""


def _superseded(seen: Observed, needed: set[str]) -> list[Action]:
    return [
        Delete("Job", job.name) for job in seen.jobs if job.artifact not in needed and not job.going
    ]


def _inputs(seen: Observed, measured: Measured) -> tuple[Signals | None, CostModel | None]:
    return (measured.signals if seen.ready_pods else None), measured.costs


def _pods(model: Model, seen: Observed, measured: Measured) -> Pods:
    first = model.min_replicas if model.autoscaling else model.serving.replicas
    wanted = seen.deployment.replicas if seen.deployment else first
    return Pods(wanted=wanted, ready=len(seen.ready_pods), seq=measured.top_seq)


def _known(memory: Memory, seen: Observed) -> Memory:
    """Without a ready pod there is nothing to measure, which is no loss of metrics."""
    return memory if seen.ready_pods else replace(memory, last_data=None)


def _children(
    model: Model,
    seen: Observed,
    context: Context,
    served: str,
    decision: Decision,
    measured: Measured,
    lowest: int | None,
) -> list[Action]:
    level = {
        "seq": decision.memory.seq,
        "floor": decision.floor,
        "ceiling": decision.ceiling,
    }
    control = manifests.control(model, level, decision.memory.to_json(), lowest)
    actions: list[Action] = []
    files = (contract.LEVEL_FILE, contract.SLO_FILE)
    if any((seen.control or {}).get(file) != control["data"][file] for file in files):
        actions.append(Apply(control))
    if decision.write or measured.applied < len(seen.ready_pods):
        actions.append(Push(level))
    actions += _unless_same(seen, manifests.service(model))
    actions += _unless_same(seen, manifests.network_policy(model, context))
    # The hash leaves the operator's settings out, so that an upgrade rolls no pod. The admin key is
    # the exception: pods that know another one take nothing from this operator.
    token = names.admin_token_sha256(context.admin_key, model.uid)
    wanted = manifests.serving_hash(model, served), token
    there = seen.deployment
    if there is None or (there.spec_hash, there.token_sha256) != wanted:
        actions.append(Apply(manifests.deployment(model, context, served)))
    current = seen.deployment.replicas if seen.deployment else 1
    if decision.replicas != current:
        count = manifests.replicas(model, decision.replicas)
        actions.append(Apply(count, contract.FIELD_MANAGER_SCALER))
    return actions


def _unless_same(seen: Observed, manifest: Json) -> list[Action]:
    key = (manifest["kind"], manifest["metadata"]["name"])
    wanted = manifest["metadata"]["annotations"][contract.ANNOTATION_HASH]
    return [] if (seen.hashes or {}).get(key) == wanted else [Apply(manifest)]
