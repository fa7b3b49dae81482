"""What goes wrong around one PrismModel ends in words, and keeps the level from nobody."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from prism_operator import api
from prism_operator.kube import Refused, Unavailable
from prism_operator.pods import Context, serving_pod

from . import controllers
from .cluster import Write
from .harness import Operator, traffic

Json = dict[str, Any]
Make = Callable[..., Json]


def pass_time(operator: Operator, seconds: float, requests: float | None = None) -> list[Write]:
    """Passes as far apart as they ask for, with nothing to wake them; returns what was written."""
    before, until = len(operator.cluster.writes), operator.now + seconds
    while operator.now < until:
        if requests is not None:
            traffic(operator, requests)
        operator.now += operator.step(woken=False)
    return operator.cluster.writes[before:]


def refuse(operator: Operator, plural: str, tried: list[float]) -> None:
    def fault(write: Write) -> None:
        if write.plural == plural:
            tried.append(operator.now)
            raise Refused(f"403 {plural}: exceeded quota")

    operator.cluster.fault = fault


def test_a_claim_made_later_is_found_although_claims_wake_nobody(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body(model={"uri": "pvc://elsewhere/m"}))
    operator.settle(finish=False)
    operator.claim("elsewhere")
    pass_time(operator, 15)
    assert len(operator.cluster.list("jobs")) == 1


def test_a_name_that_becomes_free_is_taken_although_services_wake_nobody(
    operator: Operator, make_body: Make
) -> None:
    meta = {"name": "tiny", "namespace": "llm", "labels": {"app": "other"}}
    operator.cluster.put_new("services", {"metadata": meta, "spec": {}})
    operator.apply(make_body())
    operator.settle()
    operator.cluster.remove("services", "llm", "tiny")
    pass_time(operator, 15)
    assert len(operator.cluster.list("jobs")) == 1


def test_what_a_deleted_namesake_left_is_waited_for_and_no_failure(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle()
    children = {p: operator.cluster.list(p) for p in ("jobs", "deployments", "services")}
    operator.cluster.remove("prismmodels", "llm", "tiny")
    for plural, found in children.items():  # the garbage collector has not come by yet
        for child in found:
            operator.cluster.put_new(plural, child)
    again = make_body()
    again["metadata"]["uid"] = "uid-second"
    operator.restart()
    operator.apply(again)
    operator.settle(finish=False)
    assert operator.status["phase"] == "Pending"
    assert operator.condition("Ready")[:2] == ("False", "CleaningUp")
    assert not any(w.body["reason"] == "NameTaken" for w in operator.writes("events"))
    for plural, found in children.items():
        for child in found:
            operator.cluster.remove(plural, "llm", child["metadata"]["name"])
    pass_time(operator, 15)
    operator.settle()
    assert operator.status["phase"] == "Serving"


def test_a_strange_job_under_our_name_is_told_and_not_asked_for_again_and_again(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.step()
    name = operator.job()["metadata"]["name"]
    operator.cluster.remove("jobs", "llm", name)
    operator.cluster.put_new("jobs", {"metadata": {"name": name, "namespace": "llm"}, "spec": {}})
    pass_time(operator, 60)
    assert operator.condition("Ready")[1] == "NameTaken"
    assert f"Job {name}" in operator.condition("Ready")[2]
    assert len(operator.writes("jobs")) == 1


@pytest.mark.parametrize(
    ("plural", "change"),
    [("jobs", {"refactor": {"seed": 3}}), ("deployments", {"serving": {"dtype": "float32"}})],
)
def test_a_refused_child_keeps_the_level_from_nobody(
    operator: Operator, make_body: Make, plural: str, change: Json
) -> None:
    operator.apply(make_body())
    operator.settle()
    operator.idle(60)
    tried: list[float] = []
    refuse(operator, plural, tried)
    operator.edit_spec(**change)
    pass_time(operator, 180, requests=12)
    level = operator.level()
    assert level == {"seq": 2, "floor": 25, "ceiling": 45}
    assert operator.telemetry.pushed[-1] == level
    assert operator.status["level"]["desired"] == 45
    assert len(operator.status["decisions"]) == 1
    assert operator.condition("Accepted")[:2] == ("False", "RefusedByAPIServer")
    assert 5 <= len(tried) <= 8
    operator.cluster.fault = None
    pass_time(operator, 40, requests=12)
    assert operator.condition("Accepted")[:2] == ("True", "Valid")


def test_an_edit_after_a_refusal_is_tried_at_once(operator: Operator, make_body: Make) -> None:
    tried: list[float] = []
    refuse(operator, "jobs", tried)
    operator.apply(make_body())
    assert operator.step() == 30
    operator.edit_spec(refactor={"resources": {"limits": {"memory": "1Gi"}}})
    operator.step()
    assert len(tried) == 2


def test_one_change_is_one_event(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body(model={"uri": "pvc://elsewhere/m"}))
    operator.settle(finish=False)
    told = [w.body["reason"] for w in operator.writes("events")]
    assert told.count("ClaimNotFound") == 1


def test_a_decision_outlives_a_status_that_could_not_be_written(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle()
    operator.idle(60)

    def fault(write: Write) -> None:
        if write.sub == "status":
            raise Unavailable("timeout")

    operator.cluster.fault = fault
    with pytest.raises(Unavailable):
        pass_time(operator, 5, requests=12)
    operator.cluster.fault = None
    pass_time(operator, 15, requests=12)
    assert [d["from"] for d in operator.status["decisions"]] == [100]
    assert operator.status["level"]["reason"] == "LoadAboveCapacity"
    told = [w.body["reason"] for w in operator.writes("events")]
    assert told.count("LevelLowered") == 1


@pytest.mark.parametrize(
    "points", ["5", '[{"loss":1}]', '[{"level":"a"}]', '[{"level":50,"loss":NaN}]']
)
def test_a_result_of_another_shape_is_told(
    operator: Operator, make_body: Make, points: str
) -> None:
    operator.apply(make_body())
    operator.settle(finish=False)
    words = controllers.ended(f'{{"result":"ok","points":{points}}}')
    controllers.job_pod(operator.cluster, operator.job(), words)
    controllers.set_job(operator.cluster, operator.job(), "Complete")
    operator.settle(finish=False)
    state, reason, text = operator.condition("Refactored")
    assert (state, reason) == ("False", "NoResult") and "delete it" in text


def test_a_memory_edited_by_hand_is_forgotten(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle()

    def edit(body: Json) -> None:
        memory = {**json.loads(body["data"]["memory.json"]), "limit": "much"}
        body["data"]["memory.json"] = json.dumps(memory)

    operator.cluster.edit("configmaps", "llm", "tiny-control", edit)
    operator.restart()
    traffic(operator, 12)
    operator.step()
    assert operator.level()["ceiling"] < 100


@pytest.mark.parametrize(
    ("cpu", "threads"),
    [("2500m", 2), (4, 4), ("0.5", 1), ("2.", 2), ("100u", None), ("1k", None), ("two", None)],
)
def test_a_cpu_limit_in_any_notation_ends_in_a_pod_spec(
    make_body: Make, context: Context, cpu: str | int, threads: int | None
) -> None:
    model = api.parse(make_body(serving={"resources": {"limits": {"cpu": cpu}}}))
    args = serving_pod(model, context, "abc")["containers"][0]["args"]
    assert (["--threads", str(threads)] == args[-2:]) if threads else ("--threads" not in args)
