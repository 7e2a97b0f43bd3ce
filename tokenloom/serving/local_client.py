"""An engine in a background thread of this process, for small deployments and for tests of the API."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tokenloom.engine.engine import Engine
from tokenloom.runtime.adapter_host import AdapterHost
from tokenloom.serving.client import ModelCard
from tokenloom.serving.messages import Command, Event, Shutdown
from tokenloom.serving.requests import SeedSource
from tokenloom.serving.step_loop import StepLoop
from tokenloom.serving.streams import StreamingClient
from tokenloom.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_IDLE_SECONDS = 1.0


class ThreadEngineClient(StreamingClient):
    """`EngineClient` over an `Engine` that only the background thread touches between `start` and `close`.

    An exception out of a step ends every request in flight with `EngineDead` and leaves the state `failed`.
    `close` releases the engine.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        card: ModelCard,
        *,
        seeds: SeedSource | None = None,
        adapters: AdapterHost | None = None,
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._card = card
        self._engine = engine
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._step_loop = StepLoop(engine, self._receive, self._emit, seeds, adapters)
        self._thread = threading.Thread(target=self._run, name="tokenloom-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the served model."""
        return self._tokenizer

    async def start(self) -> None:
        """Start the thread; the engine is ready at once. Events go to the running asyncio loop."""
        self._loop = asyncio.get_running_loop()
        self.adapters.tell_again()
        self._thread.start()
        self._set_state("ready")

    async def close(self) -> None:
        """Cancel what runs, stop the thread and release the engine."""
        if self._state == "stopped":
            return
        self._set_state("stopped")
        self._send(Shutdown())
        if self._loop is not None:
            await asyncio.to_thread(self._thread.join)
        self._fail_all("the engine was stopped")
        self._engine.close()

    def _send(self, command: Command) -> None:
        self._commands.put(command)

    def _receive(self, block: bool) -> Iterator[Command]:
        try:
            if block:
                yield self._commands.get(timeout=_IDLE_SECONDS)
            while True:
                yield self._commands.get_nowait()
        except queue.Empty:
            return

    def _emit(self, event: Event) -> None:
        self._call(self._dispatch, event)

    def _run(self) -> None:
        try:
            self._step_loop.run()
        except Exception as error:
            log.exception("the engine's step loop failed")
            self._call(self._step_failed, f"{type(error).__name__}: {error}")

    def _step_failed(self, reason: str) -> None:
        if self._state != "stopped":
            self._set_state("failed", reason)
        self._fail_all(f"the engine failed ({reason})")

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        """Run `function(argument)` on the asyncio loop, unless that is closed already."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            self._step_loop.stopping = True
