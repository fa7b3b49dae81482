"""One operator's reconciler on the fake cluster, with a clock that tests turn by hand."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from prism_operator import meters
from prism_operator.api import Model
from prism_operator.kube import KubeError
from prism_operator.observe import PodView
from prism_operator.plan import Measured, Report
from prism_operator.pods import Context
from prism_operator.reconcile import Reconciler
from prism_operator.scaler.model import CostModel, Demand, LevelCost
from prism_operator.scaler.state import Signals
from prism_operator.telemetry import Telemetry

from . import controllers
from .cluster import FakeCluster, FakeGateway, Write

Json = dict[str, Any]
COSTS = CostModel(tuple(LevelCost(n, 0.0005 * n / 100, 0.0) for n in (25, 50, 75, 100)))


@dataclass
class FakeTelemetry:
    """What the pods and Prometheus would say; ``pushed`` is what the pods were told."""

    measured: Measured = field(default_factory=Measured)
    pushed: list[Mapping[str, int]] = field(default_factory=list)

    async def measure(
        self, model: Model, pods: Sequence[PodView], seq: int, token: str
    ) -> Measured:
        known = self.pushed[-1]["seq"] if self.pushed else 0
        return replace(self.measured, top_seq=known, applied=len(pods) if known >= seq else 0)

    async def push(self, pods: Sequence[PodView], level: Mapping[str, int], token: str) -> int:
        if pods:
            self.pushed.append(level)
        return len(pods)

    def forget(self, key: str) -> None:
        pass


@dataclass
class Operator:
    """``restart`` forgets everything a process forgets."""

    context: Context
    cluster: FakeCluster = field(default_factory=FakeCluster)
    telemetry: FakeTelemetry = field(default_factory=FakeTelemetry)
    now: float = 1_000_000.0
    name: str = "tiny"

    def __post_init__(self) -> None:
        self.restart()

    def restart(self, **change: Any) -> None:
        self.context = replace(self.context, **change)
        self.reconciler = Reconciler(
            FakeGateway(self.cluster),
            cast(Telemetry, self.telemetry),  # the same three methods
            self.context,
            clock=lambda: self.now,
        )

    # -- what people and controllers do

    def apply(self, body: Json) -> None:
        self.cluster.put_new("prismmodels", body)
        if not self.cluster.get("persistentvolumeclaims", "llm", "models"):
            self.claim("models")

    def claim(self, name: str) -> None:
        meta = {"name": name, "namespace": "llm"}
        body = {"metadata": meta, "spec": {}, "status": {"phase": "Bound"}}
        self.cluster.put_new("persistentvolumeclaims", body)

    def edit_spec(self, **change: Any) -> None:
        def edit(body: Json) -> None:
            for key, value in change.items():
                part = body["spec"].setdefault(key, {})
                if isinstance(value, dict):
                    part.update(value)
                else:
                    body["spec"][key] = value

        self.cluster.edit("prismmodels", "llm", self.name, edit)

    # -- passes

    def step(self, woken: bool = True) -> float:
        body = self.cluster.get("prismmodels", "llm", self.name)
        assert body is not None
        return asyncio.run(self.reconciler.step(body, woken=woken))

    def settle(self, finish: bool = True, ready: bool = True, passes: int = 30) -> None:
        """Passes and controllers in turn until nothing is written or changed any more."""
        for _ in range(passes):
            before = len(self.cluster.writes)
            self.now += 1
            self.step()
            moved = bool(finish and controllers.finish_jobs(self.cluster))
            moved |= controllers.run_deployments(self.cluster, ready=ready)
            if len(self.cluster.writes) == before and not moved:
                return
        raise AssertionError(f"no fixpoint: {self.cluster.writes[-4:]}")

    def settle_with_errors(self, passes: int = 40) -> None:
        """As ``settle``, for an operator that is killed by the cluster's ``fault``."""
        for _ in range(passes):
            before = len(self.cluster.writes)
            self.now += 1
            moved = False
            try:
                self.step()
            except KubeError:
                self.restart()
                moved = True
            moved |= bool(controllers.finish_jobs(self.cluster))
            moved |= controllers.run_deployments(self.cluster)
            if len(self.cluster.writes) == before and not moved:
                return
        raise AssertionError("no fixpoint")

    # -- looking

    def idle(self, seconds: float, tick: float = 5.0, woken: bool = False) -> list[Write]:
        """Let time pass with ticks, or wakes; returns what was written meanwhile."""
        before, until = len(self.cluster.writes), self.now + seconds
        while self.now < until:
            self.now += tick
            self.step(woken=woken)
        return self.cluster.writes[before:]

    def sent(self) -> float:
        """What the process's own counter of writes says."""
        return sum(
            sample.value
            for metric in self.reconciler.meters.writes.collect()
            for sample in metric.samples
            if sample.name == meters.WRITES
        )

    @property
    def status(self) -> Json:
        body = self.cluster.get("prismmodels", "llm", self.name)
        assert body is not None
        return dict(body.get("status") or {})

    def condition(self, kind: str) -> tuple[str, str, str]:
        """(status, reason, message) of a condition; empty where there is none."""
        for one in self.status.get("conditions", ()):
            if one["type"] == kind:
                return one["status"], one["reason"], one["message"]
        return "", "", ""

    def writes(self, plural: str, verb: str = "") -> list[Write]:
        return [
            w for w in self.cluster.writes if w.plural == plural and (not verb or w.verb == verb)
        ]

    def deployment(self) -> Json:
        found = self.cluster.get("deployments", "llm", self.name)
        assert found is not None
        return found

    def job(self) -> Json:
        (found,) = self.cluster.list("jobs")
        return found

    def level(self) -> Json:
        return self.control("level.json")

    def control(self, file: str) -> Json:
        import json

        config = self.cluster.get("configmaps", "llm", f"{self.name}-control")
        assert config is not None
        content: Json = json.loads(config["data"][file])
        return content


def traffic(op: Operator, requests: float, report: Report | None = None) -> None:
    """What the pods are offered from now on: requests/s of 400 prompt tokens each."""
    signals = Signals(at=op.now, demand=Demand(requests, 400 * requests, 0))
    op.telemetry.measured = Measured(signals, COSTS, report or Report(), "Prometheus")
