"""Sends a workload on time: open loop between sessions, closed loop within one."""

from __future__ import annotations

import asyncio
import select
import selectors
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from tokenloom.bench.load.records import Record
from tokenloom.bench.load.workload import Session, Turn

T = TypeVar("T")

PREPARED_BYTES: Final = 64 << 20
PREPARED_REQUESTS: Final = 2000


class Sender(Protocol):
    """What writes a request and reads its answer into the record."""

    async def send(self, body: bytes, record: Record) -> None: ...


class _PreciseSelector(selectors.EpollSelector):
    """Waits to the microsecond. epoll counts whole milliseconds, and a request a millisecond late would count
    as a server a millisecond slower."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            # The epoll object itself can be waited for; it is among the first files, as select asks.
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a loop with precise timers."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_PreciseSelector())) as runner:
        return runner.run(work)


@dataclass(slots=True, kw_only=True)
class Run:
    """What a run left: the records in the order of sending, its length in seconds, the share of one core that
    the generator used, and whether it was interrupted."""

    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    cpu_share: float = 0.0
    interrupted: bool = False


class Clock:
    """Seconds since `start` was called last."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def start(self) -> None:
        self._zero = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._zero


class Loader:
    """Runs sessions against a sender.

    `encode(turn, number)` makes the body of the request with that number; numbers count from `first_number`.
    `max_concurrency` (0 = none) bounds the requests in flight; `duration` (seconds, 0 = none) is when the last
    one may be due. `on_done` hears each record that is complete.
    """

    def __init__(
        self,
        sender: Sender,
        encode: Callable[[Turn, int], bytes],
        clock: Clock,
        *,
        max_concurrency: int = 0,
        duration: float = 0.0,
        first_number: int = 0,
        on_done: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._sender = sender
        self._encode = encode
        self._clock = clock
        self._places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        self._duration = duration
        self._next_number = first_number
        self._on_done = on_done
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._run = Run()

    async def run(self, sessions: Sequence[Session]) -> Run:
        """Send everything and wait for the answers. Cancelled, it returns what there is."""
        waiting = deque(sorted((s for s in sessions if s.turns), key=lambda session: session.start))
        ready: deque[tuple[Session, bytes, int]] = deque()
        self._prepare(waiting, ready, PREPARED_REQUESTS)
        self._clock.start()
        cpu = time.process_time()
        try:
            await self._dispatch(waiting, ready)
            while self._tasks:
                await asyncio.wait(self._tasks)
        except asyncio.CancelledError:
            self._run.interrupted = True
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._failure is not None:
            raise self._failure
        run = self._run
        run.seconds = max((record.ended for record in run.records), default=0.0)
        run.cpu_share = (time.process_time() - cpu) / max(self._clock(), 1e-9)
        run.records.sort(key=lambda record: record.number)
        return run

    def _prepare(self, waiting: deque[Session], ready: deque[tuple[Session, bytes, int]], most: int) -> None:
        """Make up to `most` bodies ahead, within the bounds of what may lie ready."""
        size = sum(len(body) for _, body, _ in ready)
        while waiting and most and size < PREPARED_BYTES and len(ready) < PREPARED_REQUESTS:
            session = waiting.popleft()
            body, number = self._body(session.turns[0])
            ready.append((session, body, number))
            size += len(body)
            most -= 1

    def _body(self, turn: Turn) -> tuple[bytes, int]:
        number = self._next_number
        self._next_number += 1
        return self._encode(turn, number), number

    async def _dispatch(self, waiting: deque[Session], ready: deque[tuple[Session, bytes, int]]) -> None:
        while ready or waiting:
            if not ready:
                self._prepare(waiting, ready, 1)
            session, body, number = ready.popleft()
            if self._duration and session.start > self._duration:
                return
            while (left := session.start - self._clock()) > 0:
                if waiting and left > 0.02 and len(ready) < PREPARED_REQUESTS // 2:
                    # There is time to make the next body, then to look at what has arrived.
                    self._prepare(waiting, ready, 1)
                    await asyncio.sleep(0)
                else:
                    await asyncio.sleep(min(left, 1.0))
            self._start(self._session(session, session.start, body, number))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error

    async def _later(self, session: Session, start: float) -> None:
        """A session that another one started."""
        body, number = self._body(session.turns[0])
        await self._session(session, start, body, number)

    async def _session(self, session: Session, start: float, body: bytes, number: int) -> None:
        arrival = start
        for index, turn in enumerate(session.turns):
            if index:
                body, number = self._body(turn)
            if self._duration and arrival > self._duration:
                return
            if (left := arrival - self._clock()) > 0:
                await asyncio.sleep(left)
            ended = await self._request(turn, arrival, body, number)
            for later in turn.then:
                if later.turns:
                    self._start(self._later(later, ended + later.start))
            if index + 1 < len(session.turns):
                arrival = ended + session.turns[index + 1].delay

    async def _request(self, turn: Turn, arrival: float, body: bytes, number: int) -> float:
        """Send one request; returns when its answer ended."""
        record = Record(
            number=number,
            wanted_input=turn.input_tokens,
            wanted_output=turn.output_tokens,
            arrival=arrival,
            due=arrival,
        )
        waits = self._places is not None and self._places.locked()
        async with self._places or nullcontext():
            if waits:
                record.due = self._clock()
            self._run.records.append(record)
            await self._sender.send(body, record)
        self._on_done(record)
        return record.ended
