"""The HTTP side: one streamed request of the OpenAI API, and what there is to see of it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec

from tokenloom.bench.load.records import Record
from tokenloom.bench.load.sse import EventReader
from tokenloom.errors import TokenloomError

KEEP_ALIVE_SECONDS: Final = 4
"""Less than the five seconds after which uvicorn closes: a request must not meet a connection being closed."""
DETAIL_CHARS: Final = 300


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """What is read of a chunk; everything else is skipped."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Chunk).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how to ask. `chat` chooses chat completions; `body` and `headers` go with every request."""

    url: str
    chat: bool
    body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    continuous_usage: bool = True
    timeout: float = 600.0

    def encode(self, prompt: list[int] | str, max_tokens: int) -> bytes:
        """The JSON body of a request. What `body` names wins over what is put here."""
        options = {"include_usage": True}
        if self.continuous_usage:
            options["continuous_usage_stats"] = True
        fields: dict[str, Any] = {"stream": True, "stream_options": options}
        if self.chat:
            fields |= {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": max_tokens}
        else:
            fields |= {"prompt": prompt, "max_tokens": max_tokens}
        return msgspec.json.encode(fields | dict(self.body))


class Client:
    """Sends requests over one pool of connections; an async context manager.

    `clock` gives the seconds that go into the records.
    """

    def __init__(self, target: Target, clock: Callable[[], float]) -> None:
        self._target = target
        self._clock = clock
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Client:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, ttl_dns_cache=300),
            timeout=aiohttp.ClientTimeout(total=self._target.timeout),
            headers={"Content-Type": "application/json", **self._target.headers},
            # The server's bytes as they are: a compressed stream would be seen in lumps.
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding",),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.close()

    async def send(self, body: bytes, record: Record) -> None:
        """Write the request now and read its answer to the end; everything goes into `record`.

        Whatever goes wrong with the request is an error in the record, not an exception.
        """
        record.sent = self._clock()
        try:
            async with self._http.post(self._target.url, data=body) as response:
                if response.status != 200:
                    record.error = f"HTTP {response.status}"
                    said = await response.content.read(4 * DETAIL_CHARS)
                    record.detail = _printable(said.decode(errors="replace"))
                elif response.content_type != "text/event-stream":
                    record.error = "no event stream"
                    record.detail = f"content type {response.content_type}"
                else:
                    await self._read(response.content, record)
        except asyncio.CancelledError:
            record.error = record.error or "interrupted"
            raise
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, TokenloomError) as error:
            record.error = _name(error, self._target.timeout, started=record.first >= 0)
            record.detail = _printable(str(error))
        finally:
            record.ended = self._clock()

    async def _read(self, content: aiohttp.StreamReader, record: Record) -> None:
        stream = StreamState(record, chat=self._target.chat)
        reader = EventReader()
        async for data in content.iter_any():
            now = self._clock()
            for event in reader.feed(data):
                stream.take(event, now)
        stream.close()


class StreamState:
    """Reads the chunks of one answer into its record."""

    def __init__(self, record: Record, *, chat: bool) -> None:
        self._record = record
        self._chat = chat
        self._chunks = 0
        self._counted = 0
        self._counts_chunks = False
        self._finished = False
        self._latest = 0.0

    def take(self, event: bytes, now: float) -> None:
        """One event's data, that arrived at `now`. Raises `msgspec.DecodeError` for what is no chunk."""
        record = self._record
        if event == b"[DONE]":
            self._finished = True
            return
        chunk = _decode(event)
        if chunk.error is not None and not record.error:
            record.error = "error in the stream"
            record.detail = _printable(msgspec.json.encode(chunk.error).decode(errors="replace"))
        if chunk.choices:
            self._latest = now
        last = any(choice.finish_reason for choice in chunk.choices)
        self._finished = self._finished or last
        has_tokens = any(self._has_text(choice) for choice in chunk.choices)
        if chunk.usage is not None:
            has_tokens = self._count(chunk.usage, bool(chunk.choices), last, has_tokens)
        if has_tokens:
            self._chunks += 1
            if record.first < 0:
                record.first = now
            else:
                record.gaps.append(now - record.last)
            record.last = now

    def _count(self, usage: Usage, has_choices: bool, last: bool, has_text: bool) -> bool:
        """Keep the server's counts; returns whether the chunk brought tokens."""
        record = self._record
        if usage.prompt_tokens is not None:
            record.input_tokens = usage.prompt_tokens
        if usage.completion_tokens is None:
            return has_text
        record.output_tokens = usage.completion_tokens
        if not has_choices or (last and not self._counts_chunks):
            # The sum at the end says nothing about this chunk.
            return has_text
        self._counts_chunks = True
        more = usage.completion_tokens > self._counted
        self._counted = usage.completion_tokens
        return more

    def _has_text(self, choice: Choice) -> bool:
        """Whether a chunk without usage brings tokens. The first chunk of a chat brings only a role; one of a
        completion without a text is a token that has no text (yet), unless it says why the answer ended."""
        if self._chat:
            delta = choice.delta
            return delta is not None and bool(delta.content or delta.reasoning_content or delta.reasoning)
        return bool(choice.text) or choice.finish_reason is None

    def close(self) -> None:
        """The stream has ended: is the answer complete?"""
        record = self._record
        if record.output_tokens < 0 and self._chunks:
            record.output_tokens = self._chunks
        if not self._chunks and record.output_tokens > 0:
            # All tokens came without a text: they were there when the last chunk was.
            self._chunks = 1
            record.first = record.last = self._latest
        if record.error:
            return
        if not self._finished:
            record.error = "stream ended early"
            record.detail = "neither a finish_reason nor [DONE]"
        elif not self._chunks:
            record.error = "no token"
            record.detail = "the stream ended without one"


def _printable(text: str) -> str:
    """The beginning of what a server said, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text[:DETAIL_CHARS])


def _name(error: BaseException, timeout: float, *, started: bool) -> str:
    """What to call an error, so that equal ones count as one."""
    if isinstance(error, TimeoutError):
        return f"no end within {timeout:g} s"
    if isinstance(error, msgspec.DecodeError):
        return "malformed chunk"
    if isinstance(error, aiohttp.ClientConnectorError):
        refused = error.os_error.errno == errno.ECONNREFUSED
        return "connection refused" if refused else "cannot connect"
    if isinstance(error, aiohttp.InvalidURL):
        return "invalid URL"
    if started or isinstance(error, aiohttp.ClientPayloadError):
        return "stream broke off"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | OSError):
        return "server hung up"
    return type(error).__name__
