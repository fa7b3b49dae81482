"""The CRD on a real API server: every rule with the message a user sees, defaults, columns, SSA."""

from collections.abc import Callable
from typing import Any

import pytest
from prism_operator import api, quality

from . import controllers
from .real_apiserver import ApiServer

pytestmark = pytest.mark.apiserver
Json = dict[str, Any]
Make = Callable[..., Json]
PATH = "/apis/moeprism.io/v1alpha1/namespaces/llm/prismmodels"
APPLY = "application/apply-patch+yaml"
HUB = {"uri": "hf://Qwen/Qwen3-30B-A3B"}
AUTO_WITHOUT_TARGET = (
    "elasticity.mode Auto needs a target to hold: set slo.ttft or slo.itl, or choose "
    "elasticity.mode Manual or Off"
)


def stripped(body: Json) -> Json:
    for key in ("uid", "generation"):
        body["metadata"].pop(key, None)
    return body


def refuse(server: ApiServer, body: Json) -> str:
    code, answer = server.request("POST", f"{PATH}?dryRun=All", stripped(body))
    assert code == 422, (code, answer)
    return str(answer["message"])


RULES: list[tuple[str, Json, str]] = [
    ("uri scheme", {"model": {"uri": "s3://bucket/m"}}, "model.uri must begin with pvc://"),
    ("pvc dots", {"model": {"uri": "pvc://models/../x"}}, "model.uri must be pvc://CLAIM"),
    ("pvc shape", {"model": {"uri": "pvc://"}}, "model.uri must be pvc://CLAIM"),
    ("hub shape", {"model": {"uri": "hf://Qwen"}}, "model.uri must be hf://ORGANISATION/NAME"),
    ("hub revision in uri", {"model": {"uri": "hf://a/b@main"}}, "revision has its own field"),
    ("credentials", {"model": {"credentials": {"secretRef": {"name": "t"}}}},
     "model.credentials go with an hf:// uri only"),
    ("revision", {"model": {"revision": "main"}}, "model.revision goes with an hf:// uri only"),
    ("no cache", {"cache": {"pvc": None}}, "cache needs exactly one of pvc"),
    ("two caches", {"cache": {"create": {"size": "1Gi"}}}, "cache needs exactly one of pvc"),
    ("delete a given claim", {"cache": {"reclaimPolicy": "Delete"}},
     "cache.reclaimPolicy Delete goes with cache.create only"),
    ("sub-path", {"cache": {"pvc": {"subPath": "../x"}}}, "must be a relative path without '..'"),
    ("absolute sub-path", {"cache": {"pvc": {"subPath": "/x"}}}, "must be a relative path"),
    ("size", {"cache": {"pvc": None, "create": {"size": "big"}}},
     "cache.create.size must be a quantity such as 50Gi"),
    ("no size", {"cache": {"pvc": None, "create": {"size": "0"}}},
     "cache.create.size must be a quantity such as 50Gi"),
    ("calibration", {"refactor": {"calibration": {"uri": "https://x/y"}}},
     "refactor.calibration.uri must be pvc://CLAIM/PATH"),
    ("sub-experts", {"refactor": {"subExperts": 6}},
     'Unsupported value: 6: supported values: "4", "8", "16", "32", "auto"'),
    ("sub-experts word", {"refactor": {"subExperts": "many"}}, 'supported values: "4", "8"'),
    ("sub-experts text", {"refactor": {"subExperts": "8"}}, 'supported values: "4", "8"'),
    ("gate without limit", {"refactor": {"qualityGate": {"metric": "kl"}}},
     "maxIncreasePercent: Required value"),
    ("gate below nothing", {"refactor": {"qualityGate": {"maxIncreasePercent": -0.1}}},
     "should be greater than or equal to 0"),
    ("unknown metric", {"refactor": {"qualityGate": {"metric": "bleu", "maxIncreasePercent": 1}}},
     'supported values: "perplexity", "kl", "topOneDisagreement"'),
    ("one pod may mount it", {"refactor": {"parallelism": 2}, "cache": {
        "pvc": None, "create": {"size": "1Gi", "accessModes": ["ReadWriteOncePod"]}}},
     "refactor.parallelism above 1 needs a claim that several pods can mount"),
    ("no parallelism", {"refactor": {"parallelism": 0}}, "should be greater than or equal to 1"),
    ("too parallel", {"refactor": {"parallelism": 65}}, "should be less than or equal to 64"),
    ("accelerator", {"serving": {"accelerator": {"resourceName": "gpu"}}},
     "must be an extended resource such as nvidia.com/gpu"),
    ("refactor requests", {"refactor": {"resources": {"requests": {"cpu": "two"}}}},
     "refactor.resources.requests must be quantities such as 500m or 4Gi"),
    ("refactor limits", {"refactor": {"resources": {"limits": {"memory": -1}}}},
     "refactor.resources.limits must be quantities such as 500m or 4Gi"),
    ("serving requests", {"serving": {"resources": {"requests": {"memory": "-4Gi"}}}},
     "serving.resources.requests must be quantities such as 500m or 4Gi"),
    ("serving limits", {"serving": {"resources": {"limits": {"cpu": 2, "memory": "4 GB"}}}},
     "serving.resources.limits must be quantities such as 500m or 4Gi"),
    ("ttft percentile", {"slo": {"ttft": {"percentile": 80}}},
     "slo.ttft.percentile must be 50, 90, 95 or 99"),
    ("itl percentile", {"slo": {"itl": {"targetMilliseconds": 5, "percentile": 98}}},
     "slo.itl.percentile must be 50, 90, 95 or 99"),
    ("no target", {"slo": None}, AUTO_WITHOUT_TARGET),
    ("empty target", {"slo": {"ttft": None, "windowSeconds": 60}}, AUTO_WITHOUT_TARGET),
    ("min above max", {"elasticity": {"minLevelPercent": 80, "maxLevelPercent": 60}},
     "elasticity.minLevelPercent must not be above maxLevelPercent"),
    ("preferred too high",
     {"elasticity": {"maxLevelPercent": 60, "preferredLevelPercent": 70}},
     "elasticity.preferredLevelPercent must lie between"),
    ("preferred too low", {"elasticity": {"preferredLevelPercent": 20}},
     "elasticity.preferredLevelPercent must lie between"),
    ("manual without level", {"elasticity": {"mode": "Manual"}},
     "elasticity.levelPercent goes with mode Manual, and Manual needs it"),
    ("level without manual", {"elasticity": {"levelPercent": 60}},
     "elasticity.levelPercent goes with mode Manual, and Manual needs it"),
    ("replicas", {"autoscaling": {"minReplicas": 3, "maxReplicas": 2}},
     "autoscaling.minReplicas must not be above maxReplicas"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [r[1:] for r in RULES], ids=[r[0] for r in RULES])
def test_a_rule_refuses_with_words_a_user_understands(
    apiserver: ApiServer, make_body: Make, change: Json, message: str
) -> None:
    assert message in refuse(apiserver, make_body(**change))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 41, "metadata.name may have 40 characters at most"),
        ("1tiny", "metadata.name must be lower-case letters, digits and '-'"),
        ("tiny.moe", "metadata.name must be lower-case letters, digits and '-'"),
    ],
)
def test_a_name_that_children_could_not_bear_is_refused(
    apiserver: ApiServer, make_body: Make, name: str, message: str
) -> None:
    assert message in refuse(apiserver, make_body(name))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"cache": {"pvc": {"claimName": "other"}}}, "cache.pvc cannot change"),
        ({}, {"cache": {"pvc": None, "create": {"size": "1Gi"}}}, "cannot change"),
        ({"cache": {"pvc": None, "create": {"size": "1Gi"}}},
         {"cache": {"pvc": None, "create": {"size": "2Gi"}}}, "cache.create cannot change"),
    ],
)  # fmt: skip
def test_the_claim_cannot_change(
    apiserver: ApiServer, make_body: Make, first: Json, second: Json, message: str
) -> None:
    created = stripped(make_body("immutable", **first))
    try:
        assert apiserver.request("POST", PATH, created)[0] == 201
        path = f"{PATH}/immutable?fieldManager=user&force=true"
        change = stripped(make_body("immutable", **second))
        if "create" in second["cache"] and "create" not in first.get("cache", {}):
            change["spec"]["cache"].pop("pvc", None)
        code, current = apiserver.request("GET", f"{PATH}/immutable")
        assert code == 200
        current["spec"] = change["spec"]
        code, answer = apiserver.request("PUT", path, current)
        assert code == 422 and message in answer["message"]
    finally:
        apiserver.request("DELETE", f"{PATH}/immutable")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"model": {**HUB, "revision": "main", "credentials": {"secretRef": {"name": "hf"}}}},
        {"cache": {"pvc": None, "create": {"size": "50Gi"}, "reclaimPolicy": "Delete"}},
        {"slo": None, "elasticity": {"mode": "Off"}},
        {"slo": None, "elasticity": {"mode": "Manual", "levelPercent": 40}},
        {"model": {"uri": "pvc://models"}},
        {"serving": {"accelerator": {"resourceName": "nvidia.com/mig-3g.40gb"}}},
        {"refactor": {"resources": {"limits": {"cpu": 2, "memory": "4Gi"}}}},
        {"refactor": {"parallelism": 64}},
        {"refactor": {"subExperts": "auto"}},
        {"refactor": {"subExperts": 32}},
        {"refactor": {"qualityGate": {"maxIncreasePercent": 0}}},
        {"refactor": {"qualityGate": {"metric": "kl", "maxIncreasePercent": 0.25}}},
    ],
)
def test_good_objects_pass(apiserver: ApiServer, make_body: Make, change: Json) -> None:
    body = stripped(make_body(**change))
    code, answer = apiserver.request("POST", f"{PATH}?dryRun=All&fieldValidation=Strict", body)
    assert code == 201, answer


