"""Measurements of all PrismModels: from Prometheus in one batch, from the pods without it.

It knows HTTP and whose numbers are fresh; what they mean is scaler.read's. One task asks
Prometheus, one query per signal for all objects, so a slow Prometheus delays nobody: a loop reads
the last answer, and one older than ``FRESH_S`` counts as none. Then the pods' own /metrics are
read.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from prism import contract

from prism_operator.api import Model
from prism_operator.observe import PodView
from prism_operator.plan import Measured
from prism_operator.scaler import read
from prism_operator.scaler.model import from_profiles
from prism_operator.scaler.read import Series

CONTROL_S: Final = 15
FRESH_S: Final = 15.0
PROMETHEUS_TIMEOUT_S: Final = 4.0
POD_TIMEOUT_S: Final = 2.0

log = logging.getLogger("prism.telemetry")
Row = tuple[str, str, float]  # instance, kept label, value


@dataclass(slots=True)
class _Answer:
    """One round of queries. Rows by (window or 0 for gauges, metric) and then by object."""

    at: float
    ages: dict[str, float]
    rows: dict[tuple[int, str], dict[str, list[Row]]]


@dataclass(slots=True)
class Telemetry:
    """``windows`` holds each object's reporting window; its keys are the objects of interest."""

    url: str
    session: aiohttp.ClientSession
    tick_s: float = 5.0
    clock: Callable[[], float] = time.time
    problem: str = ""
    windows: dict[str, int] = field(default_factory=dict)
    _answer: _Answer | None = None
    _history: dict[str, dict[str, deque[tuple[float, Series]]]] = field(default_factory=dict)

    async def run(self) -> None:
        """Ask Prometheus twice per tick, for ever: what a loop reads is half a tick old at most."""
        while True:
            if self.windows:
                await self.ask()
            await asyncio.sleep(self.tick_s / 2)

    async def ask(self) -> None:
        """One round; a failure leaves the last answer to grow old."""
        try:
            async with asyncio.timeout(PROMETHEUS_TIMEOUT_S):
                self._answer = await self._round(self.clock())
            problem = ""
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            problem = f"Prometheus at {self.url}: {type(error).__name__} {error}".strip()
        if problem != self.problem:
            log.warning("%s", problem) if problem else log.info("Prometheus answers again")
            self.problem = problem

    def forget(self, key: str) -> None:
        self.windows.pop(key, None)
        self._history.pop(key, None)

    async def measure(
        self, model: Model, pods: Sequence[PodView], seq: int, token: str
    ) -> Measured:
        """Everything known of one object now; never raises for a pod that does not answer."""
        self.windows[model.key] = model.slo_window_s
        fresh = self._from_prometheus(model, pods)
        profiles = asyncio.gather(*(self._profile(pod, token) for pod in pods))
        if fresh is None:
            signals, report = await self._from_pods(model, pods)
            source, problem = "PodsRead", self.problem if self.url else ""
        else:
            (signals, report), source, problem = fresh, "Prometheus", ""
            self._history.pop(model.key, None)
        known = [profile for profile in await profiles if profile is not None]
        seqs = [int(profile.get("seq", 0)) for profile in known]
        return Measured(
            signals=signals,
            costs=from_profiles(known),
            report=report,
            source=source,
            problem=problem,
            top_seq=max(seqs, default=0),
            applied=sum(1 for one in seqs if one >= seq),
        )

    async def push(self, pods: Sequence[PodView], level: Mapping[str, int], token: str) -> int:
        """PUT the bounds to all pods at once; returns how many took them (or know newer ones)."""
        return sum(await asyncio.gather(*(self._put(pod, level, token) for pod in pods)))

    async def _round(self, now: float) -> _Answer:
        spans = sorted({CONTROL_S, *self.windows.values()})
        wanted = [(CONTROL_S, name) for name in read.CONTROL]
        wanted += [(span, name) for span in spans for name in read.REPORT]
        wanted += [(0, name) for name in read.GAUGES]
        keys = list(dict.fromkeys(wanted))
        age = f"time() - max by (prism_model) (timestamp({contract.Metric.RECEIVED}))"
        found = await asyncio.gather(
            self._query(age), *(self._query(_promql(name, span)) for span, name in keys)
        )
        ages = {r["metric"].get("prism_model", ""): float(r["value"][1]) for r in found[0]}
        rows = {key: _rows(result, key[1]) for key, result in zip(keys, found[1:], strict=True)}
        return _Answer(now, ages, rows)

    async def _query(self, query: str) -> list[Any]:  # Any: Prometheus' own JSON
        url = f"{self.url}/api/v1/query"
        async with self.session.post(url, data={"query": query}) as answer:
            body = await answer.json(content_type=None)
        if not isinstance(body, dict) or body.get("status") != "success":
            raise ValueError(f"answered {answer.status} to {query!r}: {str(body)[:200]}")
        result: list[Any] = body["data"]["result"]
        return result

    def _from_prometheus(
        self, model: Model, pods: Sequence[PodView]
    ) -> tuple[Any, Any] | None:  # (Signals, Report)
        answer, key = self._answer, model.key
        if not self.url or answer is None or key not in answer.ages:
            return None
        at = answer.at - max(0.0, answer.ages[key])
        if self.clock() - at > FRESH_S:
            return None
        ips = {pod.ip for pod in pods}

        def series(span: int, names: Mapping[str, str]) -> Series:
            rows = {name: answer.rows.get((span, name), {}).get(key, []) for name in names}
            return _live(rows, ips)

        window = series(model.slo_window_s, read.REPORT)
        control = series(CONTROL_S, read.CONTROL)
        signals = read.signals(at, control, CONTROL_S, window, series(0, read.GAUGES))
        return signals, read.report(window, *_percentiles(model))

    async def _from_pods(self, model: Model, pods: Sequence[PodView]) -> tuple[Any, Any]:
        texts = await asyncio.gather(*(self._metrics(pod) for pod in pods))
        now, kept = self.clock(), self._history.setdefault(model.key, {})
        for gone in set(kept) - {pod.name for pod in pods}:
            del kept[gone]
        fresh: list[str] = []
        for pod, text in zip(pods, texts, strict=True):
            if text is not None:
                rows = kept.setdefault(pod.name, deque())
                rows.append((now, read.parse(text)))
                while rows[0][0] < now - model.slo_window_s - 2 * self.tick_s:
                    rows.popleft()
                fresh.append(pod.name)
        histories = [list(kept[name]) for name in fresh]
        report = read.add(read.increase(rows, now - model.slo_window_s)[0] for rows in histories)
        spans = [read.increase(rows, now - CONTROL_S) for rows in histories]
        seconds = max((span for _, span in spans), default=0.0)
        figures = read.report(report, *_percentiles(model))
        if seconds <= 0:
            return None, figures
        # A pod that did not answer carries load too: assume it carries as much as the others.
        share = len(pods) / len(fresh)
        control = {k: v * share for k, v in read.add(grown for grown, _ in spans).items()}
        gauges = read.add(rows[-1][1] for rows in histories)
        return read.signals(now, control, seconds, report, gauges), figures

    async def _metrics(self, pod: PodView) -> str | None:
        try:
            url = f"http://{_host(pod.ip)}:{pod.api_port}{contract.PATH_METRICS}"
            async with asyncio.timeout(POD_TIMEOUT_S), self.session.get(url) as answer:
                return await answer.text() if answer.status == 200 else None
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            log.debug("metrics of pod %s: %s", pod.name, error)
            return None

    async def _profile(self, pod: PodView, token: str) -> dict[str, Any] | None:
        try:
            async with (
                asyncio.timeout(POD_TIMEOUT_S),
                self.session.get(
                    _admin(pod, contract.PATH_PROFILE), headers=_bearer(token)
                ) as answer,
            ):
                body = await answer.json() if answer.status == 200 else None
                return body if isinstance(body, dict) else None
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            log.debug("profile of pod %s: %s", pod.name, error)
            return None

    async def _put(self, pod: PodView, level: Mapping[str, int], token: str) -> bool:
        try:
            async with (
                asyncio.timeout(POD_TIMEOUT_S),
                self.session.put(
                    _admin(pod, contract.PATH_LEVEL), json=dict(level), headers=_bearer(token)
                ) as answer,
            ):
                if answer.status not in (200, 204, 409):
                    log.warning("pod %s refused level %s: %s", pod.name, level, answer.status)
                return answer.status in (200, 204, 409)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            log.warning("pod %s was not told level %s: %s", pod.name, dict(level), error)
            return False


