"""Without the operator serving goes on, and a pod that starts then has the last bounds."""

from collections.abc import Iterator

import pytest
from prism import contract

from hack.cluster.made import SYSTEM
from hack.demo import ask, journey, observe
from hack.demo.journey import MODEL, Served
from hack.demo.kube import Kube, wait_until
from hack.demo.load import Client, Target
from hack.demo.site import Site

from .disturb import pods

SERVING = f"{contract.LABEL_MODEL}={MODEL},{contract.LABEL_ROLE}={contract.ROLE_SERVING}"
LEVEL = 50


def scale_operator(place: Site, count: int) -> None:
    system = place.inside(SYSTEM)
    system.run("scale", "deployment/prism-operator", f"--replicas={count}")
    if count:
        system.run("rollout", "status", "deployment/prism-operator", "--timeout=120s")
    else:
        selector = ",".join(f"{k}={v}" for k, v in contract.OPERATOR_POD_LABELS.items())
        wait_until(lambda: not pods(system, selector) or None, 60, "end of the operator's pod")


@pytest.fixture
def without_operator(place: Site, served: Served) -> Iterator[Kube]:
    """Bounds 50-50 in the pods, then no operator."""
    elasticity = {"mode": "Manual", "levelPercent": LEVEL}
    place.kube.patch_model(MODEL, {"elasticity": elasticity})
    journey.wait_for_bounds(served.watched, LEVEL, LEVEL)
    scale_operator(place, 0)
    try:
        yield place.kube
    finally:
        scale_operator(place, 1)
        place.kube.patch_model(MODEL, {"elasticity": {"mode": "Auto", "levelPercent": None}})
        journey.wait_for_bounds(served.watched, served.targets.floor, 100)


async def test_serving_goes_on_and_a_new_pod_starts_with_the_last_bounds(
    without_operator: Kube, served: Served
) -> None:
    ask.first_token(served.watched.url, MODEL)
    (old,) = pods(without_operator, SERVING)
    without_operator.run("delete", "pod", old["metadata"]["name"], "--wait", timeout_s=180)

    def back() -> bool | None:
        found = pods(without_operator, SERVING)
        ready = found and all(
            any(c["type"] == "Ready" and c["status"] == "True" for c in p["status"]["conditions"])
            for p in found
        )
        return True if ready and found[0]["metadata"]["uid"] != old["metadata"]["uid"] else None

    wait_until(back, 180, "a new ready pod", every_s=1)
    async with Client(Target(served.watched.url, MODEL), ["The with statement"]) as client:
        sent = await client.one(0.0)
        page = await client._http.get(contract.PATH_METRICS)
    assert sent.ok and sent.level == LEVEL
    for name in (contract.Metric.LEVEL_FLOOR, contract.Metric.LEVEL_CEILING):
        assert observe.gauge(page.text, name) == LEVEL / 100
