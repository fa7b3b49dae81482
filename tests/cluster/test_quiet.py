"""An idle operator sends no write: its own counter stands still while its loop goes on.

The objects are compared as well: a write that the counter does not know (Kopf's own) would give one
of them a new version. Nothing but this operator writes to them.
"""

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prism import contract
from prism_operator import meters

from hack.cluster.made import SYSTEM
from hack.demo.journey import MODEL, Served
from hack.demo.kube import Json, Kube, wait_until
from hack.demo.observe import condition, total
from hack.demo.site import Site

from .disturb import container_status, pods

IDLE_S = 120
TICK_S = 5  # the operator's own, where the chart sets no other
KINDS = "prismmodels,configmaps,deployments,services,networkpolicies,persistentvolumeclaims,jobs"
OPERATOR = ",".join(f"{k}={v}" for k, v in contract.OPERATOR_POD_LABELS.items())
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "idle.json"


@dataclass(frozen=True, slots=True)
class Counted:
    """What the operator's process says of itself; ``container`` changes when it starts anew."""

    container: str
    writes: float
    passes: float


def counted(system: Kube) -> Counted:
    """Reads the metrics port through the API server, which is no load on the pod's own client."""
    (pod,) = pods(system, OPERATOR)
    name = f"{pod['metadata']['name']}:{contract.OPERATOR_METRICS_PORT}"
    path = f"/api/v1/namespaces/{system.namespace}/pods/{name}/proxy{contract.PATH_METRICS}"
    page = system.run("get", "--raw", path)
    status = container_status(pod, "operator")
    assert status is not None
    passes = total(page, f"{meters.SECONDS}_count")
    return Counted(status["containerID"], total(page, meters.WRITES), passes)


def versions(kube: Kube) -> dict[str, str]:
    """kind/name -> resourceVersion, of all in the namespace that the operator may write."""
    items = kube.get(KINDS)["items"]
    return {f"{i['kind']}/{i['metadata']['name']}": i["metadata"]["resourceVersion"] for i in items}


def operator_events(kube: Kube) -> set[str]:
    """Events that the operator sent, by version."""
    found = (e for e in kube.get("events")["items"] if e["involvedObject"]["kind"] == contract.KIND)
    return {f"{e['reason']}/{e['metadata']['resourceVersion']}" for e in found}


def no_traffic(document: Json) -> bool:
    return condition(document, "SLOMet").get("reason") == "NoTraffic"


def write_result(seconds: float, writes: float, passes: float, objects: int) -> None:
    """Keeps the figure, also one that fails the test."""
    figures = {
        "command": "make test",
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(seconds),
        "writes": round(writes),
        "passes": round(passes),
        "objects_watched": objects,
    }
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


def test_idle_operator_writes_nothing(place: Site, served: Served) -> None:
    system = place.inside(SYSTEM)
    # The reporting window has to run empty first; what is written for that is no idle write.
    wait_until(lambda: no_traffic(place.kube.get("prismmodel", MODEL)) or None, 180, "NoTraffic", 5)
    time.sleep(45)  # figures that waited for their turn are written by now
    before, events = versions(place.kube), operator_events(place.kube)
    assert f"PrismModel/{MODEL}" in before and f"ConfigMap/{MODEL}-control" in before
    first, begin = counted(system), time.monotonic()
    time.sleep(IDLE_S)
    last, took = counted(system), time.monotonic() - begin
    assert last.container == first.container, "a new process counts from zero"
    writes, passes = last.writes - first.writes, last.passes - first.passes
    write_result(took, writes, passes, len(before))
    assert first.writes > 0, "it has written for this model: a counter at zero is not its counter"
    assert passes >= IDLE_S / TICK_S / 2, "it has to look while it writes nothing"
    assert writes == 0
    assert versions(place.kube) == before
    assert operator_events(place.kube) == events
