"""The outermost layer: request ids, the API key, and the last net under unexpected errors."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenloom.api.errors import ApiError, error_response, to_api_error
from tokenloom.engine.request import NO_SLO, Slo

OPEN_PATHS = frozenset({"/health", "/ping"})
_UNSAFE = re.compile(r"[^A-Za-z0-9._:-]")
MAX_REQUEST_ID_CHARS = 128


def clean_request_id(given: str | None) -> str:
    """A client's X-Request-Id without what could forge a log line or a header; a fresh one if none."""
    cleaned = _UNSAFE.sub("", (given or "")[: 2 * MAX_REQUEST_ID_CHARS])[:MAX_REQUEST_ID_CHARS]
    return cleaned or secrets.token_hex(12)


class Gate:
    """ASGI middleware around every route.

    With a non-empty `api_key`, or with `slo_keys`, every path except `OPEN_PATHS` needs `Authorization: Bearer KEY`
    with one of these keys, unknown paths included: what exists here is nobody's business without a key. The cleaned
    request id is in `scope["state"]["request_id"]` and in the response header X-Request-Id, the SLO of the request's
    key in `scope["state"]["slo"]`.
    """

    def __init__(self, app: ASGIApp, api_key: str = "", slo_keys: Mapping[str, Slo] | None = None) -> None:
        self.app = app
        keys = ({api_key: NO_SLO} if api_key else {}) | dict(slo_keys or {})
        self._keys = [(key.encode(), slo) for key, slo in keys.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        request_id = clean_request_id(headers.get("x-request-id"))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["slo"] = slo = self._slo_of(headers)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        if self._keys and slo is None and scope["path"] not in OPEN_PATHS:
            await error_response(_unauthorised())(scope, receive, send_with_id)
            return
        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            # It left in the middle of its own body: nobody is there to answer.
            return
        except Exception as error:
            if started:
                raise
            await error_response(to_api_error(error))(scope, receive, send_with_id)

    def _slo_of(self, headers: Headers) -> Slo | None:
        """The SLO of the key that a request has; None without a right one."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # latin-1 gives back the very bytes of the header; comparing them takes equal time for any wrong key.
        given = key.strip().encode("latin-1")
        found = [slo for known, slo in self._keys if hmac.compare_digest(given, known)]
        return found[0] if found and scheme.lower() == "bearer" else None


def _unauthorised() -> ApiError:
    return ApiError(
        401,
        "This server needs an API key: send `Authorization: Bearer KEY` with the key it was started with.",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
