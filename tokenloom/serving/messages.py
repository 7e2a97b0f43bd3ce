"""What the API process and the engine process say to each other: tagged msgpack arrays, strictly decoded.

```
API process  -- Add, Cancel, Shutdown -------------------------------->  engine process
API process  -- LoadAdapter, RetireAdapter, PinAdapter, ReportAdapters ->  engine process
API process  <-- Loading, Ready, Stepped, RequestFailed, Fatal --------  engine process
API process  <-- AdapterDone, AdapterFailed ---------------------------  engine process
```
One message is one frame. All deltas of a step ride in one `Stepped`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tokenloom.engine.adapter_pool import AdapterUse
from tokenloom.engine.plan import StepRecord
from tokenloom.engine.request import Request, SequenceDelta
from tokenloom.errors import (
    ContextLengthExceeded,
    EngineDead,
    InvalidParameter,
    ModelError,
    OutOfMemory,
    QueueFull,
    TokenloomError,
    UnsupportedFeature,
)
from tokenloom.runtime.adapter_host import AdapterFile
from tokenloom.serving.client import ModelCard

MAX_FRAME_BYTES: Final = 64 << 20
"""Longest message that either side accepts."""

MAX_REQUEST_ID_CHARS: Final = 256
_MAX_TEXT_CHARS: Final = 8192


class ErrorBody(msgspec.Struct, array_like=True, frozen=True):
    """A typed error: `kind` is the class, the other fields are its attributes where it has them."""

    kind: str
    message: str
    param: str = ""
    value: str | int | float | bool | None = None
    limit: str = ""
    code: str | None = None
    waiting: int = 0
    retry_after: float = 0.0


class Add(msgspec.Struct, tag="add", array_like=True, frozen=True):
    """Serve this request."""

    request: Request


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    """End a request; unknown ids are ignored, since the end of a request may cross this message."""

    request_id: str


class LoadAdapter(msgspec.Struct, tag="load_adapter", array_like=True, frozen=True):
    """Requests may have the adapter of this content from now on; its image is the file at `path`. `drafts` are the
    adapters of draft models that go with it, by the names of these."""

    ticket: int
    content_id: str
    path: str
    drafts: dict[str, AdapterFile] = {}


class RetireAdapter(msgspec.Struct, tag="retire_adapter", array_like=True, frozen=True):
    """No new request will have the adapter; unknown ones are ignored."""

    content_id: str


class PinAdapter(msgspec.Struct, tag="pin_adapter", array_like=True, frozen=True):
    """Keep the adapter in the pool once it is there, or no longer."""

    ticket: int
    content_id: str
    on: bool


class ReportAdapters(msgspec.Struct, tag="report_adapters", array_like=True, frozen=True):
    """Say how the adapters are used."""

    ticket: int


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True, frozen=True):
    """Stop after the step in flight."""


class Loading(msgspec.Struct, tag="loading", array_like=True, frozen=True):
    """Loading goes on: `stage` in words and how much of it is done (`total` 0: unknown)."""

    stage: str
    done: int = 0
    total: int = 0


class Ready(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """The engine serves from now on."""

    card: ModelCard


class Stepped(msgspec.Struct, tag="stepped", array_like=True, frozen=True):
    """Deltas of one step, and the records of this and earlier steps that were not sent yet."""

    deltas: list[SequenceDelta]
    records: list[StepRecord]


class RequestFailed(msgspec.Struct, tag="request_failed", array_like=True, frozen=True):
    """One request ended with an error; nothing more of it follows."""

    request_id: str
    error: ErrorBody


class AdapterDone(msgspec.Struct, tag="adapter_done", array_like=True, frozen=True):
    """The command with this ticket was carried out; `uses` answers `ReportAdapters`."""

    ticket: int
    uses: list[AdapterUse] = []


class AdapterFailed(msgspec.Struct, tag="adapter_failed", array_like=True, frozen=True):
    """The command with this ticket changed nothing, for this reason."""

    ticket: int
    content_id: str
    error: ErrorBody


class Fatal(msgspec.Struct, tag="fatal", array_like=True, frozen=True):
    """The engine process ends. `retry` False: it would end the same way again (a bad checkpoint)."""

    error: ErrorBody
    retry: bool


Command = Add | Cancel | LoadAdapter | RetireAdapter | PinAdapter | ReportAdapters | Shutdown
Event = Loading | Ready | Stepped | RequestFailed | AdapterDone | AdapterFailed | Fatal

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


class ProtocolError(Exception):
    """A frame is too long or not one of the messages. Never the fault of a client of the API."""


def encode(message: Command | Event) -> bytes:
    """The message as one frame. Raises `ProtocolError` for what has no msgpack form or is too long."""
    try:
        frame = _encoder.encode(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"{type(message).__name__} cannot be encoded: {error}") from error
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"{type(message).__name__} has {len(frame)} bytes; at most {MAX_FRAME_BYTES} may be sent"
        )
    return frame


def decode_command(frame: bytes) -> Command:
    """Raises `ProtocolError` unless the frame is exactly one command."""
    command: Command = _decode(_command_decoder, frame)
    if isinstance(command, Add) and len(command.request.request_id) > MAX_REQUEST_ID_CHARS:
        raise ProtocolError(f"a request id has more than {MAX_REQUEST_ID_CHARS} characters")
    return command


def decode_event(frame: bytes) -> Event:
    """Raises `ProtocolError` unless the frame is exactly one event."""
    event: Event = _decode(_event_decoder, frame)
    return event


def _decode(decoder: msgspec.msgpack.Decoder[Any], frame: bytes) -> Any:
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(frame)} bytes is longer than {MAX_FRAME_BYTES}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, TokenloomError, RecursionError) as error:
        raise ProtocolError(f"not a message: {error}") from error


# --- errors ----------------------------------------------------------------------------------------------

_INVALID: Final[dict[str, type[InvalidParameter]]] = {
    "invalid_parameter": InvalidParameter,
    "context_length_exceeded": ContextLengthExceeded,
}
_PLAIN: Final[dict[str, type[TokenloomError]]] = {"out_of_memory": OutOfMemory, "engine_dead": EngineDead}


def error_body(error: BaseException) -> ErrorBody:
    """The wire form of an error; what is not meant for users becomes an internal error, its class named."""
    message = str(error)[:_MAX_TEXT_CHARS]
    if isinstance(error, InvalidParameter):
        kind = "context_length_exceeded" if isinstance(error, ContextLengthExceeded) else "invalid_parameter"
        value = error.value
        if not isinstance(value, (str, int, float, bool, type(None))) or abs(_as_int(value)) >= 1 << 63:
            value = repr(value)
        if isinstance(value, str):
            value = value[:_MAX_TEXT_CHARS]
        return ErrorBody(kind, message, error.param, value, error.limit, error.code)
    if isinstance(error, QueueFull):
        return ErrorBody("queue_full", message, waiting=error.limit, retry_after=error.retry_after)
    if isinstance(error, UnsupportedFeature):
        return ErrorBody("unsupported", message, param=error.feature, limit=error.detail)
    if isinstance(error, ModelError):
        return ErrorBody("model", message, param=error.found, limit=error.supported)
    for kind, plain in _PLAIN.items():
        if isinstance(error, plain):
            return ErrorBody(kind, message)
    return ErrorBody("internal", f"{type(error).__name__}: {message}")


def _as_int(value: object) -> int:
    return value if isinstance(value, int) else 0


def rebuild_error(body: ErrorBody) -> TokenloomError:
    """The error that `error_body` was given, as an exception of the same class with the same attributes."""
    invalid = _INVALID.get(body.kind)
    if invalid is not None:
        error = invalid.__new__(invalid)
        InvalidParameter.__init__(
            error, body.param, body.value, body.limit, code=body.code, message=body.message
        )
        return error
    if body.kind == "queue_full":
        return QueueFull(body.waiting, body.retry_after)
    if body.kind == "unsupported":
        return UnsupportedFeature(body.param, body.limit)
    if body.kind == "model":
        return ModelError(body.param, body.limit)
    return _PLAIN.get(body.kind, TokenloomError)(body.message)
