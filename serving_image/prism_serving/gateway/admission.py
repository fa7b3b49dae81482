"""From a parsed body to a request the engine can run, or the reason why not.

Knows: model names and aliases, context length, the bounded queue, drain. Must not know: HTTP
objects, how text is produced.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from prism import contract

from prism_serving.gateway.client import EngineClient
from prism_serving.gateway.errors import ApiError, bad_request, overloaded, unavailable
from prism_serving.gateway.errors import unknown_model as unknown
from prism_serving.gateway.generation import Ask
from prism_serving.gateway.meter import RequestMeter
from prism_serving.gateway.metrics import Metrics
from prism_serving.gateway.schema import MAX_PROMPTS, ChatRequest, CompletionRequest
from prism_serving.gateway.text import TemplateFailed, Text
from prism_serving.protocol import Sampling

DEFAULT_CHAT_TOKENS: Final = 4096  # max_tokens of a chat that names none, context permitting
_ALIAS: Final = re.compile(r"(?P<name>.+)@(?P<level>[0-9]{1,3})")


def split_alias(model: str, served: str) -> int | None:
    """Level of `name@LEVEL`, None for the plain name. Raises ApiError (404) for other models."""
    if model == served:
        return None
    match = _ALIAS.fullmatch(model)
    if match and match["name"] == served:
        level = int(match["level"])
        if contract.MIN_LEVEL <= level <= contract.MAX_LEVEL:
            return level
    raise unknown(model, served)


@dataclass(slots=True)
class Admission:
    """Decides who gets in. `in_flight` and `before_first_token` are requests, not sequences."""

    model_name: str
    text: Text
    client: EngineClient
    metrics: Metrics
    max_waiting: int
    is_draining: bool = False
    in_flight: int = 0
    before_first_token: int = 0

    def ask(
        self, request: CompletionRequest | ChatRequest, request_id: str, received_s: float
    ) -> Ask:
        """Validate against model and context. Raises ApiError (400, 404)."""
        alias = split_alias(request.model, self.model_name)
        options = request.prism
        level = options.level if options else None
        if alias is not None and level not in (None, alias):
            raise bad_request(
                f"prism.level is {level}, but the model's name asks for {alias}", "prism.level"
            )
        level = level if alias is None else alias
        lowest = self.client.slo.lowest_level
        if level is not None and level < lowest:
            raise bad_request(
                f"Level {level} is not offered: this model's quality gate allows {lowest} to "
                f"{contract.MAX_LEVEL}",
                "model" if alias is not None else "prism.level",
            )
        prompts, stops = self._prompts(request)
        return Ask(
            request=request_id,
            prompts=prompts,
            prompt_chars=self._prompt_chars(request, prompts),
            choices=request.n,
            max_tokens=[self._max_tokens(request, len(p)) for p in prompts],
            sampling=_sampling(request),
            stops=stops,
            level=level,
            min_level=options.min_level if options else None,
            received_s=received_s,
        )

    def admit(self, ask: Ask) -> RequestMeter:
        """Count the request and let it in, or raise ApiError (429, 503)."""
        self.metrics.received.inc()
        self.metrics.received_prompt.inc(ask.prompt_tokens)
        meter = RequestMeter(
            self.metrics, lambda: self.client.slo, ask.received_s, ask.prompt_tokens
        )
        refusal = self._refusal()
        if refusal is not None:
            reason, error = refusal
            meter.shed(reason)
            raise error
        return meter

    def _refusal(self) -> tuple[str, ApiError] | None:
        state = self.client.state
        if self.is_draining or (state is not None and state.phase == "draining"):
            return "draining", unavailable("this server is shutting down", "draining", 1)
        if not self.client.is_ready:
            why = self.client.why_not_ready
            return "engine_away", unavailable(why, "engine_unavailable", 2)
        if self.before_first_token >= self.max_waiting:
            return "queue_full", overloaded(self.before_first_token, self._retry_after_s())
        return None

    def _retry_after_s(self) -> int:
        """When half of the queue should be gone, by the engine's own cost model."""
        stats = self.client.stats
        if stats is None or not stats.profile:
            return 2
        per_token = max(level.prefill_seconds_per_token for level in stats.profile)
        tokens = 512 * self.before_first_token / 2
        return min(max(math.ceil(per_token * tokens), 1), 30)

    def _prompts(
        self, request: CompletionRequest | ChatRequest
    ) -> tuple[list[list[int]], list[str]]:
        if isinstance(request, ChatRequest):
            messages = [m.as_template_input() for m in request.messages]
            try:
                ids = self.text.encode_chat(messages)
            except TemplateFailed as error:
                raise bad_request(str(error), "messages") from error
            return [self._checked(ids, "messages")], [*request.stops, *self.text.chat_stops]
        prompts = [self._checked(ids, "prompt") for ids in self._completion(request.prompt)]
        if not 1 <= len(prompts) * request.n <= MAX_PROMPTS:
            raise bad_request(f"prompts x n must be between 1 and {MAX_PROMPTS}", "prompt")
        return prompts, request.stops

    def _completion(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self.text.encode(prompt)]
        if prompt and isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [self.text.encode(p) if isinstance(p, str) else _ids(p) for p in prompt]

    def _prompt_chars(
        self, request: CompletionRequest | ChatRequest, prompts: list[list[int]]
    ) -> list[int]:
        """Where each prompt's completion starts, as OpenAI counts: after the prompt. 0 where no
        offsets are asked for: decoding a long prompt is not free."""
        if isinstance(request, ChatRequest) or request.logprobs is None:
            return [0] * len(prompts)
        given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        texts = [p for p in given if isinstance(p, str)] or [self.text.spelled(p) for p in prompts]
        return [len(text) for text in texts]

    def _checked(self, ids: list[int], field: str) -> list[int]:
        vocab = self.text.tokenizer.get_vocab_size()
        if not ids:
            raise bad_request("The prompt has no tokens", field)
        if any(not 0 <= token < vocab for token in ids):
            raise bad_request(f"Token ids must be between 0 and {vocab - 1}", field)
        return ids

    def _max_tokens(self, request: CompletionRequest | ChatRequest, prompt: int) -> int:
        context = self._context()
        asked: int | None = request.max_tokens
        if isinstance(request, ChatRequest):
            asked = request.max_completion_tokens or request.max_tokens
        left = context - prompt
        if asked is None and left > 0:
            return min(left, DEFAULT_CHAT_TOKENS)
        wanted = asked or 1
        if wanted > left:
            raise bad_request(
                f"This model's maximum context length is {context} tokens; the request has "
                f"{prompt} prompt tokens and asks for {wanted} more",
                "messages" if isinstance(request, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        return wanted

    def _context(self) -> int:
        state = self.client.state
        return state.max_context if state and state.max_context else 2**31


def _ids(prompt: object) -> list[int]:
    assert isinstance(prompt, Sequence)
    return [int(token) for token in prompt]


def _sampling(request: CompletionRequest | ChatRequest) -> Sampling:
    logprobs: int | None
    if isinstance(request, ChatRequest):
        logprobs = request.top_logprobs if request.logprobs else None
    else:
        logprobs = request.logprobs
    return Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(request.top_k, 0),
        seed=request.seed,
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens,
        logprobs=logprobs,
    )
