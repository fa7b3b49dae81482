"""A refactoring shared by several pods: index 0 has the result, any of them can have the cause."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from prism_operator import refactor_jobs

from . import controllers
from .harness import Operator

Json = dict[str, Any]
Make = Callable[..., Json]
PODS = 3


def part(index: int) -> Json:
    return controllers.ended(json.dumps({"result": "part", "shard": [index, PODS], "seconds": 1}))


def failed(reason: str, message: str, at: str) -> Json:
    said = {"result": "failed", "reason": reason, "message": message}
    status = controllers.ended(json.dumps(said), 1, "Error")
    status["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = at
    return status


@pytest.fixture
def shared(operator: Operator, make_body: Make) -> Operator:
    """Its Job is made and no pod has come yet."""
    operator.apply(make_body(refactor={"parallelism": PODS}))
    operator.settle(finish=False)
    assert operator.job()["spec"]["completions"] == PODS
    return operator


def add(operator: Operator, index: int, status: Json, suffix: str = "a") -> None:
    name = f"{index}-{suffix}"
    controllers.job_pod(operator.cluster, operator.job(), status, name, index)


def test_the_result_is_what_index_0_said_though_others_end_later(shared: Operator) -> None:
    add(shared, 1, part(1))
    add(shared, 0, controllers.ended(json.dumps(controllers.RESULT)))
    add(shared, 2, part(2))
    controllers.set_job(shared.cluster, shared.job(), "Complete")
    shared.settle()
    assert shared.status["artifact"]["digest"] == "sha256:abc"
    assert shared.condition("Refactored")[0] == "True"


def test_a_part_that_is_done_is_no_result(shared: Operator) -> None:
    add(shared, 0, {"phase": "Running"})
    add(shared, 1, part(1))
    shared.settle(finish=False)
    assert shared.condition("Refactored")[:2] == ("False", "Running")
    assert not shared.cluster.list("deployments") and "artifact" not in shared.status


def test_not_even_from_index_0(shared: Operator) -> None:
    add(shared, 0, part(0))
    controllers.set_job(shared.cluster, shared.job(), "Complete")
    shared.settle(finish=False)
    assert shared.condition("Refactored")[:2] == ("False", "NoResult")
    assert not shared.cluster.list("deployments")


def test_without_the_pod_of_index_0_the_job_runs_again_to_verify(shared: Operator) -> None:
    add(shared, 1, part(1))
    first = shared.job()
    controllers.set_job(shared.cluster, first, "Complete")
    shared.step()
    assert shared.condition("Refactored")[1] == "Verifying"
    shared.settle()
    assert shared.job()["metadata"]["uid"] != first["metadata"]["uid"]


def test_the_cause_is_told_by_the_pod_that_failed_first_and_not_by_those_stopped_with_it(
    shared: Operator,
) -> None:
    add(shared, 0, failed("Interrupted", "Stopped by SIGTERM", "2026-01-01T00:00:01Z"))
    add(shared, 1, failed("CorruptCheckpoint", "m: a tensor is missing", "2026-01-01T00:00:03Z"))
    add(shared, 2, failed("NoSpaceLeft", "the claim is full", "2026-01-01T00:00:02Z"))
    controllers.set_job(shared.cluster, shared.job(), "Failed", "PodFailurePolicy")
    shared.settle(finish=False)
    state, reason, text = shared.condition("Refactored")
    assert (state, reason) == ("False", "NoSpaceLeft") and "the claim is full" in text


def test_a_failed_try_of_a_part_is_forgotten_once_the_next_one_did_it(shared: Operator) -> None:
    add(shared, 0, {"phase": "Running"})
    add(shared, 1, failed("NoSpaceLeft", "the claim is full", "2026-01-01T00:00:02Z"))
    shared.settle(finish=False)
    assert shared.condition("Refactored")[1] == "NoSpaceLeft"
    add(shared, 1, part(1), "b")
    shared.settle(finish=False)
    assert shared.condition("Refactored")[1] == "Running"


def test_a_part_that_no_node_takes_is_told_while_the_others_run(shared: Operator) -> None:
    add(shared, 0, {"phase": "Running"})
    row = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "full"}
    add(shared, 1, {"phase": "Pending", "conditions": [row]})
    add(shared, 2, {"phase": "Running"})
    shared.settle(finish=False)
    state, reason, text = shared.condition("Refactored")
    assert (state, reason) == ("False", "Unschedulable") and "-1-a" in text


def test_the_index_may_come_as_an_annotation() -> None:
    def pod(index: str, message: Json) -> Json:
        labels = {"batch.kubernetes.io/job-name": "j"}
        annotations = {"batch.kubernetes.io/job-completion-index": index}
        meta = {"name": f"j-{index}", "labels": labels, "annotations": annotations}
        return {"metadata": meta, "status": controllers.ended(json.dumps(message))}

    pods = [pod("1", {"result": "part"}), pod("0", {"result": "ok"}), pod("2", {"result": "part"})]
    assert refactor_jobs.view({"metadata": {"name": "j"}}, pods).result == {"result": "ok"}
