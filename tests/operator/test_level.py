"""The level, its bounds and its targets on the way from the operator to pods and status."""

import json
from collections.abc import Callable
from typing import Any

from prism_operator.plan import Report

from .harness import Operator, traffic

Json = dict[str, Any]
Make = Callable[..., Json]


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
