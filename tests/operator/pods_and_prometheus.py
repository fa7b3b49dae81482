"""A serving pod and a Prometheus as the operator meets them: real HTTP, figures set by a test."""

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from prism.contract import Metric

Json = dict[str, Any]


@dataclass
class Pod:
    """``token`` is what it lets in; ``counters`` (metric, label) go to /metrics."""

    token: str
    counters: dict[tuple[str, str], float] = field(default_factory=dict)
    level: Json = field(default_factory=lambda: {"seq": 0, "floor": 100, "ceiling": 100})
    puts: list[Json] = field(default_factory=list)
    cost_s: float = 0.0005
    down: bool = False
    api_port: int = 0
    admin_port: int = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/admin/profile", self._profile)
        app.router.add_put("/admin/level", self._put)
        return app

    async def _metrics(self, _: web.Request) -> web.Response:
        if self.down:
            return web.Response(status=503)
        lines = []
        for (name, label), value in self.counters.items():
            key = {Metric.SLO_TOTAL: "objective", Metric.SLO_GOOD: "objective"}.get(name, "phase")
            key = "le" if name.endswith("_bucket") else key
            labels = f',{key}="{label}"' if label else ""
            lines.append(f'{name}{{prism_model="llm/tiny"{labels}}} {value}')
        return web.Response(text="# HELP x y\n" + "\n".join(lines) + "\n")

    async def _profile(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": "no"}, status=401)
        rows = [
            {
                "level": level,
                "prefill_seconds_per_token": self.cost_s * (0.1 + 0.9 * level / 100),
                "decode_seconds_per_token": 0.0,
            }
            for level in (25, 50, 75, 100)
        ]
        return web.json_response(
            {
                "levels": rows,
                "step_overhead_seconds": 0.001,
                "seq": self.level["seq"],
                "ready": True,
            }
        )

    async def _put(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": "no"}, status=401)
        body = await request.json()
        if body["seq"] < self.level["seq"]:
            return web.json_response(self.level, status=409)
        self.level = body
        self.puts.append(body)
        return web.json_response(body)


@dataclass
class Prometheus:
    """Answers instant queries from ``values``: (metric, label) -> value per object."""

    values: dict[str, dict[tuple[str, str], float]] = field(default_factory=dict)
    age: float = 1.0
    mode: str = "ok"  # ok, error or slow
    instance: str = "127.0.0.1:8000"
    queries: list[str] = field(default_factory=list)
    url: str = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/api/v1/query", self._query)
        return app

    async def _query(self, request: web.Request) -> web.Response:
        query = str((await request.post())["query"])
        self.queries.append(query)
        if self.mode == "slow":
            await asyncio.sleep(30)
        if self.mode == "error":
            return web.json_response({"status": "error", "error": "boom"}, status=503)
        rows = []
        if query.startswith("time()"):
            rows = [_row({"prism_model": key}, self.age) for key in self.values]
        else:
            found = re.search(r"\(([\w:]+)(?:\[|\)$)", query)
            name = found[1] if found else ""
            label = (re.search(r"instance, (\w+)\)", query) or [None, ""])[1]
            for key, series in self.values.items():
                for (metric, kept), value in series.items():
                    if metric == name:
                        labels = {"prism_model": key, "instance": self.instance}
                        rows.append(_row({**labels, label: kept} if label else labels, value))
        return web.json_response({"status": "success", "data": {"result": rows}})


def _row(labels: Json, value: float) -> Json:
    return {"metric": labels, "value": [0, str(value)]}


async def listen(app: web.Application) -> tuple[web.AppRunner, int]:
    """Start on a random port of 127.0.0.1."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, int(runner.addresses[0][1])