def test_an_unknown_field_is_refused_by_strict_clients(
    apiserver: ApiServer, make_body: Make
) -> None:
    body = stripped(make_body(slo={"ttft": {"targetMs": 5}}))
    code, answer = apiserver.request("POST", f"{PATH}?dryRun=All&fieldValidation=Strict", body)
    assert code == 400 and "targetMs" in answer["message"]


def test_the_servers_defaults_are_the_operators(apiserver: ApiServer) -> None:
    spec = {
        "model": {"uri": "pvc://models/m"},
        "cache": {"pvc": {"claimName": "models"}},
        "slo": {"ttft": {"targetMilliseconds": 500}},
    }
    body = {
        "apiVersion": "moeprism.io/v1alpha1",
        "kind": "PrismModel",
        "metadata": {"name": "bare", "namespace": "llm"},
        "spec": spec,
    }
    code, stored = apiserver.request("POST", f"{PATH}?dryRun=All", body)
    assert code == 201
    assert stored["spec"]["elasticity"]["behavior"]["up"] == {
        "stabilizationWindowSeconds": 30,
        "maxStepPercent": 20,
    }
    assert stored["spec"]["serving"]["replicas"] == 1
    identity = {"uid": "u", "generation": 1}
    bare = {**body, "metadata": {"name": "bare", "namespace": "llm", **identity}}
    stored["metadata"].update(identity)
    assert api.parse(stored) == api.parse(bare)


