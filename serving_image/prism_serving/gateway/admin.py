"""The admin port: level bounds and the cost profile, for the operator alone.

Knows: the bearer token's digest, the seq rule. Must not know: how bounds reach the engine.

One decision worth arguing about: the pod holds only the sha256 of its token. Who reads the pod's
spec can check a token, not make one.
"""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from prism import contract
from starlette.responses import JSONResponse

from prism_serving.control import ControlError, parse_bounds
from prism_serving.gateway.client import EngineClient
from prism_serving.gateway.errors import ApiError, answer_errors, bad_request, too_large
from prism_serving.gateway.schema import parse_json

_MAX_BODY_BYTES = 4096


def is_allowed(header: str | None, token_sha256: str) -> bool:
    """Whether an Authorization header carries the token with this digest; compares in constant
    time. An empty digest allows nobody."""
    kind, _, token = (header or "").partition(" ")
    given = hashlib.sha256(token.strip().encode()).hexdigest()
    matches = hmac.compare_digest(given, token_sha256.lower())
    return bool(token_sha256) and kind.lower() == "bearer" and matches


@dataclass(frozen=True, slots=True)
class Admin:
    """Handlers of the admin port."""

    client: EngineClient
    token_sha256: str

    def require(self, request: Request) -> None:
        """Raises ApiError (401)."""
        if not is_allowed(request.headers.get("authorization"), self.token_sha256):
            raise ApiError(401, "a valid bearer token is needed", kind="authentication_error")

    async def put_level(self, request: Request) -> JSONResponse:
        """PUT /admin/level: 200 when taken (or the same again), 409 with the current bounds."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _MAX_BODY_BYTES:
                raise too_large(_MAX_BODY_BYTES)
        try:
            bounds = parse_bounds(parse_json(bytes(body)))
        except ControlError as error:
            raise bad_request(str(error)) from error
        if self.client.set_bounds(bounds) or bounds == self.client.bounds:
            return JSONResponse(self.client.bounds.as_json())
        return JSONResponse(self.client.bounds.as_json(), 409)

    def profile(self) -> dict[str, Any]:
        """GET /admin/profile."""
        stats = self.client.stats
        levels = [] if stats is None else stats.profile
        return {
            "levels": [
                {
                    "level": p.level,
                    "prefill_seconds_per_token": p.prefill_seconds_per_token,
                    "decode_seconds_per_token": p.decode_seconds_per_token,
                    "useful": p.useful,
                }
                for p in levels
            ],
            "step_overhead_seconds": 0.0 if stats is None else stats.step_overhead_s,
            "prediction_error_ratio": 0.0 if stats is None else stats.prediction_error_ratio,
            "seq": self.client.bounds.seq,
            "ready": self.client.is_ready and bool(levels),
        }


def build_app(admin: Admin) -> FastAPI:
    """The application of the admin port."""
    app = FastAPI(title="Prism admin", docs_url=None, redoc_url=None, openapi_url=None)
    answer_errors(app)

    @app.get(contract.PATH_LEVEL)
    async def get_level(request: Request) -> JSONResponse:
        admin.require(request)
        return JSONResponse(admin.client.bounds.as_json())

    @app.put(contract.PATH_LEVEL)
    async def put_level(request: Request) -> JSONResponse:
        admin.require(request)
        return await admin.put_level(request)

    @app.get(contract.PATH_PROFILE)
    async def profile(request: Request) -> JSONResponse:
        admin.require(request)
        return JSONResponse(admin.profile())

    return app
