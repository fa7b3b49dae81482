"""From counters to signals: text exposition, windows, resets, quantiles. Pure but for its name.

Both sources, Prometheus and the pods themselves, end as ``Series``: a value per (metric, label),
the label being the one that matters for that metric (objective, phase or le). A counter that went
down was reset by a restart, so its whole new value is the increase.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from prism.contract import Metric

from prism_operator.plan import Report
from prism_operator.scaler.model import Demand
from prism_operator.scaler.state import Events, Signals

Series = dict[tuple[str, str], float]

TTFT_BUCKET: Final = f"{Metric.TTFT}_bucket"
ITL_BUCKET: Final = f"{Metric.ITL}_bucket"
# Metric -> the label that is kept.
CONTROL: Final[Mapping[str, str]] = {
    Metric.RECEIVED: "",
    Metric.RECEIVED_PROMPT_TOKENS: "",
    Metric.GENERATION_TOKENS: "",
    Metric.SLO_TOTAL: "objective",
    Metric.SLO_GOOD: "objective",
    Metric.LEVEL_TOKENS: "phase",
    Metric.LEVEL_WEIGHTED_TOKENS: "phase",
}
REPORT: Final[Mapping[str, str]] = {
    Metric.RECEIVED: "",
    Metric.GENERATION_TOKENS: "",
    Metric.REQUEST_SUCCESS: "",
    Metric.SLO_TOTAL: "objective",
    Metric.SLO_GOOD: "objective",
    Metric.LEVEL_TOKENS: "phase",
    Metric.LEVEL_WEIGHTED_TOKENS: "phase",
    TTFT_BUCKET: "le",
    ITL_BUCKET: "le",
}
GAUGES: Final[Mapping[str, str]] = {Metric.RUNNING: "", Metric.WAITING: ""}
LABELS: Final = {**CONTROL, **REPORT, **GAUGES}

_LINE: Final = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse(text: str) -> Series:
    """Text exposition to the series we know, summed over the labels we do not keep."""
    series: Series = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None or match[1] not in LABELS:
            continue
        label = LABELS[match[1]]
        value = float(match[3])
        if math.isnan(value):
            continue
        kept = dict(_LABEL.findall(match[2] or "")).get(label, "") if label else ""
        key = (match[1], kept)
        series[key] = series.get(key, 0.0) + value
    return series


def add(parts: Iterable[Series]) -> Series:
    """Sum over pods."""
    total: Series = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total


def increase(history: Sequence[tuple[float, Series]], since: float) -> tuple[Series, float]:
    """Growth of one pod's counters after ``since``, and the seconds it was watched for."""
    start = max((i for i, (at, _) in enumerate(history) if at <= since), default=0)
    rows = history[start:]
    grown: Series = {}
    for (_, before), (_, after) in pairwise(rows):
        for key, value in after.items():
            last = before.get(key, 0.0)
            grown[key] = grown.get(key, 0.0) + (value - last if value >= last else value)
    return grown, (rows[-1][0] - rows[0][0] if rows else 0.0)


def signals(at: float, control: Series, seconds: float, report: Series, gauges: Series) -> Signals:
    """The law's view; ``control`` (over ``seconds``) and ``report`` are increases."""

    def rate(name: str) -> float:
        return control.get((name, ""), 0.0) / seconds if seconds > 0 else 0.0

    requests = rate(Metric.RECEIVED)
    output = max(rate(Metric.GENERATION_TOKENS), requests * output_per_request(report))
    return Signals(
        at=at,
        demand=Demand(requests, rate(Metric.RECEIVED_PROMPT_TOKENS), output),
        waiting=gauges.get((Metric.WAITING, ""), 0.0),
        running=gauges.get((Metric.RUNNING, ""), 0.0),
        ttft=_events(control, "ttft"),
        itl=_events(control, "itl"),
        served_level=served_level(control),
    )


def report(window: Series, ttft_percentile: int | None, itl_percentile: int | None) -> Report:
    """Figures for status over the reporting window; two significant digits, so that they rest."""
    level = served_level(window)
    return Report(
        ttft_ms=_milliseconds(window, TTFT_BUCKET, ttft_percentile),
        itl_ms=_milliseconds(window, ITL_BUCKET, itl_percentile),
        ttft_attainment=_attainment(window, "ttft"),
        itl_attainment=_attainment(window, "itl"),
        level=None if level is None else round(level),
    )


def output_per_request(window: Series) -> float:
    """Mean generated tokens of a request; over those received while none has ended."""
    tokens = window.get((Metric.GENERATION_TOKENS, ""), 0.0)
    ended = window.get((Metric.REQUEST_SUCCESS, ""), 0.0)
    return tokens / max(ended or window.get((Metric.RECEIVED, ""), 0.0), 1.0)


def served_level(window: Series) -> float | None:
    """Mean level of the tokens computed, in percent."""
    tokens = weighted = 0.0
    for (name, _), value in window.items():
        if name == Metric.LEVEL_TOKENS:
            tokens += value
        elif name == Metric.LEVEL_WEIGHTED_TOKENS:
            weighted += value
    return 100 * weighted / tokens if tokens >= 1 else None


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """Quantile of a cumulative histogram, linear inside a bucket; None where it is empty."""
    rows = sorted(buckets)
    total = rows[-1][1] if rows else 0.0
    if total < 0.5:
        return None
    low, below = 0.0, 0.0
    for bound, count in rows:
        if count >= share * total:
            if math.isinf(bound):
                return low
            inside = (share * total - below) / (count - below) if count > below else 1.0
            return low + (bound - low) * inside
        low, below = bound, count
    return low


def _events(window: Series, objective: str) -> Events:
    total = window.get((Metric.SLO_TOTAL, objective), 0.0)
    return Events(good=min(window.get((Metric.SLO_GOOD, objective), 0.0), total), total=total)


def _attainment(window: Series, objective: str) -> int | None:
    events = _events(window, objective)
    # Rounded down: 94.9 % is not 95 %.
    return int(100 * events.good / events.total + 1e-6) if events.total >= 0.5 else None


def _milliseconds(window: Series, name: str, percentile: int | None) -> int | None:
    buckets = [(float(le), value) for (metric, le), value in window.items() if metric == name]
    seconds = quantile(buckets, (percentile or 95) / 100)
    return None if seconds is None else int(float(f"{1000 * seconds:.2g}"))
