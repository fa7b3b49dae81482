"""The refactor Job and its artifact: started, failed, tried again, found again, and told."""

from collections.abc import Callable
from typing import Any

import pytest
from prism import contract

from . import controllers
from .harness import Operator

Json = dict[str, Any]
Make = Callable[..., Json]


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


def test_what_is_odd_about_the_calibration_text_is_told_with_the_result(
    operator: Operator, make_body: Make
) -> None:
    said = ["The calibration text is short: 2048 tokens.", "It is far from the default."]
    operator.apply(make_body())
    operator.settle(finish=False)
    controllers.finish_jobs(operator.cluster, {**controllers.RESULT, "warnings": said})
    operator.settle()
    assert operator.status["artifact"]["warnings"] == said
    state, _, text = operator.condition("Refactored")
    assert state == "True" and all(f"warning: {one}" in text for one in said)
    operator.restart()
    operator.settle()
    assert operator.condition("Refactored")[2] == text, "status alone holds it now"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [([], None), (["x" * 9000], ["x" * 512]), (["x"] * 9, ["x"] * 4), (None, None)],
)
def test_warnings_fit_the_schema_of_status(
    operator: Operator, make_body: Make, sent: Any, kept: Any
) -> None:
    operator.apply(make_body())
    operator.settle(finish=False)
    controllers.finish_jobs(operator.cluster, {**controllers.RESULT, "warnings": sent})
    operator.settle()
    assert operator.status["artifact"].get("warnings") == kept


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