def test_status_by_server_side_apply_columns_and_scale(
    apiserver: ApiServer, make_body: Make
) -> None:
    body = stripped(make_body("columns"))
    assert apiserver.request("POST", PATH, body)[0] == 201
    try:
        condition = {
            "reason": "Serving",
            "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        status = {
            "phase": "Serving",
            "replicas": 2,
            "artifact": {"warnings": ["short"], "points": quality.points(controllers.RESULT)},
            "selector": "moeprism.io/model=columns",
            "display": {"model": "tiny", "level": "75%", "replicas": "2/2", "ttft": "120ms",
                        "itl": "9ms"},
            "conditions": [{"type": t, "status": "True", **condition} for t in ("Ready", "SLOMet")],
        }  # fmt: skip
        manifest = {
            "apiVersion": "moeprism.io/v1alpha1",
            "kind": "PrismModel",
            "metadata": {"name": "columns", "namespace": "llm"},
            "status": status,
        }
        path = f"{PATH}/columns/status?fieldManager=prism-operator&force=true"
        code, answer = apiserver.request("PATCH", path, manifest, APPLY)
        assert code == 200, answer
        assert answer["status"]["artifact"] == status["artifact"], "nothing was pruned"
        again = apiserver.request("PATCH", path, manifest, APPLY)[1]
        version = again["metadata"]["resourceVersion"]
        assert version == answer["metadata"]["resourceVersion"], "an equal status is no write"
        del manifest["status"]["display"]["itl"]  # type: ignore[index]
        assert (
            "itl" not in apiserver.request("PATCH", path, manifest, APPLY)[1]["status"]["display"]
        )
        table = apiserver.request(
            "GET", f"{PATH}/columns", accept="application/json;as=Table;g=meta.k8s.io;v=v1"
        )[1]
        names = [c["name"] for c in table["columnDefinitions"]]
        shown = [c["name"] for c in table["columnDefinitions"] if c["priority"] == 0]
        assert shown == ["Name", "MODEL", "PHASE", "LEVEL", "REPLICAS", "TTFT", "ITL", "SLO",
                         "READY", "AGE"]  # fmt: skip
        assert names[-2:] == ["REASON", "URI"]
        row = dict(zip(names, table["rows"][0]["cells"], strict=True))
        assert (row["LEVEL"], row["REPLICAS"], row["TTFT"]) == ("75%", "2/2", "120ms")
        assert (row["SLO"], row["READY"], row["REASON"]) == ("True", "True", "Serving")
        scale = apiserver.request("GET", f"{PATH}/columns/scale")[1]
        assert (scale["spec"]["replicas"], scale["status"]["replicas"]) == (1, 2)
        assert scale["status"]["selector"] == "moeprism.io/model=columns"
    finally:
        apiserver.request("DELETE", f"{PATH}/columns")


