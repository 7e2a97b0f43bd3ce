"""The adapters that an engine is told of, by whoever talks to it, and told of again after it died."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from tokenloom.engine.adapter_pool import AdapterUse
from tokenloom.errors import EngineDead, TokenloomError
from tokenloom.runtime.adapter_host import AdapterFile
from tokenloom.serving.messages import (
    AdapterDone,
    AdapterFailed,
    Command,
    LoadAdapter,
    PinAdapter,
    ReportAdapters,
    RetireAdapter,
    rebuild_error,
)

log = logging.getLogger(__name__)

_NO_DRAFTS: Final[Mapping[str, AdapterFile]] = MappingProxyType({})
_NOBODY = 0
"""The ticket of what nobody waits for."""


class EngineAdapters:
    """The `AdapterControl` of an engine: what it knows or should know, by content id.

    `send` carries a command and never blocks; `why_not` says why there is no engine, "" while there is one.
    Everything runs on one asyncio loop. A command is answered by the event with its ticket; when the engine ends,
    `fail_all` answers all.
    """

    def __init__(self, send: Callable[[Command], None], why_not: Callable[[], str]) -> None:
        self._images: dict[str, tuple[str, dict[str, AdapterFile]]] = {}
        self._refusals: dict[str, TokenloomError] = {}
        self._pinned: set[str] = set()
        self._send = send
        self._why_not = why_not
        self._tickets = itertools.count(_NOBODY + 1)
        self._waiting: dict[int, asyncio.Future[list[AdapterUse]]] = {}

    def tell_again(self) -> None:
        """Tell a new engine everything, before its first request."""
        self._refusals.clear()
        # If it has just ended too, that will be noticed.
        with contextlib.suppress(EngineDead):
            for content_id, (image, drafts) in self._images.items():
                self._send(LoadAdapter(_NOBODY, content_id, image, drafts))
            for content_id in sorted(self._pinned):
                self._send(PinAdapter(_NOBODY, content_id, on=True))

    def expect(self, content_id: str, image: Path, drafts: Mapping[str, AdapterFile] = _NO_DRAFTS) -> None:
        """Have each engine to come told of the adapter whose image is at `image`, and of `drafts`, which go with it
        for draft models."""
        self._images[content_id] = str(image), dict(drafts)

    def refusal(self, content_id: str) -> TokenloomError | None:
        """Why the engine did not take the adapter when it was told of it again; None if it did."""
        return self._refusals.get(content_id)

    async def load(
        self, content_id: str, image: Path, drafts: Mapping[str, AdapterFile] = _NO_DRAFTS
    ) -> None:
        """Let requests have the adapter whose image is at `image`, and `drafts` go with it from now on. Raises what
        the engine found wrong with them, or `EngineDead`; they are then unknown as before."""
        await self._ask(lambda ticket: LoadAdapter(ticket, content_id, str(image), dict(drafts)))
        self.expect(content_id, image, drafts)
        self._refusals.pop(content_id, None)

    async def pin(self, content_id: str, on: bool) -> None:
        """Keep the adapter in the pool, or no longer. Raises as `Engine.pin_adapter`, or `EngineDead`."""
        if not on:
            self._pinned.discard(content_id)
        await self._ask(lambda ticket: PinAdapter(ticket, content_id, on))
        if on:
            self._pinned.add(content_id)

    def retire(self, content_id: str) -> None:
        """No request will have the adapter any more."""
        if self._images.pop(content_id, None) is not None:
            self._pinned.discard(content_id)
            if not self._why_not():
                self._send(RetireAdapter(content_id))

    async def uses(self) -> list[AdapterUse]:
        """How the engine uses its adapters now. Raises `EngineDead`."""
        return await self._ask(ReportAdapters)

    async def _ask(self, make: Callable[[int], Command]) -> list[AdapterUse]:
        if reason := self._why_not():
            raise EngineDead(reason)
        ticket = next(self._tickets)
        answer: asyncio.Future[list[AdapterUse]] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = answer
        try:
            self._send(make(ticket))
            return await answer
        finally:
            del self._waiting[ticket]

    # --- answers -----------------------------------------------------------------------------------------

    def take(self, event: AdapterDone | AdapterFailed) -> None:
        """An answer has arrived."""
        answer = self._waiting.get(event.ticket)
        if isinstance(event, AdapterFailed):
            error = rebuild_error(event.error)
            if event.ticket == _NOBODY:
                # A new engine does not take what the last one took: requests with it will say so.
                log.error("adapter %s: %s", event.content_id, error)
                self._refusals[event.content_id] = error
            elif answer is not None and not answer.done():
                answer.set_exception(error)
        elif answer is not None and not answer.done():
            answer.set_result(event.uses)

    def fail_all(self, reason: str) -> None:
        """The engine has ended."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(EngineDead(reason))
