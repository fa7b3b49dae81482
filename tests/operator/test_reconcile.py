"""The whole operator but Kopf, on a cluster in memory: to the fixpoint, and then nothing."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from prism import contract
from prism_operator.kube import Refused, Unavailable
from prism_operator.plan import Measured, Report
from prism_operator.scaler.model import CostModel, Demand, LevelCost
from prism_operator.scaler.state import Signals

from . import controllers
from .cluster import Write
from .harness import Operator

Json = dict[str, Any]
Make = Callable[..., Json]
COSTS = CostModel(tuple(LevelCost(n, 0.0005 * n / 100, 0.0) for n in (25, 50, 75, 100)))


def traffic(op: Operator, requests: float, report: Report | None = None) -> None:
    signals = Signals(at=op.now, demand=Demand(requests, 400 * requests, 0))
    op.telemetry.measured = Measured(signals, COSTS, report or Report(), "Prometheus")


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


def test_an_idle_operator_writes_nothing_for_two_minutes(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle()
    traffic(operator, 0)
    operator.idle(5)
    for at in range(0, 120, 5):
        traffic(operator, 0)
        assert operator.idle(5) == [], f"after {at} s"


def test_nothing_is_written_while_idle_after_a_restart(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle()
    traffic(operator, 0)
    operator.idle(5)
    operator.restart()
    for at in range(0, 120, 5):
        traffic(operator, 0)
        assert operator.idle(5) == [], f"after {at} s"


def test_measured_figures_cost_two_status_writes_a_minute_at_most(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle()
    traffic(operator, 1, Report(100, 20, 99, 99, 100))
    operator.idle(60)
    before = len(operator.cluster.writes)
    for i in range(60):
        traffic(operator, 1 + i / 100, Report(100 + i, 20, 99, 99, 100))
        operator.idle(5)
    assert 5 <= len(operator.cluster.writes[before:]) <= 10


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


def test_two_field_managers_share_the_deployment(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body(serving={"replicas": 3}))
    operator.settle()
    main = [w for w in operator.writes("deployments") if w.manager == "prism-operator"]
    scaler = [w for w in operator.writes("deployments") if w.manager == "prism-scaler"]
    assert "replicas" not in main[0].body["spec"]
    assert scaler[0].body["spec"] == {"replicas": 3}
    assert operator.status["display"]["replicas"] == "3/3"


def test_a_source_change_keeps_the_old_pods_until_the_new_artifact_is_ready(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle()
    old = operator.deployment()["metadata"]["annotations"][contract.ANNOTATION_ARTIFACT]
    operator.edit_spec(model={"uri": "pvc://models/other"})
    operator.settle(finish=False)
    assert operator.deployment()["metadata"]["annotations"][contract.ANNOTATION_ARTIFACT] == old
    assert operator.condition("Ready")[0] == "True"
    assert operator.condition("Refactored")[:2] == ("False", "Running")
    operator.settle()
    new = operator.deployment()["metadata"]["annotations"][contract.ANNOTATION_ARTIFACT]
    assert new != old and operator.status["artifact"]["hash"] == new
    assert [j["metadata"]["annotations"][contract.ANNOTATION_ARTIFACT]
            for j in operator.cluster.list("jobs")] == [new]  # fmt: skip


def test_a_source_that_changes_again_ends_the_job_in_between(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.step()
    operator.edit_spec(model={"uri": "pvc://models/second"})
    operator.settle(finish=False)
    (job,) = operator.cluster.list("jobs")
    assert "/source/second" in job["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize(
    ("message", "exit_code", "why", "reason", "says"),
    [
        ('{"result":"failed","reason":"UnsupportedArchitecture","message":"MambaForCausalLM '
         'has recurrent state"}', 3, "Error", "UnsupportedArchitecture", "recurrent state"),
        ('{"result":"failed","reason":"NoSpaceLeft","message":"the claim is full"}',
         1, "Error", "NoSpaceLeft", "the claim is full"),
        ("", 137, "OOMKilled", "OutOfMemory", "its limit of 2Gi"),
        ("Traceback: boom", 1, "Error", "PodFailurePolicy", "boom"),
    ],
)  # fmt: skip
def test_a_failed_job_ends_in_a_condition_that_says_why(
    operator: Operator,
    make_body: Make,
    message: str,
    exit_code: int,
    why: str,
    reason: str,
    says: str,
) -> None:
    operator.apply(make_body(refactor={"resources": {"limits": {"memory": "2Gi"}}}))
    operator.settle(finish=False)
    controllers.fail_jobs(operator.cluster, message, exit_code, why)
    operator.settle(finish=False)
    assert operator.status["phase"] == "Failed"
    for kind in ("Refactored", "Ready"):
        state, got, text = operator.condition(kind)
        assert (state, got) == ("False", reason)
        assert says in text and "delete Job" in text
    events = [w.body for w in operator.writes("events")]
    assert any(e["type"] == "Warning" and e["reason"] == reason for e in events)
    assert operator.idle(120) == []


def test_deleting_a_failed_job_tries_again(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle(finish=False)
    controllers.fail_jobs(operator.cluster, "boom")
    operator.settle(finish=False)
    operator.cluster.remove("jobs", "llm", operator.job()["metadata"]["name"])
    operator.settle()
    assert operator.status["phase"] == "Serving"


def test_new_job_settings_try_a_failed_job_again(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle(finish=False)
    controllers.fail_jobs(operator.cluster, "", 137, "OOMKilled")
    operator.settle(finish=False)
    operator.edit_spec(refactor={"resources": {"limits": {"memory": "8Gi"}}})
    operator.settle()
    assert operator.status["phase"] == "Serving"


def waiting(reason: str) -> Json:
    state = {"waiting": {"reason": reason, "message": "manifest unknown"}}
    return {"containerStatuses": [{"name": "refactor", "image": "reg/x:1", "state": state}]}


UNSCHEDULED = {
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/1 nodes: insufficient memory",
        }
    ]
}


@pytest.mark.parametrize(
    ("pod", "reason", "says"),
    [
        (waiting("ImagePullBackOff"), "ImagePullFailed", "image reg/x:1 cannot be pulled"),
        (waiting("ErrImagePull"), "ImagePullFailed", "imagePullSecrets"),
        (waiting("CreateContainerConfigError"), "PodNotStartable", "manifest unknown"),
        (UNSCHEDULED, "Unschedulable", "insufficient memory"),
    ],
)
def test_a_job_that_does_not_start_says_why(
    operator: Operator, make_body: Make, pod: Json, reason: str, says: str
) -> None:
    operator.apply(make_body())
    operator.settle(finish=False)
    controllers.job_pod(operator.cluster, operator.job(), pod)
    operator.settle(finish=False)
    state, got, text = operator.condition("Refactored")
    assert (state, got) == ("False", reason) and says in text


def test_a_claim_that_does_not_exist_is_named_and_waited_for(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body(model={"uri": "pvc://elsewhere/m"}))
    operator.settle(finish=False)
    assert operator.condition("Refactored")[1] == "ClaimNotFound"
    assert "elsewhere" in operator.condition("Ready")[2]
    assert not operator.cluster.list("jobs")
    operator.claim("elsewhere")
    operator.settle()
    assert operator.status["phase"] == "Serving"


def test_a_job_whose_pod_is_gone_runs_again_to_verify(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle(finish=False)
    job = operator.job()
    controllers.set_job(operator.cluster, job, "Complete")
    operator.step()
    assert operator.condition("Refactored")[1] == "Verifying"
    operator.settle()
    assert operator.job()["metadata"]["uid"] != job["metadata"]["uid"]
    assert operator.status["phase"] == "Serving"


def test_a_job_that_leaves_no_result_does_not_run_for_ever(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle(finish=False)
    controllers.job_pod(operator.cluster, operator.job(), controllers.ended("no json"))
    controllers.set_job(operator.cluster, operator.job(), "Complete")
    operator.settle(finish=False)
    assert operator.condition("Refactored")[1] == "NoResult"


def test_an_object_restored_without_status_finds_its_artifact(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle()
    operator.cluster.edit("prismmodels", "llm", "tiny", lambda body: body.pop("status"))
    operator.restart()
    jobs, pods = len(operator.writes("jobs")), len(operator.writes("deployments"))
    operator.settle()
    assert operator.status["artifact"]["digest"] == "sha256:abc"
    assert (len(operator.writes("jobs")), len(operator.writes("deployments"))) == (jobs, pods)


def test_without_status_and_job_the_pods_stay_while_a_new_job_verifies(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle()
    before = operator.deployment()
    operator.cluster.edit("prismmodels", "llm", "tiny", lambda body: body.pop("status"))
    operator.cluster.remove("jobs", "llm", operator.job()["metadata"]["name"])
    operator.restart()
    operator.settle(finish=False)
    assert operator.condition("Ready")[0] == "True"
    operator.settle()
    assert operator.deployment()["spec"] == before["spec"]
    assert operator.status["artifact"]["digest"] == "sha256:abc"


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


def test_a_made_claim_is_kept_or_deleted_with_its_object(
    operator: Operator, make_body: Make
) -> None:
    create = {"pvc": None, "create": {"size": "5Gi", "accessModes": ["ReadWriteMany"]}}
    operator.apply(make_body(cache=create))
    operator.settle()
    claim = operator.cluster.get("persistentvolumeclaims", "llm", "tiny-cache")
    assert claim and "ownerReferences" not in claim["metadata"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "5Gi"
    operator.edit_spec(cache={"reclaimPolicy": "Delete"})
    operator.settle()
    claim = operator.cluster.get("persistentvolumeclaims", "llm", "tiny-cache")
    assert claim and claim["metadata"]["ownerReferences"][0]["uid"] == "uid-tiny"
    operator.edit_spec(cache={"reclaimPolicy": "Retain"})
    operator.settle()
    operator.cluster.remove("prismmodels", "llm", "tiny")
    assert not operator.cluster.list("deployments") and not operator.cluster.list("jobs")
    assert operator.cluster.get("persistentvolumeclaims", "llm", "tiny-cache")


def test_a_retained_claim_is_adopted_by_a_namesake(operator: Operator, make_body: Make) -> None:
    create = {"pvc": None, "create": {"size": "5Gi"}}
    operator.apply(make_body(cache=create))
    operator.settle()
    operator.cluster.remove("prismmodels", "llm", "tiny")
    again = make_body(cache=create)
    again["metadata"]["uid"] = "uid-second"
    operator.restart()
    operator.apply(again)
    operator.settle()
    assert operator.status["phase"] == "Serving"


def test_load_lowers_the_level_everywhere_and_it_comes_back(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body(serving={"replicas": 2}))
    operator.settle()
    operator.idle(60)
    traffic(operator, 12)
    operator.idle(5)
    level = operator.level()
    assert level["ceiling"] < 100 and level["seq"] == 2
    assert operator.telemetry.pushed[-1] == level
    assert operator.status["level"]["desired"] == level["ceiling"]
    assert operator.status["level"]["applied"] == 2
    assert operator.status["decisions"][0]["reason"] == "LoadAboveCapacity"
    assert operator.condition("Degraded")[:2] == ("True", "BelowPreferredLevel")
    assert any(e.body["reason"] == "LevelLowered" for e in operator.writes("events"))
    operator.restart()
    for _ in range(40):
        traffic(operator, 0)
        operator.idle(5)
    assert operator.level()["ceiling"] == 100
    assert operator.condition("Degraded")[0] == "False"
    assert len(operator.status["decisions"]) <= 10


def test_without_a_decision_the_control_map_is_not_written(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle()
    before = len(operator.writes("configmaps"))
    for i in range(20):
        traffic(operator, 1 + i / 50)
        operator.idle(5)
    assert len(operator.writes("configmaps")) == before


def test_new_targets_reach_the_pods_without_a_restart(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle()
    template = operator.deployment()["spec"]["template"]
    operator.edit_spec(slo={"itl": {"targetMilliseconds": 40, "percentile": 99}})
    operator.settle()
    config = operator.cluster.get("configmaps", "llm", "tiny-control")
    assert config and json.loads(config["data"]["slo.json"]) == {"ttft_ms": 500, "itl_ms": 40}
    assert operator.deployment()["spec"]["template"] == template


def test_a_control_map_deleted_by_hand_comes_back_with_a_higher_number(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle()
    operator.cluster.remove("configmaps", "llm", "tiny-control")
    operator.restart()
    operator.settle()
    assert operator.level()["seq"] == 2


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


def test_the_slo_condition_follows_attainment(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle()
    for share, expected in (
        (99, ("True", "WithinTarget")),
        (90, ("False", "Violated")),
        (None, ("Unknown", "NoTraffic")),
    ):
        traffic(operator, 1, Report(ttft_attainment=share))
        operator.idle(5)
        assert operator.condition("SLOMet")[:2] == expected


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
