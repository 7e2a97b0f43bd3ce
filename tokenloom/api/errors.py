"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}` with a status."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tokenloom.errors import (
    EngineDead,
    InvalidParameter,
    ModelNotFound,
    QueueFull,
    TokenloomError,
    UnsupportedFeature,
)

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 2


class ErrorBody(msgspec.Struct, kw_only=True):
    """What went wrong. `param` is the field at fault, `code` a stable word for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    """Every answer that is not a success."""

    error: ErrorBody


class ApiError(Exception):
    """An error with its HTTP status, ready to be sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message=message, type=type, param=param, code=code)
        self.headers = dict(headers or {})


def unsupported(param: str, detail: str) -> ApiError:
    """The refusal of a feature that this server does not have, by the name of its field."""
    message = f"{param} is not supported by this server: {detail}"
    return ApiError(400, message, param=param, code="unsupported_feature")


def missing(param: str) -> ApiError:
    """400: a field that has no default is not there."""
    return ApiError(400, f"{param} is required.", param=param, code="missing_required_parameter")


def unavailable(message: str) -> ApiError:
    """503: the engine is not there now; the client may try again."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, message, type="service_unavailable", code="engine_unavailable", headers=headers)


def to_api_error(error: Exception) -> ApiError:
    """The HTTP form of any exception; what is not meant for users becomes a bare 500, and is logged."""
    match error:
        case ApiError():
            return error
        case InvalidParameter():
            return ApiError(400, str(error), param=error.param, code=error.code or "invalid_value")
        case UnsupportedFeature():
            return ApiError(400, str(error), param=error.feature, code="unsupported_feature")
        case ModelNotFound():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case QueueFull():
            headers = {"Retry-After": str(max(1, round(error.retry_after)))}
            return ApiError(429, str(error), type="rate_limit_error", code="queue_full", headers=headers)
        case EngineDead():
            return unavailable(str(error) or "the engine ended while the request ran")
        case TokenloomError():
            return ApiError(500, str(error), type="server_error", code="internal_error")
    log.error("a request failed", exc_info=error)
    return ApiError(
        500,
        "The server failed on this request; its log says why.",
        type="server_error",
        code="internal_error",
    )


def error_response(error: ApiError) -> Response:
    """The JSON response of an error."""
    content = msgspec.json.encode(ErrorResponse(error.body))
    return Response(content, error.status, error.headers, media_type="application/json")


async def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for what a route raised."""
    return error_response(to_api_error(error))


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for its own 404 and 405."""
    if not isinstance(error, HTTPException):
        return await handle_error(request, error)
    path = request.url.path[:200]
    match error.status_code:
        case 404:
            message, code = f"No such endpoint: {path}. See /docs for those that exist.", "not_found"
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            message, code = (
                f"{request.method} is not allowed on {path}; allowed: {allowed}.",
                "method_not_allowed",
            )
        case _:
            message, code = str(error.detail), "http_error"
    return error_response(ApiError(error.status_code, message, code=code, headers=error.headers))
