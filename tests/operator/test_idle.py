"""Without news nothing is written: idle, after a restart, and while only figures move."""

from collections.abc import Callable
from typing import Any

import pytest
from prism_operator import meters
from prism_operator.kube import Refused
from prism_operator.plan import Report

from .cluster import Write
from .harness import Operator, traffic

Json = dict[str, Any]
Make = Callable[..., Json]


def passed(operator: Operator) -> float:
    found = operator.reconciler.meters.registry.get_sample_value(f"{meters.SECONDS}_count")
    assert found is not None
    return found


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


@pytest.mark.parametrize("woken", [False, True], ids=["ticks", "wakes"])
def test_hundreds_of_passes_without_news_send_no_write(
    operator: Operator, make_body: Make, woken: bool
) -> None:
    operator.apply(make_body())
    operator.settle()
    traffic(operator, 0)
    operator.idle(60)
    sent, passes = operator.sent(), passed(operator)
    for _ in range(500):
        traffic(operator, 0)
        assert operator.idle(1, tick=1, woken=woken) == []
    assert passed(operator) == passes + 500
    assert operator.sent() == sent > 0


def test_the_counter_knows_every_write_that_was_sent(operator: Operator, make_body: Make) -> None:
    """Or silence on the metrics page would prove nothing: Events and refused writes count too."""

    def fault(write: Write) -> None:
        tried.append(write)
        if write.plural == "services":
            raise Refused("403 services: forbidden")

    tried: list[Write] = []
    operator.cluster.fault = fault
    operator.apply(make_body())
    operator.settle()
    assert {"events", "services", "jobs", "prismmodels"} <= {write.plural for write in tried}
    assert operator.sent() == len(tried)


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
