"""Tables for the pure parts: costs, the quality gate, what is seen, what status says."""

from collections.abc import Callable
from typing import Any

import pytest
from prism_operator import api, names
from prism_operator.conditions import Condition, merge
from prism_operator.observe import observe
from prism_operator.plan import Measured, Report
from prism_operator.scaler.law import decide
from prism_operator.scaler.model import (
    CostModel,
    Demand,
    LevelCost,
    from_profiles,
    offered_levels,
    prefill_level,
)
from prism_operator.scaler.state import Limits, Memory, Pods, Signals, memory_from_json

from . import controllers
from .harness import Operator

Json = dict[str, Any]
Make = Callable[..., Json]


def profile(**costs: float) -> Json:
    rows = [
        {
            "level": int(level[1:]),
            "prefill_seconds_per_token": cost,
            "decode_seconds_per_token": cost / 2,
        }
        for level, cost in costs.items()
    ]
    return {"levels": rows, "seq": 1}


def test_costs_are_the_mean_of_the_pods_and_linear_between_levels() -> None:
    model = from_profiles([profile(l50=0.1, l100=0.3), profile(l50=0.3, l100=0.5, l25=0.1)])
    assert model is not None
    assert [(p.level, round(p.prefill_s, 3)) for p in model.points] == [(50, 0.2), (100, 0.4)]
    assert model.work(Demand(1, 0, 1), 75) == pytest.approx(0.15)
    assert model.work(Demand(1, 1, 0), 75) == pytest.approx(0.2)  # prompts are read at 50 then
    assert model.work(Demand(1, 0, 1), 10) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [{}],
        [{"levels": []}],
        [{"levels": [{"level": 100}]}],
        [{"levels": [{"level": 100, "prefill_seconds_per_token": "x"}]}],
        [profile(l100=0.0)],
        [profile(l100=1e9)],
        [profile(l100=0.1), profile(l50=0.1)],
    ],
)
def test_profiles_without_use_are_no_model(answers: list[Json]) -> None:
    assert from_profiles(answers) is None


def test_levels_the_engine_does_not_use_are_left_out() -> None:
    answer = profile(l25=0.1, l75=0.4, l100=0.4)
    answer["levels"][1]["useful"] = False
    answer["levels"][2]["useful"] = False  # 100 stays all the same
    model = from_profiles([answer])
    assert model is not None and [p.level for p in model.points] == [25, 100]
    assert model.prefill_level(90) == 25 and model.prefill_level(20) == 25


@pytest.mark.parametrize(
    ("ceiling", "level"), [(100, 100), (99, 75), (75, 75), (30, 25), (25, 25), (10, 25)]
)
def test_prompts_are_read_at_a_level_below_the_ceiling(ceiling: int, level: int) -> None:
    assert prefill_level(ceiling) == level


@pytest.mark.parametrize(
    ("floor", "top", "step", "levels"),
    [
        (80, 100, 10, (100, 90, 80)),
        (85, 100, 10, (100, 90, 85)),
        (60, 60, 5, (60,)),
        (10, 100, 50, (100, 50, 10)),
    ],
)
def test_ceilings_offered(floor: int, top: int, step: int, levels: tuple[int, ...]) -> None:
    assert offered_levels(floor, top, step) == levels


def test_memory_survives_json() -> None:
    memory = Memory(seq=3, floor=25, ceiling=60, below_since=7.5, last_data=9.0,
                    samples=((1.0, Demand(1.5, 400.0, 30.0)),))  # fmt: skip
    assert memory_from_json(memory.to_json()) == memory
    with pytest.raises((KeyError, TypeError, ValueError)):
        memory_from_json({"samples": [[1]]})


def test_replicas_outside_their_bounds_are_brought_in() -> None:
    limits = Limits(25, 100, 100, autoscaling=True, min_replicas=2, max_replicas=4)
    signals = Signals(1.0, Demand(0, 0, 0))
    for wanted, expected in ((1, 2), (9, 4), (3, 3)):
        found = decide(limits, signals, None, Pods(wanted, wanted), Memory(), 1.0)
        assert found.replicas == expected
        assert bool(found.changes) == (wanted != expected)


def test_engines_that_serve_less_than_the_ceiling_want_more_pods() -> None:
    costs = CostModel((LevelCost(50, 0.1, 0.1), LevelCost(100, 0.2, 0.2)))
    limits = Limits(25, 100, 100, autoscaling=True, min_replicas=1, max_replicas=4)
    signals = Signals(100.0, Demand(1, 1, 1), served_level=60.0)
    memory = Memory(seq=1, floor=25, ceiling=100, below_since=0.0)
    assert decide(limits, signals, costs, Pods(1, 1), memory, 100.0).replicas == 2


