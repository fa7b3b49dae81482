"""The load generator: sends requests, notes what a client sees, and nothing else.

It knows the OpenAI completions API and the header that tells the level; it must not know targets,
clusters or reports. Latency counts from the moment a request was *due*, so a slow generator or
server cannot hide its delay by sending less. Requests, connections and time are bounded, and the
target must be this machine or a private address: this is no tool to point at others.
"""

import asyncio
import ipaddress
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
from prism import contract

MAX_IN_FLIGHT = 600
REQUEST_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Sent:
    """One request as its client saw it; seconds since the run began."""

    due: float
    ended: float
    status: int  # HTTP status; 0: no whole answer
    ttft: float | None = None  # from due to the first token
    gaps: tuple[float, ...] = ()  # between tokens
    level: int | None = None  # at admission
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.ttft is not None and not self.error


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send what: ``url`` without /v1, and what every request of the run shares."""

    url: str
    model: str
    max_tokens: int = 4  # short: prompts are where the level of a small model bites
    level: int | None = None  # pinned by the request

    def body(self, prompt: str) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,  # equal outputs
        }
        if self.level is not None:
            body["prism"] = {"level": self.level}
        return body


def require_private(url: str) -> None:
    """Raises ValueError unless the host is a loopback or private address."""
    host = urlsplit(url).hostname or ""
    address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    if not (address.is_loopback or address.is_private):
        raise ValueError(f"{url}: load goes to loopback and private addresses only")


def arrivals(segments: Sequence[tuple[float, float]], seed: int) -> list[float]:
    """Poisson arrival times for ``(seconds, requests per second)`` segments, in order."""
    chance = random.Random(seed)
    times: list[float] = []
    begin = 0.0
    for seconds, rate in segments:
        now = begin
        while rate > 0 and (now := now + chance.expovariate(rate)) < begin + seconds:
            times.append(now)
        begin += seconds
    return times


class Client:
    """Sends completions of one run; ``sent`` grows as requests end."""

    def __init__(self, target: Target, prompts: Sequence[str]) -> None:
        require_private(target.url)
        self.target = target
        self.prompts = prompts
        self.sent: list[Sent] = []
        self.in_flight = 0
        self.began = time.perf_counter()
        self._count = 0
        self._http = httpx.AsyncClient(
            base_url=target.url,
            timeout=httpx.Timeout(REQUEST_TIMEOUT_S),
            limits=httpx.Limits(max_connections=MAX_IN_FLIGHT),
            trust_env=False,  # a proxy would be in the way of a measurement
        )

    async def __aenter__(self) -> "Client":
        self.began = time.perf_counter()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    @property
    def now(self) -> float:
        return time.perf_counter() - self.began

    async def one(self, due: float) -> Sent:
        """Sends the next prompt; never raises for what the server does."""
        prompt = self.prompts[self._count % len(self.prompts)]
        self._count += 1
        if self.in_flight >= MAX_IN_FLIGHT:
            result = Sent(due, self.now, 0, error="not sent: too many requests in flight")
        else:
            self.in_flight += 1
            try:
                result = await self._stream(due, prompt)
            finally:
                self.in_flight -= 1
        self.sent.append(result)
        return result

    async def _stream(self, due: float, prompt: str) -> Sent:
        status, level, times, error = 0, None, list[float](), ""
        try:
            body = self.target.body(prompt)
            async with self._http.stream("POST", "/v1/completions", json=body) as answer:
                status = answer.status_code
                level = answer.headers.get(contract.HEADER_LEVEL)
                if status != 200:
                    error = (await answer.aread()).decode(errors="replace")[:200]
                else:
                    error = "the stream ended without [DONE]"
                    async for line in answer.aiter_lines():
                        if line == "data: [DONE]":
                            error = ""
                        elif line.startswith("data: ") and has_token(line[6:]):
                            times.append(self.now)
        except httpx.HTTPError as problem:
            status, error = 0, f"{type(problem).__name__}: {problem}"[:200]
        return Sent(
            due,
            self.now,
            status,
            ttft=times[0] - due if times else None,
            gaps=tuple(b - a for a, b in itertools.pairwise(times)),
            level=round(float(level)) if level else None,
            error=error,
        )


def has_token(data: str) -> bool:
    """Whether a chunk carries text; the last one carries only the reason of the end."""
    chunk = json.loads(data)
    return any(choice.get("text") for choice in chunk.get("choices", ()))


async def closed_loop(client: Client, clients: int, seconds: float) -> float:
    """``clients`` that each ask again at once, for ``seconds``; requests per second completed."""
    begin = client.now
    end = begin + seconds

    async def ask() -> None:
        while client.now < end:
            if not (await client.one(client.now)).ok:
                await asyncio.sleep(0.2)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(ask())
    # What ended after the end is counted for its share inside: none of the wall time is lost.
    inside = sum(share_inside(s, begin, end) for s in client.sent if s.ok)
    return inside / seconds


def share_inside(sent: Sent, begin: float, end: float) -> float:
    """The part of a request's life that lies between two moments."""
    length = max(sent.ended - sent.due, 1e-9)
    return max(min(sent.ended, end) - max(sent.due, begin), 0.0) / length


async def open_loop(
    client: Client, times: Sequence[float], enough: Callable[[], bool] = lambda: False
) -> None:
    """Sends at ``times`` whatever the server does, until ``enough`` says so; awaits all answers."""
    async with asyncio.TaskGroup() as group:
        for due in _until(times, enough):
            if (wait := due - client.now) > 0:
                await asyncio.sleep(wait)
            group.create_task(client.one(due))


def _until(times: Sequence[float], enough: Callable[[], bool]) -> Iterator[float]:
    for due in times:
        if enough():
            return
        yield due
