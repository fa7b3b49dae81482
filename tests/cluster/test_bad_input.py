"""Bad input ends in a condition with a reason a person can act on, and in no crash loop."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prism import contract

from hack.cluster.made import SYSTEM
from hack.demo import observe
from hack.demo.journey import EXAMPLE, Served
from hack.demo.kube import Json, Kube, TookTooLong, wait_until
from hack.demo.site import Site

CLAIM = "tiny-moe-model"
DAMAGE = """
import os, shutil
for name in ("corrupt", "short"):
    shutil.rmtree(f"/models/{name}", ignore_errors=True)
    shutil.copytree("/models/tiny-moe", f"/models/{name}", copy_function=shutil.copyfile)
with open("/models/corrupt/model.safetensors", "r+b") as file:
    file.write(b"\\xff" * 64)
os.truncate("/models/short/model.safetensors", 1_000_000)
"""


def example_model() -> Json:
    documents = yaml.safe_load_all(EXAMPLE.read_text())
    found: Json = next(d for d in documents if d["kind"] == contract.KIND)
    return found


def with_spec(name: str, uri: str, refactor: dict[str, Any]) -> Json:
    """The example under another name, without pods, with another source."""
    model = copy.deepcopy(example_model())
    model["metadata"]["name"] = name
    model["spec"]["model"] = {"uri": uri}
    model["spec"]["refactor"] |= refactor
    model["spec"]["serving"]["replicas"] = 0
    model["spec"]["autoscaling"] = {"mode": "Off"}
    return model


@pytest.fixture(scope="module")
def damaged(place: Site, served: Served) -> None:
    """Beside the good model in its claim: one with a broken header, one cut short."""
    job: Json = next(d for d in yaml.safe_load_all(EXAMPLE.read_text()) if d["kind"] == "Job")
    job["metadata"]["name"] = "damage"
    container = job["spec"]["template"]["spec"]["containers"][0]
    container["image"] = place.images["example-model"]
    container |= {"command": ["python3", "-c", DAMAGE], "args": []}
    place.kube.run("apply", "-f", "-", stdin=json.dumps(job))
    place.kube.run("wait", "--for=condition=complete", "job/damage", "--timeout=90s")


@pytest.fixture
def applied(place: Site) -> Iterator[list[str]]:
    """Names to remove afterwards."""
    names: list[str] = []
    yield names
    for name in names:
        place.kube.run("delete", "prismmodel", name, "--wait", "--timeout=60s", timeout_s=90)


def refused(kube: Kube, name: str, timeout_s: float = 180) -> Json:
    """The condition Refactored once it is False for good."""

    def failed() -> Json | None:
        document = kube.get("prismmodel", name)
        if document.get("status", {}).get("phase") != "Failed":
            return None
        return observe.condition(document, "Refactored")

    try:
        return wait_until(failed, timeout_s, f"phase Failed of {name}", every_s=2)
    except TookTooLong as late:
        seen = kube.get("prismmodel", name).get("status")
        raise AssertionError(f"{late}; its status: {json.dumps(seen)}") from None


@pytest.mark.parametrize(
    ("name", "path", "refactor", "reason", "words"),
    [
        ("no-path", "nowhere", {}, "SourceNotFound", "nowhere"),
        ("corrupt", "corrupt", {}, "CorruptCheckpoint", "model.safetensors"),
        ("short", "short", {}, "CorruptCheckpoint", "model.safetensors"),
        (
            "no-memory",
            "tiny-moe",
            {"backoffLimit": 0, "resources": {"limits": {"memory": "64Mi"}}},
            "OutOfMemory",
            "memory",
        ),
    ],
)
def test_refactoring_that_cannot_work_says_why(
    place: Site, damaged: None, applied: list[str],
    name: str, path: str, refactor: dict[str, Any], reason: str, words: str,
) -> None:  # fmt: skip
    model = with_spec(name, f"pvc://{CLAIM}/{path}", refactor)
    place.kube.run("apply", "-f", "-", stdin=json.dumps(model))
    applied.append(name)
    condition = refused(place.kube, name)
    assert condition["status"] == "False"
    assert condition["reason"] == reason
    assert words in condition["message"]
    children = place.kube.get("deployments", "-l", f"{contract.LABEL_MODEL}={name}")["items"]
    assert children == [], "nothing half-written is served"


def test_a_claim_that_does_not_exist_is_named(place: Site, applied: list[str]) -> None:
    model = with_spec("no-claim", "pvc://no-such-claim/tiny-moe", {})
    place.kube.run("apply", "-f", "-", stdin=json.dumps(model))
    applied.append("no-claim")

    def told() -> Json | None:
        found = observe.condition(place.kube.get("prismmodel", "no-claim"), "Refactored")
        return found if found.get("reason") == "ClaimNotFound" else None

    assert "no-such-claim" in wait_until(told, 60, "reason ClaimNotFound")["message"]


def test_the_api_server_refuses_contradictions_with_words(place: Site, served: Served) -> None:
    model = with_spec("contradiction", "pvc://c/p", {})
    model["spec"]["elasticity"] = {"minLevelPercent": 80, "maxLevelPercent": 50}
    with pytest.raises(Exception, match="minLevelPercent must not be above maxLevelPercent"):
        place.kube.run("apply", "-f", "-", stdin=json.dumps(model))


def test_the_operator_took_no_harm(place: Site, served: Served) -> None:
    (pod,) = place.inside(SYSTEM).get("pods", "-l", "app.kubernetes.io/name=prism-operator")[
        "items"
    ]
    assert [c["restartCount"] for c in pod["status"]["containerStatuses"]] == [0]
