"""The client side of an engine: one queue of deltas per request, whatever carries the messages.

Everything here runs on one asyncio loop. A slow consumer never blocks the engine: its queue holds at most the
deltas of `max_tokens` tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable

from tokenloom.engine.plan import StepRecord
from tokenloom.engine.request import Request, SequenceDelta
from tokenloom.errors import EngineDead, InvalidParameter, QueueFull, TokenloomError
from tokenloom.serving.client import EngineState, ModelCard, StepObserver
from tokenloom.serving.engine_adapters import EngineAdapters
from tokenloom.serving.journal import Journal, JournalEntry
from tokenloom.serving.messages import (
    MAX_REQUEST_ID_CHARS,
    AdapterDone,
    AdapterFailed,
    Add,
    Cancel,
    Command,
    Event,
    ProtocolError,
    RequestFailed,
    Stepped,
    rebuild_error,
)

log = logging.getLogger(__name__)

_Stream = asyncio.Queue[SequenceDelta | TokenloomError]


class StreamingClient(ABC):
    """What every `EngineClient` shares: the journal, the streams, `generate`, the step observers.

    Subclasses carry commands to the engine in `_send`, hand events to `_dispatch`, and call `_fail_all` when
    the engine ends.
    """

    def __init__(self) -> None:
        self.journal = Journal()
        self.adapters = EngineAdapters(self._send, lambda: "" if self._state == "ready" else self._why_not())
        self.num_restarts = 0
        self._state: EngineState = "loading"
        self._card: ModelCard | None = None
        self._failure = ""
        self._streams: dict[str, _Stream] = {}
        self._observers: list[StepObserver] = []
        self._state_changed = asyncio.Event()

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Carry a command to the engine, without blocking. Raises `ProtocolError` if it has no wire form."""

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return self._state

    @property
    def failure(self) -> str:
        """Why the engine failed or restarts; empty while all is well."""
        return self._failure

    @property
    def card(self) -> ModelCard:
        """Raises `EngineDead` before the engine was ready once."""
        if self._card is None:
            raise EngineDead(self._why_not())
        return self._card

    @property
    def num_in_flight(self) -> int:
        """Requests accepted and not yet ended."""
        return len(self._streams)

    def subscribe(self, observer: StepObserver) -> None:
        """Have `observer` called with the record of every step (perhaps in bursts)."""
        self._observers.append(observer)

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the engine serves. Raises `EngineDead` if it failed or stopped, or after `timeout` s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._state not in ("ready", "failed", "stopped"):
                    self._state_changed.clear()
                    await self._state_changed.wait()
        if self._state != "ready":
            raise EngineDead(self._why_not())

    async def generate(self, request: Request) -> AsyncGenerator[SequenceDelta, None]:
        """Serve one request; ends after the delta with `last`. See `EngineClient.generate`."""
        request_id = request.request_id
        stream = self._open(request)
        try:
            while True:
                item = await stream.get()
                if not isinstance(item, tuple):
                    raise item
                yield item
                if item.last:
                    return
        finally:
            self._close(request_id, stream)

    def _open(self, request: Request) -> _Stream:
        # What was sent nothing of may wait for the next engine.
        waits = self._state == "restarting" and request.pooling is not None
        if self._state != "ready" and not waits:
            raise EngineDead(self._why_not())
        request_id = request.request_id
        if request_id in self._streams:
            raise InvalidParameter("request_id", request_id, "unique among the requests in flight")
        if not 0 < len(request_id) <= MAX_REQUEST_ID_CHARS:
            raise InvalidParameter(
                "request_id", request_id, f"a text of 1 to {MAX_REQUEST_ID_CHARS} characters"
            )
        if len(self._streams) >= self.card.max_requests:
            raise QueueFull(self.card.max_requests, 1.0)
        try:
            if not waits:
                self._send(Add(request))
        except EngineDead:
            if request.pooling is None:
                raise
            waits = True
        except ProtocolError as error:
            raise InvalidParameter(
                "prompt", request_id, "plain token ids and texts", message=str(error)
            ) from error
        stream: _Stream = asyncio.Queue()
        self._streams[request_id] = stream
        self.journal.open(request, num_attempts=0 if waits else 1)
        return stream

    def _close(self, request_id: str, stream: _Stream) -> None:
        """Forget a stream whose consumer is done, and cancel the request if the engine still has it."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            if self.journal.drop(request_id) and self._state == "ready":
                self._send(Cancel(request_id))

    def _dispatch(self, event: Event) -> None:
        """Hand one event to whom it concerns. Events of requests that are gone are dropped."""
        if isinstance(event, Stepped):
            for delta in event.deltas:
                stream = self._streams.get(delta.request_id)
                if stream is not None:
                    self.journal.append(delta)
                    stream.put_nowait(delta)
            for observer in tuple(self._observers):
                self._observe(observer, event.records)
        elif isinstance(event, RequestFailed):
            stream = self._streams.get(event.request_id)
            if stream is not None and self.journal.drop(event.request_id):
                stream.put_nowait(rebuild_error(event.error))
        elif isinstance(event, (AdapterDone, AdapterFailed)):
            self.adapters.take(event)

    def _observe(self, observer: StepObserver, records: list[StepRecord]) -> None:
        try:
            for record in records:
                observer(record)
        except Exception:
            self._observers.remove(observer)
            log.exception("a step observer failed and is not called again")

    def _fail_all(self, reason: str, keep: Callable[[JournalEntry], bool] = lambda entry: False) -> None:
        """End every request in flight with `EngineDead`, saying how far each had come, but those that `keep`
        is true of."""
        self.adapters.fail_all(reason)
        for entry in self.journal.drop_all(keep):
            stream = self._streams.get(entry.request.request_id)
            if stream is not None:
                stream.put_nowait(EngineDead(f"{reason}; this request had got {entry.num_tokens} tokens"))

    def _set_state(self, state: EngineState, failure: str = "") -> None:
        self._state = state
        self._failure = failure
        self._state_changed.set()

    def _why_not(self) -> str:
        if self._failure:
            return f"the engine is {self._state}: {self._failure}"
        return f"the engine is {self._state}"
