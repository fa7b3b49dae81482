"""Without news nothing is written: idle, after a restart, and while only figures move."""

from collections.abc import Callable
from typing import Any

from prism_operator.plan import Report

from .harness import Operator, traffic

Json = dict[str, Any]
Make = Callable[..., Json]


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