def test_every_rule_has_its_test(crd: Json) -> None:
    def messages(node: Any) -> list[str]:
        if isinstance(node, list):
            return [found for one in node for found in messages(one)]
        if not isinstance(node, dict):
            return []
        own = [rule["message"] for rule in node.get("x-kubernetes-validations", ())]
        return own + [found for one in node.values() for found in messages(one)]

    tested = [rule[2] for rule in RULES]
    tested += ["metadata.name may have", "metadata.name must be"]
    tested += ["cache.pvc cannot change", "cache.create cannot change"]
    assert [text for text in messages(crd) if not any(one in text for one in tested)] == []


def test_every_field_says_what_it_is(crd: Json) -> None:
    """What `kubectl explain` shows; the three that every kind has are the API server's to tell."""

    def silent(node: Json, path: str) -> list[str]:
        parts = {f"{path}.{name}": part for name, part in node.get("properties", {}).items()}
        parts |= {f"{path}[]": node["items"]} if "items" in node else {}
        own = [one for one, part in parts.items() if not one.endswith("]") and not said(part)]
        return own + [one for at, part in parts.items() for one in silent(part, at)]

    def said(part: Json) -> bool:
        return part.get("description", "").endswith(".")

    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert silent(schema, "") == [".apiVersion", ".kind", ".metadata"]


def test_short_name_and_category(apiserver: ApiServer) -> None:
    found = apiserver.request("GET", "/apis/moeprism.io/v1alpha1")[1]["resources"]
    kind = next(r for r in found if r["name"] == "prismmodels")
    assert kind["shortNames"] == ["pm"] and kind["categories"] == ["all"]
