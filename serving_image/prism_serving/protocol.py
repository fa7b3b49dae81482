"""The words gateway and engine exchange over the unix socket.

Knows: the message types, their encoding (msgpack, tagged arrays) and the version both sides compare
in the handshake. Must not know: sockets, HTTP, torch.

One decision worth arguing about: all deltas of one step travel in one message. A step of 64
sequences costs one encode and one wake-up of the gateway, not 64; the gateway fans out.

Times are `time.monotonic()` seconds: Linux gives every process of a node the same clock, so the
gateway's receipt time can be compared with the engine's now.
"""

from typing import Final

import msgspec

PROTOCOL_VERSION: Final = 1
HEARTBEAT_S: Final = 1.0
LOST_AFTER_S: Final = 10.0  # silence; a closed socket is noticed at once
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024


class ProtocolError(ValueError):
    """A message that this version cannot read, or a peer of another version."""


class _Message(msgspec.Struct, tag=True, array_like=True, frozen=True, kw_only=True):
    """Base: tagged and positional on the wire; fields are appended, never reordered."""


class Sampling(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """How one sequence picks its tokens; temperature 0 is greedy, `top_k` 0 keeps all."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None  # None: no logprobs; k: the chosen token and the best k


class Hello(_Message, frozen=True):
    """Gateway to engine, first message. A new `session` cancels all requests of the old one."""

    version: int
    session: str


class Submit(_Message, frozen=True):
    """One sequence to complete. `level` pins it; `min_level` bounds it from below."""

    request: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    received_s: float
    level: int | None = None
    min_level: int | None = None


class Cancel(_Message, frozen=True):
    """Stop these sequences now and free what they hold; no delta follows."""

    requests: list[str]


class SetLevel(_Message, frozen=True):
    """Bounds in which the engine picks levels; the higher `seq` wins."""

    seq: int
    floor: int
    ceiling: int


class SetSlo(_Message, frozen=True):
    """Latency targets in milliseconds; None where there is no target."""

    ttft_ms: int | None = None
    itl_ms: int | None = None


class Ping(_Message, frozen=True):
    """Heartbeat, answered by Pong."""

    sent_s: float


class Welcome(_Message, frozen=True):
    """Engine's answer to Hello."""

    version: int
    engine: str  # a fresh id per engine process, so a restart is recognised
    pid: int


class State(_Message, frozen=True):
    """What the engine is able to do: loading, ready, draining, or failed with the reason."""

    phase: str
    detail: str = ""
    max_context: int = 0
    kv_tokens: int = 0
    max_running: int = 0
    levels: list[int] = []  # levels the artifact was measured at
    reproducible: bool = False


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """Log-probability of the chosen token and of the best ones, under the unscaled distribution."""

    chosen: float
    top: list[tuple[int, float]] = []


class Delta(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """New tokens of one sequence with the level each was computed at."""

    request: str
    tokens: list[int] = []
    levels: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prefill_level: int = 0
    finish: str | None = None  # stop | length | error
    error: str | None = None
    queued_s: float = 0.0  # receipt to first scheduled; sent with the first token
    prefill_s: float = 0.0  # first scheduled to first token


class Deltas(_Message, frozen=True):
    """All that one step produced."""

    items: list[Delta]


class StepRecord(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """One engine step, for the histograms of the gateway."""

    phase: str  # prefill | decode | mixed
    seconds: float
    tokens: int


class LevelProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of one level as the operator reads it (JSON object at /admin/profile)."""

    level: int
    prefill_seconds_per_token: float
    decode_seconds_per_token: float
    useful: bool  # the cost model finds it faster than level 100


class Stats(_Message, frozen=True):
    """Gauges now, and what happened since the last Stats (increments, not totals)."""

    running: int
    waiting: int
    kv_used: int
    kv_total: int
    seq: int
    floor: int
    ceiling: int
    steps: list[StepRecord]
    busy_s: float
    level_tokens: dict[str, int]  # phase -> tokens
    level_weighted: dict[str, float]  # phase -> sum of level ratios
    own: int
    candidates: int
    profile: list[LevelProfile]
    step_overhead_s: float
    prediction_error_ratio: float
    decode_level: int


class Pong(_Message, frozen=True):
    """Answer to Ping; comes from the engine's I/O thread and says nothing about compute."""

    sent_s: float


ToEngine = Hello | Submit | Cancel | SetLevel | SetSlo | Ping
ToGateway = Welcome | State | Deltas | Stats | Pong

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_to_gateway = msgspec.msgpack.Decoder(ToGateway)


def encode(message: ToEngine | ToGateway) -> bytes:
    """Message to msgpack bytes."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Bytes from a gateway. Raises ProtocolError when they are not one of its messages."""
    try:
        message: ToEngine = _to_engine.decode(data)
        return message
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"cannot read a gateway message: {error}") from error


def decode_to_gateway(data: bytes) -> ToGateway:
    """Bytes from an engine. Raises ProtocolError when they are not one of its messages."""
    try:
        message: ToGateway = _to_gateway.decode(data)
        return message
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"cannot read an engine message: {error}") from error


def require_same_version(peer: int, who: str) -> None:
    """Raises ProtocolError naming both versions unless they are equal."""
    if peer != PROTOCOL_VERSION:
        raise ProtocolError(
            f"{who} speaks protocol {peer}, this side {PROTOCOL_VERSION}: "
            "run gateway and engine from the same image"
        )
