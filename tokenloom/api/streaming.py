"""Sending a generation, as server-sent events or as one object, while watching for the client to leave."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenloom.api.errors import ErrorResponse, to_api_error
from tokenloom.api.generation import ChoiceDelta, Generation, join_deltas
from tokenloom.api.responses import Usage
from tokenloom.api.schemas import StreamOptions

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would hold the chunks back otherwise.
    (b"x-accel-buffering", b"no"),
]


def new_response_id(kind: str) -> str:
    """A fresh id such as chatcmpl-...; ids never come from clients, because the engine needs them unique."""
    return f"{kind}-{secrets.token_hex(16)}"


class Format(Protocol):
    """How an endpoint writes a generation."""

    def chunks(self, delta: ChoiceDelta, usage: Usage | None) -> list[msgspec.Struct]:
        """The stream's chunks for a delta, perhaps none; `usage` is for every one of them."""

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The last chunk when `include_usage` is asked for: no choices."""

    def whole(self, choices: list[ChoiceDelta], usage: Usage) -> msgspec.Struct:
        """The response without streaming; each choice joined into one delta."""


class ClientGone(Exception):
    """The client closed the connection."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, or cancel it and raise `ClientGone` when the client leaves first.

    The request's body must have been read, so that the only message to come is the disconnect.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work)
    watcher = asyncio.create_task(watch())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class GenerationResponse(Response):
    """A response whose body is generated while it is sent.

    Errors before the first token become an HTTP error with its own status: the headers wait for the first
    delta.
    """

    def __init__(
        self, generation: Generation, form: Format, *, stream: bool, options: StreamOptions | None
    ) -> None:
        self.status_code = 200
        self.background = None
        self._generation = generation
        self._format = form
        self._stream = stream
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone), contextlib.closing(self._generation):
            if self._stream:
                await unless_disconnected(receive, self._send_events(send))
                return
            body = await unless_disconnected(receive, self._collect())
            await Response(body, media_type="application/json")(scope, receive, send)

    async def _collect(self) -> bytes:
        choices: dict[int, list[ChoiceDelta]] = {}
        async with contextlib.aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                choices.setdefault(delta.choice, []).append(delta)
        joined = [join_deltas(choices[index]) for index in sorted(choices)]
        return _encode(self._format.whole(joined, self._generation.usage))

    async def _send_events(self, send: Send) -> None:
        generation = self._generation
        form = self._format
        started = False
        try:
            async with contextlib.aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    chunks = form.chunks(delta, generation.usage if self._continuous_usage else None)
                    if not started:
                        started = True
                        await send(
                            {"type": "http.response.start", "status": 200, "headers": list(_SSE_HEADERS)}
                        )
                    if chunks:
                        body = b"".join([b"data: %b\n\n" % _encode(chunk) for chunk in chunks])
                        await send({"type": "http.response.body", "body": body, "more_body": True})
            end = _DONE
            if self._include_usage:
                end = b"data: %b\n\n" % _encode(form.usage_chunk(generation.usage)) + _DONE
        except Exception as error:
            if not started:
                raise
            # The status is out; an error event is what clients of this API look for.
            end = b"data: %b\n\n" % _encode(ErrorResponse(to_api_error(error).body))
        await send({"type": "http.response.body", "body": end, "more_body": False})
