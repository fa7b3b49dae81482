"""Figures count what failed as missed and divide time without overlap."""

import math

import pytest

from hack.demo.load import Sent
from hack.demo.stats import percentile, window, windows


def good(due: float, ttft: float, level: int = 100) -> Sent:
    return Sent(due, due + ttft, 200, ttft=ttft, gaps=(0.01, 0.03), level=level)


def bad(due: float) -> Sent:
    return Sent(due, due + 1, 503, error="busy")


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(v) for v in range(1, 101)]
    assert percentile(values, 0.95) == 95
    assert percentile([7.0], 0.5) == 7
    assert percentile([], 0.5) is None


def test_failed_requests_miss_the_target_and_have_no_end() -> None:
    figures = window([good(0, 0.1), bad(1)], 0, 10, ttft_ms=200, itl_ms=20)
    assert figures.failed == 1
    assert figures.ttft_attainment == 0.5
    assert figures.ttft_p95 == math.inf
    assert figures.itl_attainment == 0.5, "gaps are events of their own"


def test_an_empty_window_has_no_figures() -> None:
    figures = window([], 0, 5, ttft_ms=200, itl_ms=None)
    assert figures.rate == 0
    assert figures.ttft_attainment is None and figures.itl_attainment is None
    assert figures.level is None


def test_each_request_is_in_one_window() -> None:
    sent = [good(t / 2, 0.1, level=50 if t < 10 else 100) for t in range(40)]
    parts = windows(sent, 20, 5, 200, 20)
    assert [w.offered for w in parts] == [10, 10, 10, 10]
    assert [w.level for w in parts] == [50, 100, 100, 100]
    assert parts[0].rate == pytest.approx(2.0)
