"""The whole operator but Kopf, on a cluster in memory: to the fixpoint, and then nothing."""

from collections.abc import Callable
from typing import Any

import pytest
from prism.contract import ENV_ADMIN_TOKEN_SHA256
from prism_operator import names
from prism_operator.kube import Refused, Unavailable

from .cluster import Write
from .harness import Operator

Json = dict[str, Any]
Make = Callable[..., Json]


def test_an_object_becomes_a_job_then_pods_and_then_nothing_is_written(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.step()
    assert operator.status["phase"] == "Pending"
    operator.step()
    assert operator.status["phase"] == "Refactoring"
    assert not operator.cluster.list("deployments")
    operator.settle()
    assert operator.status["phase"] == "Serving"
    assert operator.condition("Ready")[:2] == ("True", "Serving")
    assert operator.condition("Refactored")[:2] == ("True", "Refactored")
    assert operator.status["artifact"]["digest"] == "sha256:abc"
    assert operator.status["artifact"]["points"][2]["lossBasisPoints"] == 100
    assert operator.level() == {"seq": 1, "floor": 25, "ceiling": 100}
    before = len(operator.cluster.writes)
    operator.step()
    assert operator.cluster.writes[before:] == []


def test_the_spec_is_never_written(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body(serving={"replicas": 2}))
    operator.settle()
    assert {w.sub for w in operator.writes("prismmodels")} == {"status"}


@pytest.mark.parametrize("nth", range(1, 13))
def test_killed_between_any_two_writes_it_ends_in_the_same_state(
    operator: Operator, make_body: Make, nth: int
) -> None:
    count = 0

    def fault(write: Write) -> None:
        nonlocal count
        count += 1
        if count == nth:
            raise Unavailable(f"killed before {write.verb} {write.plural}")

    operator.cluster.fault = fault
    operator.apply(make_body(serving={"replicas": 2}))
    operator.settle_with_errors()
    assert operator.status["phase"] == "Serving"
    assert operator.status["readyReplicas"] == 2
    assert len(operator.cluster.list("jobs")) == 1
    assert len(operator.writes("deployments", "apply")) <= 3


def test_upgrading_the_operator_restarts_no_pod(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle()
    before = operator.deployment()
    operator.restart(serving_image="localhost/prism-serving:2", pull_policy="Always")
    operator.settle()
    assert operator.deployment()["spec"] == before["spec"]
    assert operator.status["image"] == "localhost/prism-serving:1"
    operator.edit_spec(serving={"dtype": "float32"})
    operator.settle()
    assert operator.status["image"] == "localhost/prism-serving:2"


def test_a_rotated_admin_key_reaches_the_pods_once(operator: Operator, make_body: Make) -> None:
    """Or they would refuse the operator's new token for ever."""

    def digest() -> str:
        (gateway,) = operator.deployment()["spec"]["template"]["spec"]["initContainers"]
        (found,) = (e["value"] for e in gateway["env"] if e["name"] == ENV_ADMIN_TOKEN_SHA256)
        return str(found)

    operator.apply(make_body())
    operator.settle()
    old, before = digest(), len(operator.writes("deployments"))
    operator.restart(admin_key=b"n" * 32)
    operator.settle()
    operator.idle(600)
    assert len(operator.writes("deployments")) == before + 1
    assert digest() == names.admin_token_sha256(b"n" * 32, "uid-tiny") != old
    assert operator.condition("Ready")[0] == "True"


def test_two_field_managers_share_the_deployment(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body(serving={"replicas": 3}))
    operator.settle()
    main = [w for w in operator.writes("deployments") if w.manager == "prism-operator"]
    scaler = [w for w in operator.writes("deployments") if w.manager == "prism-scaler"]
    assert "replicas" not in main[0].body["spec"]
    assert scaler[0].body["spec"] == {"replicas": 3}
    assert operator.status["display"]["replicas"] == "3/3"


def test_paused_changes_nothing_and_says_so(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle()
    operator.edit_spec(paused=True, serving={"replicas": 5})
    before = len(operator.cluster.writes)
    operator.settle()
    assert {w.sub for w in operator.cluster.writes[before:]} <= {"status"}
    assert operator.status["phase"] == "Paused"
    operator.edit_spec(paused=False)
    operator.settle()
    assert operator.deployment()["spec"]["replicas"] == 5
    assert operator.status["phase"] == "Serving"


def test_somebody_elses_object_is_not_taken_over(operator: Operator, make_body: Make) -> None:
    meta = {"name": "tiny", "namespace": "llm", "labels": {"app": "other"}}
    operator.cluster.put_new("services", {"metadata": meta, "spec": {}})
    operator.apply(make_body())
    operator.settle()
    assert operator.condition("Accepted")[:2] == ("False", "NameTaken")
    assert "Service tiny" in operator.condition("Accepted")[2]
    assert {w.plural for w in operator.cluster.writes} == {"prismmodels", "events"}


def test_a_refusal_of_the_api_server_is_told(operator: Operator, make_body: Make) -> None:
    def fault(write: Write) -> None:
        if write.plural == "jobs":
            raise Refused("POST jobs: 403 exceeded quota: count/jobs")

    operator.cluster.fault = fault
    operator.apply(make_body())
    assert operator.step() == 30
    state, reason, text = operator.condition("Accepted")
    assert (state, reason) == ("False", "RefusedByAPIServer") and "exceeded quota" in text


def test_a_spec_that_cannot_be_read_is_told_once(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body(model={"uri": 7}, serving={"replicas": "two"}))
    operator.step()
    text = operator.condition("Accepted")[2]
    assert "spec.model.uri" in text and "spec.serving.replicas" in text
    assert operator.idle(600) == []


def test_a_crashing_pod_tells_its_last_words(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle(ready=False)
    pod = next(p for p in operator.cluster.list("pods") if p["status"].get("podIP"))
    last = {"terminated": {"exitCode": 3, "message": "prism.json: schema_version 9 is unknown"}}

    def crash(body: Json) -> None:
        body["status"]["containerStatuses"] = [
            {"name": "engine", "restartCount": 4, "lastState": last, "state": {}}
        ]

    operator.cluster.edit("pods", "llm", pod["metadata"]["name"], crash)
    operator.settle(ready=False)
    state, reason, text = operator.condition("WorkloadsReady")
    assert (state, reason) == ("False", "CrashLoop") and "schema_version 9" in text
    assert operator.condition("Ready")[0] == "False"
    assert operator.status["phase"] == "Deploying"


def test_transition_times_move_with_the_status_only(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.step()
    first = next(c for c in operator.status["conditions"] if c["type"] == "Refactored")
    operator.now += 100
    operator.step()
    second = next(c for c in operator.status["conditions"] if c["type"] == "Refactored")
    assert first["reason"] != second["reason"]
    assert first["lastTransitionTime"] == second["lastTransitionTime"]
    operator.settle()
    third = next(c for c in operator.status["conditions"] if c["type"] == "Refactored")
    assert third["lastTransitionTime"] != first["lastTransitionTime"]
    assert third["observedGeneration"] == 1
