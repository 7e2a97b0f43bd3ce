"""The engine side of the wire: commands in, steps, events out. One thread, whatever carries the messages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from tokenloom.engine.engine import Engine
from tokenloom.engine.plan import StepRecord
from tokenloom.engine.request import SequenceDelta, StopChecker, StopCheckerFactory
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import InvalidParameter, TokenloomError
from tokenloom.runtime.adapter_host import AdapterHost, offer_adapter
from tokenloom.serving.messages import (
    MAX_FRAME_BYTES,
    AdapterDone,
    AdapterFailed,
    Add,
    Cancel,
    Command,
    Event,
    LoadAdapter,
    PinAdapter,
    ProtocolError,
    ReportAdapters,
    RequestFailed,
    RetireAdapter,
    Shutdown,
    Stepped,
    error_body,
)
from tokenloom.serving.requests import SeedSource

log = logging.getLogger(__name__)

IDLE_CHECK_SECONDS: Final = 5.0
MAX_HELD_RECORDS: Final = 32


class IsolatedStopCheckers:
    """Makes stop checkers whose exceptions end their own request and nothing else.

    `request_id` is set before a request is added; `failures` collects (request id, exception) until the loop
    takes them.
    """

    def __init__(self, factory: StopCheckerFactory) -> None:
        self._factory = factory
        self.request_id = ""
        self.failures: list[tuple[str, Exception]] = []

    def __call__(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> StopChecker | None:
        checker = self._factory(prompt_token_ids, params)
        return None if checker is None else _IsolatedStopChecker(checker, self.request_id, self.failures)


class _IsolatedStopChecker:
    def __init__(self, checker: StopChecker, request_id: str, failures: list[tuple[str, Exception]]) -> None:
        self._checker: StopChecker | None = checker
        self._request_id = request_id
        self._failures = failures

    def push(self, token_id: int) -> str | None:
        if self._checker is None:
            return None
        try:
            return self._checker.push(token_id)
        except Exception as error:
            self._checker = None
            self._failures.append((self._request_id, error))
            return None


class StepLoop:
    """Drives one engine.

    `receive(block)` returns the commands that have arrived; with `block` it may wait for some time first.
    `emit` carries an event away and never blocks. `adapters` is the engine's source of them, if it has one. An
    error of one request ends only that request; an exception out of a step leaves `run`.
    """

    def __init__(
        self,
        engine: Engine,
        receive: Callable[[bool], Iterable[Command]],
        emit: Callable[[Event], None],
        seeds: SeedSource | None = None,
        adapters: AdapterHost | None = None,
    ) -> None:
        self.engine = engine
        self.adapters = adapters
        self.stopping = False
        self.num_problems = 0
        self._receive = receive
        self._emit = emit
        self._seeds = seeds or SeedSource()
        self._checkers = IsolatedStopCheckers(engine.stop_checkers)
        self._records: list[StepRecord] = []
        self._checked = time.monotonic()
        engine.stop_checkers = self._checkers
        engine.on_step = self._note

    def run(self) -> None:
        """Serve until a `Shutdown` arrives or `stopping` is set."""
        engine = self.engine
        while not self.stopping:
            for command in self._receive(not engine.has_work):
                self._handle(command)
            if engine.has_work and not self.stopping:
                self._step()
            else:
                self._check_books()

    def _handle(self, command: Command) -> None:
        if isinstance(command, Add):
            request = command.request
            self._checkers.request_id = request.request_id
            try:
                request.params = self._seeds.fill(request.params)
                self.engine.add_request(request)
            except Exception as error:
                self._fail(request.request_id, error)
        elif isinstance(command, Cancel):
            self.engine.cancel(command.request_id)
        elif isinstance(command, RetireAdapter):
            self.engine.adapters.retire(command.content_id)
        elif isinstance(command, ReportAdapters):
            self._emit(AdapterDone(command.ticket, self.engine.adapters.uses(self.engine.clock.now())))
        elif isinstance(command, Shutdown):
            self.stopping = True
        else:
            self._handle_adapter(command)

    def _handle_adapter(self, command: LoadAdapter | PinAdapter) -> None:
        try:
            if isinstance(command, LoadAdapter):
                path = Path(command.path)
                offer_adapter(self.engine, self.adapters, command.content_id, path, command.drafts)
            else:
                self.engine.pin_adapter(command.content_id, command.on)
        except Exception as error:
            body = error_body(error)
            if body.kind == "internal":
                log.error("adapter %s failed", command.content_id, exc_info=error)
            self._emit(AdapterFailed(command.ticket, command.content_id, body))
        else:
            self._emit(AdapterDone(command.ticket))

    def _step(self) -> None:
        deltas = self.engine.step()
        if self._checkers.failures:
            failed = {request_id for request_id, _ in self._checkers.failures}
            deltas = [delta for delta in deltas if delta.request_id not in failed]
            for request_id, error in self._checkers.failures:
                self.engine.cancel(request_id)
                self._fail(request_id, error)
            self._checkers.failures.clear()
        if deltas or len(self._records) >= MAX_HELD_RECORDS or not self.engine.has_work:
            records, self._records = self._records, []
            try:
                self._emit(Stepped(deltas, records))
            except ProtocolError:
                self._emit_apart(deltas, records)

    def _emit_apart(self, deltas: Sequence[SequenceDelta], records: list[StepRecord]) -> None:
        """Send what is too long for one frame in several; a request with a delta too long for any fails."""
        self._emit(Stepped([], records))
        failed: set[str] = set()
        for delta in deltas:
            if delta.request_id in failed:
                continue
            try:
                self._emit(Stepped([delta], []))
            except ProtocolError as error:
                failed.add(delta.request_id)
                self.engine.cancel(delta.request_id)
                self._fail(delta.request_id, _too_long(delta, error))

    def _note(self, record: StepRecord) -> None:
        self._records.append(record)

    def _fail(self, request_id: str, error: Exception) -> None:
        body = error_body(error)
        if body.kind == "internal":
            log.error("request %s failed", request_id, exc_info=error)
        self._emit(RequestFailed(request_id, body))

    def _check_books(self) -> None:
        """Nothing runs: verify the scheduler's invariants now and then."""
        now = time.monotonic()
        if now - self._checked < IDLE_CHECK_SECONDS:
            return
        self._checked = now
        try:
            self.engine.check()
        except AssertionError as problem:
            # A wrong book is worth a report, not the requests of everybody.
            self.num_problems += 1
            log.error("self-check problem %d: %s", self.num_problems, problem)


def _too_long(delta: SequenceDelta, error: ProtocolError) -> TokenloomError:
    """Why a delta cannot be sent, in terms of the request."""
    if delta.prompt_logprobs is None:
        return TokenloomError(f"the output cannot be sent: {error}")
    count = len(delta.prompt_logprobs)
    most = max((len(entry.top) for entry in delta.prompt_logprobs), default=0)
    return InvalidParameter(
        "prompt_logprobs",
        most,
        "fewer for a prompt of this length",
        message=f"prompt_logprobs: got {most} for {count} prompt tokens, but the logprobs of a prompt must "
        f"fit {MAX_FRAME_BYTES >> 20} MiB; ask for fewer, or give a shorter prompt",
    )
