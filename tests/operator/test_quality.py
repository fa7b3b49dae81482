"""The quality gate: which levels are offered, what is said of the others, and that pods obey it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from prism_operator import api, plan, quality
from prism_operator.api import QualityGate

from . import controllers
from .harness import Operator

Json = dict[str, Any]
Make = Callable[..., Json]
POINTS = quality.points(controllers.RESULT)  # levels 100, 75, 50 and 25


def gate(limit: float, metric: str = "perplexity") -> Json:
    return {"qualityGate": {"metric": metric, "maxIncreasePercent": limit}}


@pytest.mark.parametrize(
    ("metric", "limit", "floor"),
    [
        *(("perplexity", limit, floor) for limit, floor in
          ((1000, 25), (5, 25), (4.99, 50), (1, 50), (0.99, 75), (0.2, 75), (0.19, 100), (0, 100))),
        *(("kl", limit, floor) for limit, floor in ((7, 25), (2, 50), (1, 75), (0.2, 100))),
        *(("topOneDisagreement", limit, floor) for limit, floor in
          ((15, 25), (14.5, 50), (6, 75), (1, 100))),
    ],
)  # fmt: skip
def test_the_floor_is_the_lowest_measured_level_that_passes(
    metric: str, limit: float, floor: int
) -> None:
    verdict = quality.judge(QualityGate(metric, limit), POINTS)
    assert verdict.floor == floor and verdict.failed == (floor == 100)


def test_without_a_gate_all_levels_are_offered() -> None:
    assert quality.judge(None, POINTS).floor == 10
    assert not quality.judge(None, ()).failed


def test_a_bad_level_in_the_middle_bars_all_below_it() -> None:
    points = [{"levelPercent": n, "lossBasisPoints": x} for n, x in ((90, 10), (75, 900), (50, 1))]
    verdict = quality.judge(QualityGate("perplexity", 2), points)
    assert verdict.floor == 90 and "not offered: 75 (9.00 %), 50 (0.01 %)" in verdict.text


def test_what_was_not_measured_does_not_pass() -> None:
    points = [{"levelPercent": 50, "lossBasisPoints": 1}]
    verdict = quality.judge(QualityGate("kl", 100), points)
    assert verdict.failed and "50 (not measured)" in verdict.text
    assert quality.judge(QualityGate("perplexity", 100), ()).failed


def test_the_figures_of_status_are_those_of_the_message() -> None:
    half = next(point for point in POINTS if point["levelPercent"] == 50)
    assert half == {
        "levelPercent": 50,
        "ownSharePermille": 500,
        "lossBasisPoints": 100,
        "errorBasisPoints": 5,
        "klBasisPoints": round(10_000 * (math.exp(0.012) - 1)),
        "topOneBasisPoints": 700,
    }


@pytest.mark.parametrize("figure", [math.nan, math.inf, "a", None])
@pytest.mark.parametrize("field", ["loss", "kl", "top1"])
def test_a_figure_that_is_no_number_fails_the_job_and_not_the_operator(
    operator: Operator, make_body: Make, field: str, figure: Any
) -> None:
    operator.apply(make_body())
    operator.settle(finish=False)
    result = {**controllers.RESULT, "points": [{"level": 50, field: figure}]}
    controllers.finish_jobs(operator.cluster, result)
    operator.settle(finish=False)
    assert operator.condition("Refactored")[:2] == ("False", "NoResult")


def test_the_gate_stands_above_the_bounds(make_body: Make) -> None:
    body = make_body(refactor=gate(1), elasticity={"maxLevelPercent": 40})
    limits = plan.limits_of(api.parse(body), {"points": POINTS})
    assert (limits.floor, limits.top, limits.preferred) == (50, 50, 50)
    manual = make_body(refactor=gate(1), elasticity={"mode": "Manual", "levelPercent": 30})
    assert plan.limits_of(api.parse(manual), {"points": POINTS}).fixed == 50


def test_a_passed_gate_reaches_the_pods_and_names_what_is_not_offered(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body(refactor=gate(1.5)))
    operator.settle()
    assert operator.level()["floor"] == 50
    assert operator.control("slo.json")["lowest_level"] == 50
    state, reason, text = operator.condition("Refactored")
    assert (state, reason) == ("True", "QualityGatePassed")
    assert "perplexity at most 1.5 % above" in text and "not offered: 25 (5.00 %)" in text


@pytest.mark.parametrize("mode", [{"mode": "Auto"}, {"mode": "Manual", "levelPercent": 60}])
def test_a_gate_that_no_level_passes_is_a_condition_and_100_is_served(
    operator: Operator, make_body: Make, mode: Json
) -> None:
    operator.apply(make_body(refactor=gate(0.1), elasticity=mode))
    operator.settle()
    state, reason, text = operator.condition("Refactored")
    assert (state, reason) == ("False", "QualityGateFailed")
    assert "perplexity at most 0.1 %" in text
    assert "75 (0.20 %), 50 (1.00 %), 25 (5.00 %)" in text
    assert (operator.level()["floor"], operator.level()["ceiling"]) == (100, 100)
    assert operator.condition("Ready")[0] == "True" and operator.status["phase"] == "Serving"
    told = [write.body for write in operator.writes("events")]
    assert any(e["type"] == "Warning" and e["reason"] == "QualityGateFailed" for e in told)
    operator.idle(60)  # the figures follow the conditions
    assert operator.idle(120) == []


def test_a_gate_may_change_while_pods_serve(operator: Operator, make_body: Make) -> None:
    operator.apply(make_body(refactor=gate(0.1)))
    operator.settle()
    before = operator.deployment()["spec"]
    operator.edit_spec(refactor=gate(10))
    operator.settle()
    assert operator.condition("Refactored")[:2] == ("True", "QualityGatePassed")
    assert operator.level()["floor"] == 25
    assert operator.deployment()["spec"] == before and len(operator.writes("jobs")) == 1


@pytest.mark.parametrize("value", ["5", True, None])
def test_a_limit_of_another_kind_is_named(make_body: Make, value: Any) -> None:
    body = make_body(refactor=gate(1))
    body["spec"]["refactor"]["qualityGate"]["maxIncreasePercent"] = value
    with pytest.raises(api.SpecError, match=r"qualityGate\.maxIncreasePercent"):
        api.parse(body)
