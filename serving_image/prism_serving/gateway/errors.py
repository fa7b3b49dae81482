"""Errors as the OpenAI API words them.

Knows: status, type and code of each kind of refusal. Must not know: when they are raised.

One decision worth arguing about: both ports answer in this one shape, whoever refuses: we, the
router (404, 405) or a defect. A client of either needs one way to read an error.
"""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_log = logging.getLogger(__name__)


class ApiError(Exception):
    """A refusal with an HTTP status; `retry_after_s` becomes the Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body = error_body(message, kind, param, code)

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The HTTP answer."""
        retry = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return JSONResponse(self.body, self.status, headers={**(headers or {}), **retry})


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON object, also sent as an event when a stream fails midway."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(name: str, known: str) -> ApiError:
    """404 naming what is served."""
    return ApiError(
        404,
        f"The model {name!r} does not exist; this server serves {known!r} "
        f"(or {known + '@LEVEL'!r} with a level from 10 to 100)",
        param="model",
        code="model_not_found",
    )


def too_large(limit_bytes: int) -> ApiError:
    """413."""
    return ApiError(413, f"The request body is larger than {limit_bytes} bytes", code="too_large")


def overloaded(waiting: int, retry_after_s: int) -> ApiError:
    """429: the bounded queue is full."""
    return ApiError(
        429,
        f"{waiting} requests are waiting, which is all this server queues; retry later",
        kind="rate_limit_error",
        code="queue_full",
        retry_after_s=retry_after_s,
    )


def unavailable(why: str, code: str, retry_after_s: int = 2) -> ApiError:
    """503: no engine, or the pod is leaving."""
    return ApiError(503, why, kind="server_error", code=code, retry_after_s=retry_after_s)


def failed(why: str) -> ApiError:
    """500: the engine could not compute the request."""
    return ApiError(500, why, kind="server_error", code="engine_error")


def answer_errors(app: FastAPI) -> None:
    """Make `app` answer everything that goes wrong in it with an error of this module."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown_route(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(text, "invalid_request_error")
        return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return bad_request(str(error)).response()

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        _log.error("request failed", exc_info=error)
        return failed("internal error; the server's log has the reason").response()