def _promql(name: str, span: int) -> str:
    label = read.LABELS[name]
    by = ", ".join(("prism_model", "instance", *((label,) if label else ())))
    return f"sum by ({by}) ({f'increase({name}[{span}s])' if span else name})"


def _rows(result: Sequence[Any], name: str) -> dict[str, list[Row]]:
    label, found = read.LABELS[name], dict[str, list[Row]]()
    for row in result:
        metric, value = row["metric"], float(row["value"][1])
        if value == value:  # not NaN
            kept = metric.get(label, "") if label else ""
            row_of = (str(metric.get("instance", "")), kept, value)
            found.setdefault(metric.get("prism_model", ""), []).append(row_of)
    return found


def _live(rows: Mapping[str, list[Row]], ips: set[str]) -> Series:
    """Without the series of pods that are gone, where instances are told by address at all."""
    total: Series = {}
    told = any(_address(instance) in ips for group in rows.values() for instance, _, _ in group)
    for name, group in rows.items():
        for instance, kept, value in group:
            if not told or _address(instance) in ips:
                total[name, kept] = total.get((name, kept), 0.0) + value
    return total


def _address(instance: str) -> str:
    return instance.rsplit(":", 1)[0].strip("[]")


def _percentiles(model: Model) -> tuple[int | None, int | None]:
    return (
        model.ttft.percentile if model.ttft else None,
        model.itl.percentile if model.itl else None,
    )


def _host(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip


def _admin(pod: PodView, path: str) -> str:
    return f"http://{_host(pod.ip)}:{pod.admin_port}{path}"


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
