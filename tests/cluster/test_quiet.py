"""An idle operator sends no write: nothing it owns or writes to gets a new version."""

import time

from prism import contract

from hack.demo.journey import MODEL, Served
from hack.demo.kube import Json, Kube, wait_until
from hack.demo.site import Site

IDLE_S = 120
KINDS = "prismmodels,configmaps,deployments,services,networkpolicies,persistentvolumeclaims,jobs"


def versions(kube: Kube) -> dict[str, str]:
    """kind/name -> resourceVersion, of all in the namespace that the operator may write."""
    items = kube.get(KINDS)["items"]
    return {f"{i['kind']}/{i['metadata']['name']}": i["metadata"]["resourceVersion"] for i in items}


def operator_events(kube: Kube) -> set[str]:
    """Events that the operator sent, by version."""
    found = (e for e in kube.get("events")["items"] if e["involvedObject"]["kind"] == contract.KIND)
    return {f"{e['reason']}/{e['metadata']['resourceVersion']}" for e in found}


def no_traffic(document: Json) -> bool:
    conditions = document["status"]["conditions"]
    return any(c["type"] == "SLOMet" and c["reason"] == "NoTraffic" for c in conditions)


def test_idle_operator_writes_nothing(place: Site, served: Served) -> None:
    # The reporting window has to run empty first; what is written for that is no idle write.
    wait_until(lambda: no_traffic(place.kube.get("prismmodel", MODEL)) or None, 180, "NoTraffic", 5)
    time.sleep(45)  # figures that waited for their turn are written by now
    before, events = versions(place.kube), operator_events(place.kube)
    assert f"PrismModel/{MODEL}" in before and f"ConfigMap/{MODEL}-control" in before
    time.sleep(IDLE_S)
    assert versions(place.kube) == before
    assert operator_events(place.kube) == events
