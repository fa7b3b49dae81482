"""The pod's one metrics page: vLLM's names for what everybody has, prism:* for what only we have.

Knows: names, buckets, labels, and how the engine's reports become series. Must not know: HTTP
routes, the engine's internals.

Every series exists at zero from the start, so "no traffic" differs from "no data"; nothing is ever
NaN. Histograms carry vLLM's buckets plus finer ones around the targets known at start.

One decision worth arguing about: no `level` label on latency histograms. It would multiply series
and split quantiles at each level change; the level has its own series.
"""

from collections.abc import Iterable
from typing import Final

from prism.contract import PREFILL_LEVELS, Metric
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from prism_serving.control import Bounds, Slo
from prism_serving.protocol import Stats

# vLLM's buckets, seconds.
TTFT_BUCKETS: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
ITL_BUCKETS: Final = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
REQUEST_BUCKETS: Final = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)
TOKEN_BUCKETS: Final = (
    1,
    2,
    5,
    10,
    20,
    50,
    100,
    200,
    500,
    1000,
    2000,
    5000,
    10000,
    20000,
    50000,
    100000,
)
STEP_BUCKETS: Final = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.5,
    5.0,
)
_AROUND_TARGET: Final = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
FINISH_REASONS: Final = ("stop", "length", "abort", "error")
SHED_REASONS: Final = ("queue_full", "engine_away", "draining")
PHASES: Final = ("prefill", "decode")
STEP_PHASES: Final = ("prefill", "decode", "mixed")
OBJECTIVES: Final = ("ttft", "itl")


def with_target(buckets: Iterable[float], target_s: float | None) -> tuple[float, ...]:
    """Buckets plus finer ones around a target."""
    extra = [] if target_s is None else [round(target_s * x, 6) for x in _AROUND_TARGET]
    return tuple(sorted({*buckets, *extra}))


disable_created_metrics()  # type: ignore[no-untyped-call]  # else each counter has a second series


