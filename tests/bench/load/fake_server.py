"""A server of the OpenAI API that does what it is told: which bytes, when, and how it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Step = bytes | float | str
"""Bytes to send at once, seconds to wait, or "break" to cut the connection."""


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def text(piece: str, finish: str | None = None, **more: Any) -> bytes:
    """A chunk of a completion."""
    return event(choices=[{"index": 0, "text": piece, "finish_reason": finish}], **more)


def words(piece: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """A chunk of a chat."""
    delta = {} if piece is None else {"content": piece}
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}], **more)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def total(prompt: int, completion: int) -> bytes:
    return event(choices=[], usage=usage(prompt, completion))


DONE = b"data: [DONE]\n\n"
Script = Callable[[dict[str, Any]], list[Step]]


@dataclass
class FakeServer:
    """`script` maps a request's body to the steps of its answer; `status` other than 200 answers `error`."""

    script: Script
    status: int = 200
    error: str = '{"error": {"message": "no"}}'
    content_type: str = "text/event-stream"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    peak: int = 0
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.status != 200:
            return web.Response(status=self.status, text=self.error, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": self.content_type})
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            await response.prepare(request)
            for step in self.script(body):
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif step == "break":
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                elif isinstance(step, bytes):
                    await response.write(step)
            await response.write_eof()
        finally:
            self.in_flight -= 1
        return response


async def _tokenize(request: web.Request) -> web.Response:
    """One token for each character and two more: no two letters are one token."""
    body = await request.json()
    return web.json_response({"tokens": [0, *body["prompt"].encode(), 0]})


@asynccontextmanager
async def serving(server: FakeServer) -> AsyncIterator[FakeServer]:
    """The server on a free port of this machine."""
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/completions", server.handle)
    app.router.add_post("/v1/chat/completions", server.handle)
    app.router.add_post("/tokenize", _tokenize)
    app.router.add_get("/v1/models", _models)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        await runner.cleanup()


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "fake"}]})
