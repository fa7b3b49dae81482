"""The operator's own metrics: no colons, base units, labels namespace and name.

It knows names; it decides nothing. Outside scalers may follow ``prism_desired_replicas``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prism_operator.api import Json
from prism_operator.plan import Measured, Plan

WRITES: Final = "prism_api_writes_total"
SECONDS: Final = "prism_reconcile_seconds"
_OBJECT = ("namespace", "name")


@dataclass(slots=True)
class Meters:
    """One registry per operator, so that tests do not share one."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    desired_replicas: Gauge = field(init=False)
    current_replicas: Gauge = field(init=False)
    desired_level: Gauge = field(init=False)
    metrics_age: Gauge = field(init=False)
    phase: Gauge = field(init=False)
    decisions: Counter = field(init=False)
    writes: Counter = field(init=False)
    errors: Counter = field(init=False)
    seconds: Histogram = field(init=False)
    _phases: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, (*_OBJECT, *labels), registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*_OBJECT, *labels), registry=self.registry)

        self.desired_replicas = gauge("prism_desired_replicas", "Replicas decided.")
        self.current_replicas = gauge("prism_current_replicas", "Pods that are ready.")
        self.desired_level = gauge("prism_desired_level_ratio", "Ceiling of the level, 0 to 1.")
        self.metrics_age = gauge("prism_metrics_age_seconds", "Age of the newest sample.")
        self.phase = gauge("prism_model_phase", "1 for the phase it is in.", "phase")
        self.decisions = counter("prism_controller_decisions", "Decisions.", "kind", "reason")
        self.writes = counter(WRITES, "Writes sent to the API server.", "kind")
        self.errors = counter("prism_reconcile_errors", "Passes that failed.")
        self.seconds = Histogram(SECONDS, "Time of a pass.", registry=self.registry)

    def plan(self, namespace: str, name: str, plan: Plan, measured: Measured, now: float) -> None:
        """What one pass decided."""
        if plan.decision is None:
            return
        self.desired_replicas.labels(namespace, name).set(plan.decision.replicas)
        self.desired_level.labels(namespace, name).set(plan.decision.ceiling / 100)
        if measured.signals:
            self.metrics_age.labels(namespace, name).set(max(0.0, now - measured.signals.at))
        for change in plan.decision.changes:
            self.decisions.labels(namespace, name, change.kind, change.reason).inc()

    def status(self, namespace: str, name: str, status: Json) -> None:
        """What is so now."""
        self.current_replicas.labels(namespace, name).set(status.get("readyReplicas", 0))
        phase, last = str(status.get("phase", "")), self._phases.get((namespace, name))
        if last is not None and last != phase:
            self.phase.remove(namespace, name, last)
        self._phases[namespace, name] = phase
        self.phase.labels(namespace, name, phase).set(1)

    def forget(self, namespace: str, name: str) -> None:
        """Take the object's series away, so that nobody reads a dead one."""
        self._phases.pop((namespace, name), None)
        chosen: dict[str, str] = {"namespace": namespace, "name": name}
        for metric in (
            self.desired_replicas, self.current_replicas, self.desired_level, self.metrics_age,
            self.phase, self.decisions, self.writes, self.errors,
        ):  # fmt: skip
            remove: Callable[[dict[str, str]], None] = metric.remove_by_labels
            remove(chosen)

    def text(self) -> bytes:
        return generate_latest(self.registry)
