"""Request bodies: what is accepted, and what a refusal says.

Knows: the fields we implement and the neutral values of those we do not. Must not know: how a
request is answered.

One decision worth arguing about: a field we do not implement is refused by name, unless it carries
the value that means "off" (many clients always send `frequency_penalty: 0`). Silently ignoring
`tools` or `logit_bias` would answer another question than was asked.
"""

import json
from typing import Annotated, Any, Final, Literal, TypeVar

from prism import contract
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prism_serving.gateway.errors import ApiError, bad_request

MAX_CHOICES: Final = 16
MAX_STOPS: Final = 16
MAX_PROMPTS: Final = 64
MAX_COUNT: Final = 2**31 - 1  # of tokens; what the engine's arithmetic holds
_INT64: Final = 2**63

# Fields of the OpenAI API that we accept only with a value that changes nothing.
NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "repetition_penalty": (1, None),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "echo": (None, False),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Level = Annotated[int, Field(ge=contract.MIN_LEVEL, le=contract.MAX_LEVEL)]


class PrismOptions(_Strict):
    """`level`: exactly this level for the whole request. `min_level`: never below it."""

    level: Level | None = None
    min_level: Level | None = None


class StreamOptions(_Strict):
    """As in the OpenAI API."""

    include_usage: bool = False


class _Common(_Strict):
    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] = 0
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    user: str | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    prism: PrismOptions | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TextPart(_Strict):
    """A part of a message's content; text only."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation. A null field is an absent one: clients send an answer back
    with the nulls it came with (`refusal`, `tool_calls`)."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        return _without_nulls(data) if isinstance(data, dict) else data

    def as_template_input(self) -> dict[str, Any]:
        """What chat templates read: content as one string."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0


R = TypeVar("R", CompletionRequest, ChatRequest)


def parse(model: type[R], body: bytes) -> R:
    """Validate a body. Raises ApiError (400) that names every field at fault."""
    data = parse_json(body)
    if not isinstance(data, dict):
        raise bad_request("The body must be a JSON object")
    _drop_neutral(data, model)
    try:
        request = model.model_validate(_without_nulls(data))
    except ValidationError as error:
        raise _explain(error) from error
    _check_limits(request)
    return request


def parse_json(body: bytes) -> Any:
    """The body as data. Raises ApiError (400), also for text that no UTF-8 can hold: JSON may
    escape half of a surrogate pair."""
    try:
        text = body.decode("utf-8-sig")
        data = json.loads(text)
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError as error:
        raise bad_request("The body is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise bad_request("The body escapes a lone surrogate, which is no text") from error
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}") from error
    return data


def _without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}


def _drop_neutral(data: dict[str, Any], model: type[BaseModel]) -> None:
    for field, neutral in NEUTRAL.items():
        if field not in data or field in model.model_fields:
            continue
        value = data.pop(field)
        if value not in neutral:
            allowed = json.dumps(neutral[0] if neutral[0] is not None else neutral[-1])
            raise bad_request(
                f"{field} is not supported by this server (only {allowed} is accepted)",
                param=field,
                code="unsupported_parameter",
            )


def _explain(error: ValidationError) -> ApiError:
    problems: list[str] = []
    first: str | None = None
    for item in error.errors(include_url=False, include_input=False):
        # NB: pydantic appends the union branch it tried ("prompt.str"); the field is enough.
        where = ".".join(
            str(x) for x in item["loc"] if isinstance(x, int) or str(x).replace("_", "").isalnum()
        )
        where = where.split(".str")[0].split(".list")[0]
        first = first or where
        if item["type"] == "extra_forbidden":
            text = f"unknown field {where!r}"
        elif item["type"] == "missing":
            text = f"missing field {where!r}"
        else:
            text = f"{where}: {item['msg']}"
        if text not in problems:
            problems.append(text)
    return bad_request("; ".join(problems), param=first, code="invalid_value")


def _check_limits(request: CompletionRequest | ChatRequest) -> None:
    stops = request.stops
    if len(stops) > MAX_STOPS or any(not s or len(s) > 256 for s in stops):
        raise bad_request(
            f"stop takes up to {MAX_STOPS} strings of 1 to 256 characters", param="stop"
        )
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream: true", param="stream_options")
    prism = request.prism
    if prism and prism.level and prism.min_level and prism.min_level > prism.level:
        raise bad_request("prism.min_level is above prism.level", param="prism.min_level")
