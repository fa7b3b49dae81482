"""One HTTP request's way through the engine: sequences in, pieces of text out.

Knows: how deltas become text, where a stop string ends a choice, what usage says. Must not know:
OpenAI's JSON, HTTP.

One decision worth arguing about: every choice and every prompt of a request is its own sequence in
the engine. Sharing the prompt's computation among `n` choices is the prefix cache's business.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from prism_serving.gateway.client import EngineClient
from prism_serving.gateway.errors import ApiError, failed, unavailable
from prism_serving.gateway.meter import RequestMeter
from prism_serving.gateway.stops import StopFinder
from prism_serving.gateway.text import Decoder, Text
from prism_serving.protocol import Delta, Sampling, Submit, TokenLogprobs

_GOLDEN = 0x9E3779B97F4A7C15  # spreads the seeds of the choices of one request


@dataclass(frozen=True, slots=True)
class Ask:
    """A validated request, in tokens."""

    request: str
    prompts: list[list[int]]
    prompt_chars: list[int]  # per prompt: where its choices start, for their offsets
    choices: int
    max_tokens: list[int]  # per prompt
    sampling: Sampling
    stops: list[str]
    level: int | None
    min_level: int | None
    received_s: float

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens over all prompts; each is counted once, as OpenAI does."""
        return sum(len(p) for p in self.prompts)

    def sequences(self) -> list[Submit]:
        """What the engine is asked: prompts x choices."""
        out = []
        for index in range(len(self.prompts) * self.choices):
            at = index // self.choices
            out.append(
                Submit(
                    request=f"{self.request}/{index}",
                    prompt=self.prompts[at],
                    max_tokens=self.max_tokens[at],
                    sampling=self._sampling(index),
                    received_s=self.received_s,
                    level=self.level,
                    min_level=self.min_level,
                )
            )
        return out

    def _sampling(self, index: int) -> Sampling:
        s = self.sampling
        if s.seed is None or index == 0:
            return s
        seed = (s.seed + index * _GOLDEN) % 2**63
        return Sampling(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            seed=seed,
            ignore_eos=s.ignore_eos,
            min_tokens=s.min_tokens,
            logprobs=s.logprobs,
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice; `finish` with the last one."""

    choice: int
    text: str
    tokens: list[int]
    offsets: list[int]  # of the tokens, in characters from the start of the prompt
    logprobs: list[TokenLogprobs] | None
    finish: str | None


@dataclass(slots=True)
class Usage:
    """Tokens, and the levels they were computed at."""

    prompt_tokens: int
    completion_tokens: int = 0
    level_sum: float = 0.0
    computed: int = 0
    lowest_level: int = 100

    def add(self, level: int, tokens: int) -> None:
        """`tokens` were computed at `level`."""
        self.level_sum += level * tokens
        self.computed += tokens
        self.lowest_level = min(self.lowest_level, level)

    @property
    def mean_level(self) -> float:
        """Mean over prompt and produced tokens."""
        return round(self.level_sum / self.computed, 2) if self.computed else 0.0


@dataclass(slots=True)
class _Choice:
    decoder: Decoder
    stops: StopFinder
    chars: int  # of the prompt and of all that was decoded, a stop string included
    finish: str | None = None

    def decode(self, tokens: list[int]) -> tuple[str, list[int]]:
        """Text that these tokens complete, and where each begins. Tokens that share a character
        begin where it does; a special token has no text and no width."""
        pieces, offsets = [], []
        for token in tokens:
            offsets.append(self.chars)
            pieces.append(self.decoder.feed([token]))
            self.chars += len(pieces[-1])
        return "".join(pieces), offsets


@dataclass(slots=True)
class Generation:
    """Runs one Ask. Iterate `pieces()` once; call `close()` always."""

    ask: Ask
    client: EngineClient
    meter: RequestMeter
    text: Text
    usage: Usage = field(init=False)
    prefill_level: int | None = None  # level at admission, of the first sequence that began
    _open: dict[str, int] = field(default_factory=dict)
    _choices: list[_Choice] = field(default_factory=list)
    _queue: "asyncio.Queue[tuple[float, Delta]]" = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.usage = Usage(self.ask.prompt_tokens)

    def start(self) -> None:
        """Hand the sequences to the engine."""
        for index, sequence in enumerate(self.ask.sequences()):
            decoder = self.text.decoder(sequence.prompt)
            start = self.ask.prompt_chars[index // self.ask.choices]
            self._choices.append(_Choice(decoder, StopFinder(self.ask.stops), start))
            self._open[sequence.request] = index
            self.client.submit(sequence, lambda d: self._queue.put_nowait((time.monotonic(), d)))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it comes, until all choices ended. Raises ApiError when the engine fails."""
        now_s = 0.0
        while self._open:
            now_s, delta = await self._queue.get()
            index = self._open.get(delta.request)
            if index is None:
                continue  # ended here by a stop string
            if delta.error is not None:
                raise self._error(delta)
            self._count(index, delta, now_s)
            yield self._piece(index, delta)
        # One request, one reason: "length" when any choice was cut.
        reasons = {c.finish for c in self._choices}
        self.meter.finished("length" if "length" in reasons else "stop", now_s)

    def close(self) -> None:
        """Free what the engine still holds; nothing to do after a normal end."""
        if self._open:
            self.client.cancel(list(self._open))
            self._open.clear()
            self.meter.cancelled()

    def _error(self, delta: Delta) -> ApiError:
        self.meter.failed()
        self._open.pop(delta.request, None)
        if delta.finish == "lost":
            return unavailable(str(delta.error), "engine_lost")
        return failed(str(delta.error))

    def _count(self, index: int, delta: Delta, now_s: float) -> None:
        is_first = self.prefill_level is None
        if is_first:
            self.prefill_level = delta.prefill_level
        if delta.queued_s or delta.prefill_s:
            self.meter.times(delta.queued_s, delta.prefill_s)
            prompt = self.ask.prompts[index // self.ask.choices]
            self.usage.add(delta.prefill_level, len(prompt))
        for level in delta.levels:
            self.meter.token(index, now_s)
            self.usage.completion_tokens += 1
            self.usage.add(level, 1)

    def _piece(self, index: int, delta: Delta) -> Piece:
        choice = self._choices[index]
        decoded, offsets = choice.decode(delta.tokens)
        text = choice.stops.feed(decoded)
        finish = delta.finish
        if choice.stops.found:
            finish = "stop"
            if delta.finish is None:
                self.client.cancel([delta.request])
        elif finish is not None:
            text += choice.stops.feed(choice.decoder.flush())
            text += choice.stops.flush()
        if finish is not None:
            choice.finish = finish
            del self._open[delta.request]
        return Piece(index, text, delta.tokens, offsets, delta.logprobs, finish)
