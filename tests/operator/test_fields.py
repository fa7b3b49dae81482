"""Every field of the spec does something: a table over the leaves of the schema.

A leaf without a row fails, so a field cannot be added before it has an effect. Each row names the
part of the operator's behaviour that must change with it; the parts are pure results, and what they
do in a cluster is tested elsewhere.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prism_operator import api, manifests, plan
from prism_operator.observe import Observed
from prism_operator.pods import Context
from prism_operator.scaler.state import Memory

Json = dict[str, Any]
Make = Callable[..., Json]
HUB = {"model": {"uri": "hf://a/b"}}
MADE = {"cache": {"pvc": None, "create": {"size": "5Gi"}}}
GPU = {"serving": {"accelerator": {"resourceName": "nvidia.com/gpu"}}}
SECRET = {"model": {"uri": "hf://a/b", "credentials": {"secretRef": {"name": "hf"}}}}
MANUAL = {"elasticity": {"mode": "Manual", "levelPercent": 60}}
POINTS = [{"levelPercent": n, "lossBasisPoints": loss, "klBasisPoints": 3 * loss}
          for n, loss in ((50, 100), (25, 500))]  # fmt: skip
GATE = {"refactor": {"qualityGate": {"metric": "perplexity", "maxIncreasePercent": 2}}}

# path -> (what else the object needs, new value, the behaviour that must change)
CASES: dict[str, tuple[Json, Any, str]] = {
    "model.uri": ({}, "pvc://models/other", "job"),
    "model.revision": (HUB, "v2", "job"),
    "model.name": ({}, "other", "deployment"),
    "model.credentials.secretRef.name": (SECRET, "other", "job"),
    "model.credentials.secretRef.key": (SECRET, "other", "job"),
    "cache.pvc.claimName": ({}, "other", "job"),
    "cache.pvc.subPath": ({}, "other", "deployment"),
    "cache.create.size": (MADE, "9Gi", "claim"),
    "cache.create.storageClassName": (MADE, "fast", "claim"),
    "cache.create.accessModes": (MADE, ["ReadWriteMany"], "claim"),
    "cache.reclaimPolicy": (MADE, "Delete", "claim"),
    "refactor.subExperts": ({}, 16, "job"),
    "refactor.seed": ({}, 7, "job"),
    "refactor.calibration.uri": ({}, "pvc://text/c4.jsonl", "job"),
    "refactor.calibration.tokens": ({}, 4096, "job"),
    "refactor.qualityGate.metric": (GATE, "kl", "limits"),
    "refactor.qualityGate.maxIncreasePercent": (GATE, 0.5, "limits"),
    "refactor.parallelism": ({}, 4, "job"),
    "refactor.resources.requests": ({}, {"cpu": "1"}, "job"),
    "refactor.resources.limits": ({}, {"memory": "2Gi"}, "job"),
    "refactor.activeDeadlineSeconds": ({}, 100, "job"),
    "refactor.backoffLimit": ({}, 1, "job"),
    "serving.replicas": ({}, 3, "limits"),
    "serving.image": ({}, "mine:1", "deployment"),
    "serving.dtype": ({}, "float32", "deployment"),
    "serving.resources.requests": ({}, {"cpu": "1"}, "deployment"),
    "serving.resources.limits": ({}, {"cpu": "2500m"}, "deployment"),
    "serving.accelerator.resourceName": (GPU, "amd.com/gpu", "deployment"),
    "serving.accelerator.count": (GPU, 2, "deployment"),
    "serving.drainSeconds": ({}, 5, "deployment"),
    "slo.ttft.targetMilliseconds": ({}, 100, "control"),
    "slo.ttft.percentile": ({}, 99, "limits"),
    "slo.itl.targetMilliseconds": ({"slo": {"itl": {"targetMilliseconds": 9}}}, 20, "control"),
    "slo.itl.percentile": ({"slo": {"itl": {"targetMilliseconds": 9}}}, 50, "limits"),
    "slo.windowSeconds": ({}, 60, "window"),
    "elasticity.mode": ({}, "Off", "limits"),
    "elasticity.minLevelPercent": ({}, 40, "limits"),
    "elasticity.maxLevelPercent": ({}, 80, "limits"),
    "elasticity.preferredLevelPercent": ({}, 70, "limits"),
    "elasticity.levelPercent": (MANUAL, 50, "limits"),
    "elasticity.stepPercent": ({}, 10, "limits"),
    "elasticity.behavior.up.stabilizationWindowSeconds": ({}, 60, "limits"),
    "elasticity.behavior.up.maxStepPercent": ({}, 10, "limits"),
    "elasticity.behavior.down.stabilizationWindowSeconds": ({}, 60, "limits"),
    "elasticity.behavior.down.maxStepPercent": ({}, 10, "limits"),
    "autoscaling.mode": ({}, "Auto", "limits"),
    "autoscaling.minReplicas": ({"autoscaling": {"mode": "Auto"}}, 2, "limits"),
    "autoscaling.maxReplicas": ({"autoscaling": {"mode": "Auto"}}, 4, "limits"),
    "metrics.staleAfterSeconds": ({}, 30, "limits"),
    "metrics.onMetricsLoss": ({}, "MinLevel", "limits"),
    "paused": ({}, True, "actions"),
}  # fmt: skip


def leaves(schema: Json, path: str = "") -> Iterator[str]:
    if schema.get("type") == "object" and "properties" in schema:
        for name, part in schema["properties"].items():
            yield from leaves(part, f"{path}.{name}" if path else name)
    else:
        yield path


def spec_schema(crd: Json) -> Json:
    schema: Json = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return schema


def behaviour(body: Json, context: Context, part: str) -> Any:
    model = api.parse(body)
    if part == "claim":
        return manifests.claim(model)
    if part == "job":
        return manifests.job(model, context)
    if part == "deployment":
        artifact = manifests.artifact_hash(model)
        made = manifests.deployment(model, context, artifact)
        return made["spec"], made["metadata"]["annotations"]
    if part == "control":
        return manifests.control(model, {}, {})["data"]
    if part == "limits":
        return plan.limits_of(model, {"points": POINTS})
    if part == "window":
        return model.slo_window_s
    seen = Observed(claims={"models": "Bound"})
    return plan.make(model, seen, {}, plan.Measured(), Memory(), context, 1.0).actions


def test_every_field_has_a_row(crd: Json) -> None:
    assert set(leaves(spec_schema(crd))) == set(CASES)


@pytest.mark.parametrize("path", CASES)
def test_changing_the_field_changes_the_behaviour(
    make_body: Make, context: Context, path: str
) -> None:
    needs, value, part = CASES[path]
    before = behaviour(make_body(**needs), context, part)
    body = make_body(**needs)
    *parents, last = path.split(".")
    here = body["spec"]
    for name in parents:
        here = here.setdefault(name, {})
    assert here.get(last) != value
    here[last] = value
    assert behaviour(body, context, part) != before


POD_FIELDS = (
    "serving.image",
    "serving.dtype",
    "serving.drainSeconds",
    "serving.resources.limits",
    "model.name",
    "model.uri",
)


@pytest.mark.parametrize("path", POD_FIELDS)
def test_what_pods_are_made_from_changes_their_hash(
    make_body: Make, context: Context, path: str
) -> None:
    def digest(body: Json) -> str:
        model = api.parse(body)
        return manifests.serving_hash(model, manifests.artifact_hash(model))

    body, (_, value, _) = make_body(), CASES[path]
    *parents, last = path.split(".")
    here = body["spec"]
    for name in parents:
        here = here.setdefault(name, {})
    here[last] = value
    assert digest(body) != digest(make_body())


@pytest.mark.parametrize(
    "change",
    [
        {"serving": {"replicas": 4}},
        {"slo": {"ttft": {"targetMilliseconds": 1}}},
        {"elasticity": {"minLevelPercent": 30}},
        {"autoscaling": {"mode": "Auto", "maxReplicas": 3}},
    ],
)
def test_what_pods_are_not_made_from_does_not_restart_them(make_body: Make, change: Json) -> None:
    first, second = api.parse(make_body()), api.parse(make_body(**change))
    assert manifests.serving_hash(first, "a") == manifests.serving_hash(second, "a")
    assert manifests.artifact_hash(first) == manifests.artifact_hash(second)


def test_every_list_map_string_and_integer_of_the_spec_is_bounded(crd: Json) -> None:
    def walk(schema: Json, path: str) -> Iterator[str]:
        kind = schema.get("type")
        if schema.get("x-kubernetes-int-or-string") or kind == "string":
            if not ({"maxLength", "enum"} & set(schema)):
                yield path
        elif kind in ("integer", "number") and not ({"maximum", "enum"} & set(schema)):
            yield path
        elif kind == "array":
            if "maxItems" not in schema:
                yield path
            yield from walk(schema["items"], f"{path}[]")
        elif kind == "object":
            if "additionalProperties" in schema:
                if "maxProperties" not in schema:
                    yield path
                yield from walk(schema["additionalProperties"], f"{path}{{}}")
            for name, part in schema.get("properties", {}).items():
                yield from walk(part, f"{path}.{name}")

    assert list(walk(spec_schema(crd), "spec")) == []
