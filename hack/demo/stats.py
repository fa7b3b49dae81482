"""Figures from what a run recorded: percentiles, attainment, windows. Pure.

A request that failed or was refused is a miss of its TTFT target, as in the product's own counting;
leaving it out would make a server that drops its load look good.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hack.demo.load import Sent


@dataclass(frozen=True, slots=True)
class Window:
    """What happened to the requests that were due from ``begin`` to ``end``; latencies in ms."""

    begin: float
    end: float
    offered: int
    failed: int
    ttft_p50: float | None
    ttft_p95: float | None
    itl_p95: float | None
    ttft_attainment: float | None  # 0-1
    itl_attainment: float | None
    level: float | None  # mean level at admission

    @property
    def rate(self) -> float:
        """Offered requests per second."""
        return self.offered / (self.end - self.begin)


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that ``share`` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def window(
    sent: Sequence[Sent], begin: float, end: float, ttft_ms: float, itl_ms: float | None
) -> Window:
    """Figures of the requests due in [begin, end)."""
    inside = [s for s in sent if begin <= s.due < end]
    ttfts = [1000 * s.ttft if s.ok and s.ttft is not None else math.inf for s in inside]
    gaps = [1000 * gap for s in inside for gap in s.gaps]
    levels = [s.level for s in inside if s.level is not None]
    return Window(
        begin,
        end,
        offered=len(inside),
        failed=sum(not s.ok for s in inside),
        ttft_p50=percentile(ttfts, 0.50),
        ttft_p95=percentile(ttfts, 0.95),
        itl_p95=percentile(gaps, 0.95),
        ttft_attainment=_share(ttfts, ttft_ms),
        itl_attainment=None if itl_ms is None else _share(gaps, itl_ms),
        level=sum(levels) / len(levels) if levels else None,
    )


def windows(
    sent: Sequence[Sent], seconds: float, width: float, ttft_ms: float, itl_ms: float | None
) -> list[Window]:
    """Windows of ``width`` seconds side by side from 0 to ``seconds``."""
    count = math.ceil(seconds / width)
    return [window(sent, i * width, (i + 1) * width, ttft_ms, itl_ms) for i in range(count)]


def _share(values: Sequence[float], limit: float) -> float | None:
    return sum(v <= limit for v in values) / len(values) if values else None
