"""Figures: from Prometheus while it is fresh, from the pods when not; and what they mean."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prism.contract import Metric
from prism_operator import api
from prism_operator.observe import PodView
from prism_operator.scaler import read
from prism_operator.telemetry import Telemetry

from .pods_and_prometheus import Pod, Prometheus, listen

Json = dict[str, Any]
Make = Callable[..., Json]
RECEIVED, PROMPT = (Metric.RECEIVED, ""), (Metric.RECEIVED_PROMPT_TOKENS, "")


@dataclass
class Bench:
    telemetry: Telemetry
    pods: list[Pod]
    prometheus: Prometheus
    now: float = 1_000_000.0

    @property
    def views(self) -> list[PodView]:
        return [
            PodView(f"p{i}", "127.0.0.1", True, False, "", pod.api_port, pod.admin_port, None)
            for i, pod in enumerate(self.pods)
        ]


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    pods, runners = [Pod("secret"), Pod("secret")], []
    for pod in pods:
        runner, pod.api_port = await listen(pod.app())
        pod.admin_port = pod.api_port
        runners.append(runner)
    prometheus = Prometheus()
    runner, port = await listen(prometheus.app())
    prometheus.url = f"http://127.0.0.1:{port}"
    runners.append(runner)
    async with aiohttp.ClientSession() as session:
        telemetry = Telemetry(prometheus.url, session)
        bench = Bench(telemetry, pods, prometheus)
        telemetry.clock = lambda: bench.now
        yield bench
    for one in runners:
        await one.cleanup()


def ask(bench: Bench, body: Json, seq: int = 0) -> Any:
    return bench.telemetry.measure(api.parse(body), bench.views, seq, "secret")


async def test_prometheus_is_read_in_one_batch_for_all_objects(
    bench: Bench, make_body: Make
) -> None:
    for name in ("tiny", "other"):
        bench.telemetry.windows[f"llm/{name}"] = 300
    bench.prometheus.values = {
        "llm/tiny": {RECEIVED: 75.0, PROMPT: 30000.0, (Metric.WAITING, ""): 2.0},
        "llm/other": {RECEIVED: 15.0},
    }
    await bench.telemetry.ask()
    first = len(bench.prometheus.queries)
    tiny, other = await ask(bench, make_body()), await ask(bench, make_body("other"))
    assert len(bench.prometheus.queries) == first
    assert len(set(bench.prometheus.queries)) == first
    assert tiny.source == "Prometheus"
    assert tiny.signals.demand.requests == 5 and tiny.signals.demand.prompt_tokens == 2000
    assert tiny.signals.waiting == 2 and tiny.signals.at == bench.now - 1
    assert other.signals.demand.requests == 1


@pytest.mark.parametrize("mode", ["error", "slow"])
async def test_without_prometheus_the_pods_are_read(
    bench: Bench, make_body: Make, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism_operator.telemetry.PROMETHEUS_TIMEOUT_S", 0.3)
    bench.prometheus.mode = mode
    bench.telemetry.windows["llm/tiny"] = 300
    started = time.monotonic()
    await bench.telemetry.ask()
    assert time.monotonic() - started < 2
    assert "Prometheus at" in bench.telemetry.problem
    for pod in bench.pods:
        pod.counters = {RECEIVED: 100.0, PROMPT: 5000.0}
    assert (await ask(bench, make_body())).signals is None  # one reading is no rate yet
    bench.now += 5
    for pod in bench.pods:
        pod.counters = {RECEIVED: 110.0, PROMPT: 9000.0}
    found = await ask(bench, make_body())
    assert found.source == "PodsRead" and "Prometheus at" in found.problem
    assert found.signals.demand.requests == 4 and found.signals.demand.prompt_tokens == 1600
    assert found.signals.at == bench.now


async def test_a_slow_prometheus_keeps_nobody_waiting(bench: Bench, make_body: Make) -> None:
    bench.prometheus.mode = "slow"
    bench.telemetry.windows["llm/tiny"] = 300
    task = asyncio.create_task(bench.telemetry.run())
    await asyncio.sleep(0.05)
    started = time.monotonic()
    await ask(bench, make_body())
    assert time.monotonic() - started < 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(("age", "waited"), [(20, 0), (1, 16)])
async def test_figures_older_than_15_s_are_not_used(
    bench: Bench, make_body: Make, age: float, waited: float
) -> None:
    bench.prometheus.values = {"llm/tiny": {RECEIVED: 75.0}}
    bench.prometheus.age = age
    bench.telemetry.windows["llm/tiny"] = 300
    await bench.telemetry.ask()
    bench.now += waited
    assert (await ask(bench, make_body())).source == "PodsRead"


async def test_series_of_deleted_pods_do_not_count(bench: Bench, make_body: Make) -> None:
    rows = {
        Metric.WAITING: [("10.0.0.9:8000", "", 40.0), ("127.0.0.1:8000", "", 1.0)],
    }
    from prism_operator.telemetry import _live

    assert _live(rows, {"127.0.0.1"}) == {(Metric.WAITING, ""): 1.0}
    assert _live(rows, {"10.9.9.9"}) == {(Metric.WAITING, ""): 41.0}  # instances are not addresses


async def test_a_pod_that_does_not_answer_is_taken_to_carry_its_share(
    bench: Bench, make_body: Make
) -> None:
    bench.telemetry.url = ""
    bench.pods[1].down = True
    bench.pods[0].counters = {RECEIVED: 0.0}
    await ask(bench, make_body())
    bench.now += 5
    bench.pods[0].counters = {RECEIVED: 10.0}
    assert (await ask(bench, make_body())).signals.demand.requests == 4


async def test_all_pods_gone_silent_is_no_data(bench: Bench, make_body: Make) -> None:
    bench.telemetry.url = ""
    for pod in bench.pods:
        pod.down = True
    found = await ask(bench, make_body())
    assert found.signals is None and found.costs is not None


async def test_profiles_give_costs_and_tell_who_holds_the_bounds(
    bench: Bench, make_body: Make
) -> None:
    bench.pods[0].level = {"seq": 5, "floor": 25, "ceiling": 50}
    found = await ask(bench, make_body(), seq=5)
    assert (found.top_seq, found.applied) == (5, 1)
    assert [point.level for point in found.costs.points] == [25, 50, 75, 100]


async def test_bounds_are_pushed_to_all_pods_and_an_older_number_does_not_win(
    bench: Bench, make_body: Make
) -> None:
    level = {"seq": 3, "floor": 25, "ceiling": 75}
    assert await bench.telemetry.push(bench.views, level, "secret") == 2
    assert all(pod.level == level for pod in bench.pods)
    assert await bench.telemetry.push(bench.views, {**level, "seq": 2}, "secret") == 2
    assert all(pod.level == level for pod in bench.pods)
    assert await bench.telemetry.push(bench.views, {**level, "seq": 4}, "wrong") == 0
    gone = [replace(bench.views[0], admin_port=1), bench.views[1]]
    assert await bench.telemetry.push(gone, {**level, "seq": 5}, "secret") == 1


def test_exposition_text_is_read_and_summed() -> None:
    text = (
        "# TYPE x counter\n"
        'prism:slo_events_total{model_name="m",objective="ttft",prism_model="a/b"} 7\n'
        'prism:slo_events_total{model_name="n",objective="ttft",prism_model="a/b"} 3\n'
        'vllm:time_to_first_token_seconds_bucket{le="0.1"} 2\n'
        "prism:requests_received_total 4e1 1700000000000\n"
        "vllm:num_requests_waiting NaN\n"
        "other_total 9\n"
    )
    assert read.parse(text) == {
        (Metric.SLO_TOTAL, "ttft"): 10.0,
        (read.TTFT_BUCKET, "0.1"): 2.0,
        (Metric.RECEIVED, ""): 40.0,
    }


def test_a_counter_that_was_reset_counts_from_zero() -> None:
    history = [(0.0, {RECEIVED: 90.0}), (5.0, {RECEIVED: 100.0}), (10.0, {RECEIVED: 4.0})]
    assert read.increase(history, 0.0) == ({RECEIVED: 14.0}, 10.0)
    assert read.increase(history, 6.0) == ({RECEIVED: 4.0}, 5.0)


def test_quantiles_are_linear_inside_a_bucket() -> None:
    rows = [(0.1, 50.0), (0.2, 100.0), (float("inf"), 100.0)]
    assert read.quantile(rows, 0.75) == pytest.approx(0.15)
    assert read.quantile([(0.1, 0.0), (float("inf"), 4.0)], 0.9) == 0.1
    assert read.quantile([(0.1, 0.0)], 0.9) is None


def test_expected_output_counts_towards_the_demand() -> None:
    window = {
        (Metric.GENERATION_TOKENS, ""): 1000.0,
        (Metric.REQUEST_SUCCESS, ""): 10.0,
        (Metric.RECEIVED, ""): 40.0,
    }
    control = {RECEIVED: 30.0, (Metric.GENERATION_TOKENS, ""): 15.0}
    found = read.signals(1.0, control, 15.0, window, {})
    assert found.demand.requests == 2 and found.demand.output_tokens == 200


def test_the_served_level_is_a_mean_over_tokens_and_absent_without_any() -> None:
    window = {
        (Metric.LEVEL_TOKENS, "prefill"): 100.0,
        (Metric.LEVEL_WEIGHTED_TOKENS, "prefill"): 50.0,
        (Metric.LEVEL_TOKENS, "decode"): 100.0,
        (Metric.LEVEL_WEIGHTED_TOKENS, "decode"): 100.0,
    }
    assert read.served_level(window) == 75
    assert read.served_level({}) is None


def test_attainment_is_rounded_down() -> None:
    window = {(Metric.SLO_TOTAL, "ttft"): 1000.0, (Metric.SLO_GOOD, "ttft"): 949.0}
    assert read.report(window, 95, None).ttft_attainment == 94
    assert read.report({}, 95, None).ttft_attainment is None