def test_names_and_tokens() -> None:
    assert names.job("tiny", "abc") == "tiny-refactor-abc"
    assert len(names.job("a" * 40, "12345678")) <= 63
    assert names.artifact_path("/a//b/", "h") == "a/b/artifacts/h"
    assert names.digest({"a": 1, "b": 2}) == names.digest({"b": 2, "a": 1})
    assert names.admin_token(b"k", "u1") != names.admin_token(b"k", "u2")


def test_every_problem_of_a_spec_is_told() -> None:
    body = {
        "metadata": {"name": "x", "namespace": "n", "uid": "u"},
        "spec": {
            "model": {"uri": "s3://x"},
            "cache": {},
            "serving": {"replicas": True},
            "elasticity": {"mode": "Sometimes"},
            "slo": {"ttft": {}},
            "paused": "yes",
        },
    }
    with pytest.raises(api.SpecError) as error:
        api.parse(body)
    for path in (
        "spec.model.uri",
        "spec.cache",
        "spec.serving.replicas",
        "spec.elasticity.mode",
        "spec.paused",
    ):
        assert path in str(error.value)
    with pytest.raises(api.SpecError, match=r"metadata\.name: missing"):
        api.parse({"spec": {}})


def test_condition_times() -> None:
    first = merge([Condition("Ready", False, "A", "one")], (), 1, "t1")
    second = merge([Condition("Ready", False, "B", "two")], first, 2, "t2")
    third = merge([Condition("Ready", None, "C")], second, 2, "t3")
    assert [c[0]["lastTransitionTime"] for c in (first, second, third)] == ["t1", "t1", "t3"]
    assert third[0]["status"] == "Unknown"
    assert merge([], third, 3, "t4") == []


def test_a_deadline_says_which_field_to_raise(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle(finish=False)
    controllers.set_job(operator.cluster, operator.job(), "Failed", "DeadlineExceeded")
    operator.settle(finish=False)
    _, reason, text = operator.condition("Refactored")
    assert reason == "DeadlineExceeded" and "activeDeadlineSeconds" in text


def test_an_engine_out_of_memory_says_which_field_to_raise(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body())
    operator.settle(ready=False)
    pod = next(p for p in operator.cluster.list("pods") if p["status"].get("podIP"))
    last = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}

    def kill(body: Json) -> None:
        row = {"name": "engine", "restartCount": 1, "state": {}, "lastState": last}
        body["status"]["containerStatuses"] = [row]

    operator.cluster.edit("pods", "llm", pod["metadata"]["name"], kill)
    operator.settle(ready=False)
    _, reason, text = operator.condition("WorkloadsReady")
    assert reason == "OutOfMemory" and "spec.serving.resources.limits.memory" in text


def test_pods_that_the_server_refuses_are_told(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body())
    operator.settle(ready=False)

    def refuse(body: Json) -> None:
        row = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: pods"}
        body["status"]["conditions"] = [row]

    operator.cluster.edit("deployments", "llm", "tiny", refuse)
    operator.step()
    assert operator.condition("WorkloadsReady")[1:] == ("PodsRefused", "exceeded quota: pods")


def test_no_replicas_is_stopped_and_not_failed(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body(serving={"replicas": 0}))
    operator.settle()
    assert operator.status["phase"] == "Stopped"
    assert operator.condition("Ready")[:2] == ("False", "Stopped")
    assert operator.status["display"]["replicas"] == "0/0"


def test_scaling_limits_are_told(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body(autoscaling={"mode": "Auto", "maxReplicas": 1}))
    operator.settle()
    assert operator.condition("ScalingLimited")[0] == "False"
    costs = CostModel((LevelCost(100, 0.1, 0.1),))
    for _ in range(10):
        signals = Signals(operator.now, Demand(50, 50, 50), served_level=40.0)
        operator.telemetry.measured = Measured(signals, costs, Report(), "Prometheus")
        operator.idle(5)
    state, reason, text = operator.condition("ScalingLimited")
    assert (state, reason) == ("True", "TooFewReplicasAllowed") and "all 1 replicas" in text


def test_a_pod_that_finds_no_node_limits_scaling(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body(autoscaling={"mode": "Auto", "minReplicas": 2, "maxReplicas": 3}))
    operator.settle()
    pod = operator.cluster.list("pods", "llm", "moeprism.io/role=serving")[0]

    def strand(body: Json) -> None:
        row = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
               "message": "0/1 nodes: insufficient nvidia.com/gpu"}  # fmt: skip
        body["status"] = {"conditions": [row]}

    operator.cluster.edit("pods", "llm", pod["metadata"]["name"], strand)
    operator.step()
    assert operator.condition("ScalingLimited")[1] == "NoCapacity"
    assert operator.condition("Degraded")[:2] == ("True", "PodsMissing")
    assert operator.status["phase"] == "Degraded"


def test_children_of_another_owner_are_foreign() -> None:
    row = {"kind": "Service", "metadata": {"name": "x", "ownerReferences": [{"uid": "other"}]}}
    assert observe("mine", {"Service": [row]}, {}).foreign == ("Service x",)
