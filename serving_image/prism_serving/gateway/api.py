"""The HTTP routes of port 8000.

Knows: HTTP, SSE, disconnects. Must not know: tokens, levels, the socket.

A response starts with the first token (or the error): only then is the level of admission known
(header x-prism-level), and a failure before it can still be an honest status code.

One decision worth arguing about: bodies are read and parsed here, not by FastAPI's models. Its 422
is not OpenAI's shape, and a limit on size must act while the body is read.
"""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from prism import contract
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from prism_serving import logs
from prism_serving.gateway.admission import Admission, split_alias
from prism_serving.gateway.errors import ApiError, answer_errors, too_large
from prism_serving.gateway.generation import Generation, Piece
from prism_serving.gateway.render import Renderer
from prism_serving.gateway.schema import ChatRequest, CompletionRequest, parse

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


@dataclass(slots=True)
class Api:
    """Handlers over one Admission."""

    admission: Admission
    max_body_bytes: int
    created: int

    async def models(self) -> JSONResponse:
        """GET /v1/models: the model and its aliases by level."""
        state = self.admission.client.state
        levels = state.levels if state and state.levels else list(contract.PREFILL_LEVELS)
        name = self.admission.model_name
        names = [name, *(f"{name}@{level}" for level in sorted(levels, reverse=True))]
        data = [
            {"id": n, "object": "model", "created": self.created, "owned_by": "prism"}
            for n in names
        ]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, name: str) -> JSONResponse:
        """GET /v1/models/{name}."""
        split_alias(name, self.admission.model_name)
        return JSONResponse(
            {"id": name, "object": "model", "created": self.created, "owned_by": "prism"}
        )

    async def complete(self, request: Request, chat: bool) -> Response:
        """POST /v1/completions and /v1/chat/completions."""
        received_s = time.monotonic()
        body = await self._body(request)
        parsed = parse(ChatRequest, body) if chat else parse(CompletionRequest, body)
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        ask = self.admission.ask(parsed, request_id, received_s)
        meter = self.admission.admit(ask)
        generation = Generation(ask, self.admission.client, meter, self.admission.text)
        renderer = Renderer(
            request_id,
            parsed.model,
            int(time.time()),
            chat,
            self.admission.text,
            bool(parsed.stream_options and parsed.stream_options.include_usage),
        )
        run = _Run(self.admission, generation, renderer)
        return await run.respond(request, parsed.stream)

    async def _body(self, request: Request) -> bytes:
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_body_bytes:
            raise too_large(self.max_body_bytes)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_body_bytes:
                raise too_large(self.max_body_bytes)
        return bytes(body)


@dataclass(slots=True)
class _Run:
    """One admitted request until its response is out."""

    admission: Admission
    generation: Generation
    renderer: Renderer
    _is_waiting: bool = False
    _is_open: bool = False

    async def respond(self, request: Request, stream: bool) -> Response:
        self._open()
        handed_over = False
        try:
            self.generation.start()
            pieces = self.generation.pieces()
            gone = asyncio.create_task(_disconnected(request.receive))
            try:
                first = await _unless(gone, anext(pieces))
                self._first_token()
                if stream:
                    handed_over = True
                    return _EventStream(self, first, pieces, gone)
                rest = await _unless(gone, _collect(pieces))
            finally:
                if not handed_over:
                    gone.cancel()
            return self._whole([first, *rest])
        except ClientGone:
            return Response(status_code=499)  # nobody reads it; the access log does
        finally:
            if not handed_over:
                self.close()

    def headers(self) -> dict[str, str]:
        """Headers known once the first token is."""
        level = self.generation.prefill_level
        return {
            contract.HEADER_REQUEST_ID: self.renderer.request,
            contract.HEADER_LEVEL: str(level),
        }

    def _whole(self, pieces: list[Piece]) -> JSONResponse:
        ask = self.generation.ask
        body = self.renderer.whole(pieces, len(ask.prompts) * ask.choices, self.generation.usage)
        return JSONResponse(body, headers=self.headers())

    async def events(self, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """The SSE body. An error midway becomes an event; then the stream ends without [DONE]."""
        ask = self.generation.ask
        for chunk in self.renderer.opening(len(ask.prompts) * ask.choices):
            yield _event(chunk)
        try:
            yield _event(self.renderer.chunk(first))
            async for piece in pieces:
                if piece.text or piece.finish or piece.logprobs:
                    yield _event(self.renderer.chunk(piece))
        except ApiError as error:
            yield _event(error.body)
            return
        if self.renderer.include_usage:
            yield _event(self.renderer.usage_chunk(self.generation.usage))
        yield b"data: [DONE]\n\n"

    def _open(self) -> None:
        self.admission.in_flight += 1
        self.admission.before_first_token += 1
        self._is_waiting = self._is_open = True

    def _first_token(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self.admission.before_first_token -= 1

    def close(self) -> None:
        """Whatever happened, give everything back; logs the request's one line."""
        if not self._is_open:
            return
        self._is_open = False
        self._first_token()
        self.generation.close()
        self.admission.in_flight -= 1
        _log_request(self.generation)


def _log_request(generation: Generation) -> None:
    usage, meter = generation.usage, generation.meter
    now_s = time.monotonic()
    ttft_s = None if meter.first_s is None else meter.first_s - meter.received_s
    _log.info(
        logs.fields(
            "request",
            id=generation.ask.request,
            prompt=usage.prompt_tokens,
            tokens=usage.completion_tokens,
            level=generation.prefill_level,
            mean_level=usage.mean_level,
            ttft_ms=None if ttft_s is None else round(ttft_s * 1000, 1),
            total_ms=round((now_s - meter.received_s) * 1000, 1),
        )
    )


class _EventStream(Response):
    """SSE that stops computing when the client goes away."""

    def __init__(
        self, run: _Run, first: Piece, pieces: AsyncIterator[Piece], gone: "asyncio.Task[None]"
    ) -> None:
        super().__init__(
            headers={**run.headers(), "cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._run, self._first, self._pieces, self._gone = run, first, pieces, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless(self._gone, self._stream(send))
        except (ClientGone, OSError):
            return  # close() below frees the engine
        finally:
            self._gone.cancel()
            self._run.close()

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._run.events(self._first, self._pieces):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _unless(gone: "asyncio.Task[None]", work: Awaitable[_T]) -> _T:
    """The result of `work`, or ClientGone as soon as the client disconnects."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _collect(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def build_app(api: Api) -> FastAPI:
    """The application of the API port."""
    app = FastAPI(title="Prism", docs_url=None, redoc_url=None, openapi_url=None)
    client, admission = api.admission.client, api.admission
    answer_errors(app)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await api.complete(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await api.complete(request, chat=True)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return await api.models()

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        return await api.model(name)

    @app.get(contract.PATH_METRICS)
    async def metrics() -> Response:
        admission.metrics.up.set(1 if client.is_ready else 0)
        return Response(
            admission.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get(contract.PATH_HEALTH)
    async def health() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get(contract.PATH_READY)
    async def ready() -> JSONResponse:
        if admission.is_draining:
            return JSONResponse({"ready": False, "reason": "draining"}, 503)
        if client.is_ready_or_in_grace:
            return JSONResponse({"ready": True})
        return JSONResponse({"ready": False, "reason": client.why_not_ready}, 503)

    return app