class Metrics:
    """All series of the pod. Labels: model_name, engine, prism_model."""

    def __init__(self, model_name: str, prism_model: str, slo: Slo) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0", "prism_model": prism_model}
        self.running = self._gauge(Metric.RUNNING, "Sequences in the batch")
        self.waiting = self._gauge(Metric.WAITING, "Sequences in the queue")
        self.kv_usage = self._gauge(Metric.KV_USAGE, "Share of KV memory reserved, 0 to 1")
        self.ttft = self._histogram(
            Metric.TTFT, "Receipt to first token", with_target(TTFT_BUCKETS, slo.ttft_s)
        )
        self.itl = self._histogram(
            Metric.ITL, "Gap between tokens", with_target(ITL_BUCKETS, slo.itl_s)
        )
        self.tpot = self._histogram(
            Metric.TPOT, "Mean gap of a request", with_target(ITL_BUCKETS, slo.itl_s)
        )
        self.e2e = self._histogram(Metric.E2E, "Receipt to last token", REQUEST_BUCKETS)
        self.queue_time = self._histogram(
            "vllm:request_queue_time_seconds", "Receipt to first scheduled", REQUEST_BUCKETS
        )
        self.prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "First scheduled to first token", REQUEST_BUCKETS
        )
        self.decode_time = self._histogram(
            "vllm:request_decode_time_seconds", "First to last token", REQUEST_BUCKETS
        )
        self.request_prompt = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request", TOKEN_BUCKETS
        )
        self.request_generation = self._histogram(
            "vllm:request_generation_tokens", "Produced tokens of a request", TOKEN_BUCKETS
        )
        self.iteration = self._histogram(
            "vllm:iteration_tokens_total", "Rows of a step", TOKEN_BUCKETS
        )
        self.prompt_tokens = self._counter(Metric.PROMPT_TOKENS, "Prompt tokens computed")
        self.generation_tokens = self._counter(Metric.GENERATION_TOKENS, "Tokens produced")
        self.preemptions = self._counter("vllm:num_preemptions_total", "Always 0: none are made")
        self._success = self._by(
            Metric.REQUEST_SUCCESS, "Finished requests", "finished_reason", FINISH_REASONS
        )
        self.received = self._counter(Metric.RECEIVED, "Valid requests received, shed included")
        self.received_prompt = self._counter(
            Metric.RECEIVED_PROMPT_TOKENS, "Prompt tokens received, shed included"
        )
        self._shed = self._by(Metric.SHED, "Requests refused for load", "reason", SHED_REASONS)
        self._slo_total = self._by(Metric.SLO_TOTAL, "SLO events", "objective", OBJECTIVES)
        self._slo_good = self._by(
            Metric.SLO_GOOD, "SLO events inside the target", "objective", OBJECTIVES
        )
        self._engine_series()

    def _engine_series(self) -> None:
        self.ceiling = self._gauge(Metric.LEVEL_CEILING, "Ceiling the engine runs with, 0 to 1")
        self.floor = self._gauge(Metric.LEVEL_FLOOR, "Floor the engine runs with, 0 to 1")
        self.seq = self._gauge(Metric.LEVEL_SEQ, "seq of these bounds")
        self._level_tokens = self._by(Metric.LEVEL_TOKENS, "Computed tokens", "phase", PHASES)
        self._level_weighted = self._by(
            Metric.LEVEL_WEIGHTED_TOKENS, "Computed tokens x level", "phase", PHASES
        )
        self.own = self._counter(Metric.OWN_SLICES, "Sub-experts tokens selected for themselves")
        self.candidates = self._counter(Metric.CANDIDATE_SLICES, "Sub-experts they chose from")
        self.busy = self._counter(Metric.BUSY_SECONDS, "Seconds spent in steps")
        steps = Histogram(
            Metric.STEP_SECONDS,
            "Seconds of a step",
            [*self._labels, "phase"],
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self._steps = {p: steps.labels(**self._labels, phase=p) for p in STEP_PHASES}
        self.up = self._gauge("prism:engine_up", "1 while an engine is connected and ready")
        self._prefill_cost = self._cost("prism:cost_prefill_seconds_per_token")
        self._decode_cost = self._cost("prism:cost_decode_seconds_per_token")
        self.overhead = self._gauge("prism:cost_step_overhead_seconds", "Cost of an empty step")
        self.prediction_error = self._gauge(
            "prism:cost_prediction_error_ratio", "Mean |observed / predicted - 1| of a step"
        )

    def set_bounds(self, bounds: Bounds) -> None:
        """Bounds as the engine applied them (or will, once it is there)."""
        self.ceiling.set(bounds.ceiling / 100)
        self.floor.set(bounds.floor / 100)
        self.seq.set(bounds.seq)

    def shed(self, reason: str) -> None:
        """A request refused for load."""
        self._shed[reason].inc()

    def finished(self, reason: str) -> None:
        """A request ended."""
        self._success[reason].inc()

    def slo_event(self, objective: str, good: bool) -> None:
        """One event of attainment."""
        self._slo_total[objective].inc()
        if good:
            self._slo_good[objective].inc()

    def engine_stats(self, stats: Stats) -> None:
        """Merge what the engine reported."""
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.kv_usage.set(stats.kv_used / stats.kv_total)
        self.set_bounds(Bounds(stats.seq, stats.floor, stats.ceiling))
        self.busy.inc(stats.busy_s)
        self.own.inc(stats.own)
        self.candidates.inc(stats.candidates)
        self.prompt_tokens.inc(stats.level_tokens.get("prefill", 0))
        for phase in PHASES:
            self._level_tokens[phase].inc(stats.level_tokens.get(phase, 0))
            self._level_weighted[phase].inc(stats.level_weighted.get(phase, 0.0))
        for step in stats.steps:
            self._steps[step.phase].observe(step.seconds)
            self.iteration.observe(step.tokens)
        for level in stats.profile:
            if str(level.level) in self._prefill_cost:
                self._prefill_cost[str(level.level)].set(level.prefill_seconds_per_token)
                self._decode_cost[str(level.level)].set(level.decode_seconds_per_token)
        self.overhead.set(stats.step_overhead_s)
        self.prediction_error.set(stats.prediction_error_ratio)

    def engine_lost(self) -> None:
        """Nothing runs without an engine."""
        for gauge in (self.running, self.waiting, self.kv_usage, self.up):
            gauge.set(0)

    def page(self) -> bytes:
        """The text format of /metrics."""
        return generate_latest(self.registry)

    def _cost(self, name: str) -> dict[str, Gauge]:
        gauge = Gauge(
            name, "Cost model of the engine", [*self._labels, "level"], registry=self.registry
        )
        return {str(x): gauge.labels(**self._labels, level=str(x)) for x in PREFILL_LEVELS}

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, list(self._labels), registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        family = Counter(name, text, list(self._labels), registry=self.registry)
        return family.labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(
            name, text, list(self._labels), buckets=tuple(buckets), registry=self.registry
        )
        return family.labels(**self._labels)

    def _by(self, name: str, text: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
        family = Counter(name, text, [*self._labels, label], registry=self.registry)
        return {value: family.labels(**self._labels, **{label: value}) for value in values}
