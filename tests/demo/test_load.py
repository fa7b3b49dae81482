"""The generator records what the server did, waits for nothing it need not, and has bounds."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from hack.demo import load
from hack.demo.load import Client, Sent, Target, arrivals, closed_loop, open_loop, require_private

TOKEN = 'data: {"choices": [{"text": "a"}]}\n\n'
END = 'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'


class Body(httpx.AsyncByteStream):
    """Text after ``delay_s``, and a token each time."""

    def __init__(self, tokens: int, delay_s: float, end: str) -> None:
        self.tokens, self.delay_s, self.end = tokens, delay_s, end

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.tokens):
            await asyncio.sleep(self.delay_s)
            yield TOKEN.encode()
        yield self.end.encode()


def client(answer: Callable[[httpx.Request], httpx.Response], **target: object) -> Client:
    made = Client(Target("http://127.0.0.1:1", "m", **target), ["one", "two"])  # type: ignore[arg-type]
    made._http = httpx.AsyncClient(
        transport=httpx.MockTransport(answer), base_url="http://127.0.0.1:1"
    )
    return made


def streaming(tokens: int = 3, delay_s: float = 0.01, end: str = END) -> httpx.Response:
    return httpx.Response(200, headers={"x-prism-level": "75"}, stream=Body(tokens, delay_s, end))


async def test_a_good_answer_is_recorded_whole() -> None:
    async with client(lambda _: streaming()) as c:
        sent = await c.one(c.now)
    assert sent.ok and sent.level == 75 and sent.status == 200
    assert sent.ttft is not None and sent.ttft >= 0.01
    assert len(sent.gaps) == 2, "the closing chunk carries no token"


async def test_latency_counts_from_when_the_request_was_due() -> None:
    async with client(lambda _: streaming()) as c:
        await asyncio.sleep(0.1)
        sent = await c.one(0.0)
    assert sent.ttft is not None and sent.ttft >= 0.11


async def test_a_refused_request_is_no_success() -> None:
    async with client(lambda _: httpx.Response(503, text="busy")) as c:
        sent = await c.one(0.0)
    assert not sent.ok and sent.status == 503 and sent.error == "busy"


async def test_a_stream_cut_short_is_no_success() -> None:
    async with client(lambda _: streaming(end="")) as c:
        sent = await c.one(0.0)
    assert not sent.ok and "[DONE]" in sent.error


async def test_no_server_is_recorded_not_raised() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    async with client(refuse) as c:
        sent = await c.one(0.0)
    assert sent.status == 0 and "ConnectError" in sent.error


async def test_requests_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_IN_FLIGHT", 2)
    async with client(lambda _: streaming(delay_s=0.05)) as c:
        await open_loop(c, [0.0] * 5)
    assert sum(s.ok for s in c.sent) == 2
    assert sum("in flight" in s.error for s in c.sent) == 3


async def test_open_loop_does_not_wait_for_answers() -> None:
    async with client(lambda _: streaming(tokens=1, delay_s=0.3)) as c:
        begin = c.now
        await open_loop(c, [i * 0.01 for i in range(20)])
        assert c.now - begin < 1.0
    assert len(c.sent) == 20 and all(s.ok for s in c.sent)


async def test_open_loop_ends_when_there_is_enough() -> None:
    count = itertools.count()
    async with client(lambda _: streaming(tokens=1)) as c:
        await open_loop(c, [0.0] * 100, enough=lambda: next(count) >= 3)
    assert len(c.sent) == 3


async def test_closed_loop_counts_the_part_of_a_request_inside() -> None:
    async with client(lambda _: streaming(tokens=1, delay_s=0.05)) as c:
        rate = await closed_loop(c, clients=4, seconds=0.52)
    assert 4 / 0.05 * 0.6 < rate <= 4 / 0.05


def test_share_inside() -> None:
    assert load.share_inside(Sent(0.0, 2.0, 200), 1.0, 5.0) == 0.5
    assert load.share_inside(Sent(6.0, 7.0, 200), 1.0, 5.0) == 0.0


def test_level_and_prompt_reach_the_server() -> None:
    assert Target("u", "m", level=25).body("p")["prism"] == {"level": 25}
    assert "prism" not in Target("u", "m").body("p")


def test_arrivals_are_seeded_ordered_and_as_many_as_offered() -> None:
    segments = [(100.0, 2.0), (50.0, 10.0), (10.0, 0.0)]
    times = arrivals(segments, seed=3)
    assert times == arrivals(segments, seed=3) != arrivals(segments, seed=4)
    assert times == sorted(times) and times[-1] < 150
    assert sum(t < 100 for t in times) == pytest.approx(200, rel=0.25)
    assert sum(t >= 100 for t in times) == pytest.approx(500, rel=0.2)


@pytest.mark.parametrize("url", ["http://8.8.8.8", "http://[2001:4860:4860::8888]:80"])
def test_public_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="private"):
        require_private(url)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:80", "http://localhost", "http://10.96.0.7:80", "http://[::1]:8000"]
)
def test_own_addresses_are_allowed(url: str) -> None:
    require_private(url)
