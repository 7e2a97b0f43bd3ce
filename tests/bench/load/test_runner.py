"""When requests are sent: open and closed loops, limits, interruption. And the sweep on a model of a server."""

from __future__ import annotations

import asyncio
import signal
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from tokenloom.bench.load.metrics import Report, summarize
from tokenloom.bench.load.records import Record
from tokenloom.bench.load.runner import Clock, Loader, Run, run_async
from tokenloom.bench.load.sweep import find_load
from tokenloom.bench.load.workload import Session, Turn


class Server:
    """Answers after `seconds`; remembers the bodies and how many were in flight."""

    def __init__(self, clock: Clock, seconds: float = 0.05) -> None:
        self.clock = clock
        self.seconds = seconds
        self.in_flight = self.peak = 0
        self.bodies: list[bytes] = []

    async def send(self, body: bytes, record: Record) -> None:
        record.sent = self.clock()
        self.bodies.append(body)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            await asyncio.sleep(self.seconds)
            record.first = record.last = self.clock()
            record.output_tokens = 1
        except asyncio.CancelledError:
            record.error = "interrupted"
            raise
        finally:
            self.in_flight -= 1
            record.ended = self.clock()


def turn(delay: float = 0.0, tokens: int = 1, then: tuple[Session, ...] = ()) -> Turn:
    return Turn(input_tokens=tokens, output_tokens=1, delay=delay, then=then)


def load(sessions: list[Session], seconds: float = 0.05, **more: Any) -> tuple[Run, Server]:
    clock = Clock()
    server = Server(clock, seconds)

    async def work() -> Run:
        return await Loader(server, lambda t, n: b"%d" % t.input_tokens, clock, **more).run(sessions)

    return run_async(work()), server


def test_open_loop_sends_on_time_whatever_the_answers_take() -> None:
    times = [0.0, 0.05, 0.051, 0.2, 0.3]
    run, server = load([Session(t, (turn(),)) for t in reversed(times)], seconds=0.15)
    assert [record.arrival for record in run.records] == times
    assert [record.due for record in run.records] == times
    assert [record.number for record in run.records] == list(range(5))
    # Others use the machine as well; a generator that waits for answers would be late by 0.15 s.
    assert all(0 <= record.lag < 0.04 for record in run.records)
    assert server.peak == 3
    assert run.seconds == pytest.approx(0.45, abs=0.05)


def test_timers_are_precise() -> None:
    run, _ = load([Session(0.003 * i + 0.0005, (turn(),)) for i in range(100)], seconds=0.0)
    lags = sorted(record.lag for record in run.records)
    # epoll alone rounds up to milliseconds: the median would be above half of one.
    assert lags[50] < 0.0008


def test_closed_loop_starts_a_think_time_after_the_end() -> None:
    session = Session(0.1, (turn(), turn(0.08), turn(0.0)))
    run, _ = load([session], seconds=0.05)
    first, second, third = run.records
    assert first.sent == pytest.approx(0.1, abs=0.03)
    assert second.arrival == pytest.approx(first.ended + 0.08)
    assert 0 <= second.lag < 0.03
    assert third.arrival == pytest.approx(second.ended)


def test_a_session_starts_another_beside_itself() -> None:
    inner = Session(0.05, (turn(tokens=7), turn(0.01, tokens=8)))
    run, server = load([Session(0.0, (turn(then=(inner,)), turn(0.2)))])
    assert server.bodies == [b"1", b"7", b"8", b"1"]
    by_number = {record.wanted_input: record for record in run.records if record.wanted_input > 1}
    assert by_number[7].arrival == pytest.approx(run.records[0].ended + 0.05)


def test_a_limit_of_concurrency_makes_requests_due_later() -> None:
    run, server = load([Session(0.0, (turn(),)) for _ in range(9)], seconds=0.05, max_concurrency=3)
    assert server.peak == 3
    assert [record.arrival for record in run.records] == [0.0] * 9
    dues = sorted(record.due for record in run.records)
    assert dues[:3] == [0.0] * 3
    assert dues[3] >= 0.05
    assert dues[6] >= 0.10
    assert max(record.lag for record in run.records) < 0.03


def test_nothing_is_sent_after_the_duration() -> None:
    sessions = [Session(0.02 * i, (turn(), turn(0.05))) for i in range(10)]
    run, _ = load(sessions, seconds=0.01, duration=0.1)
    assert len(run.records) >= 6
    assert max(record.arrival for record in run.records) <= 0.1


def test_an_interruption_leaves_what_there_is() -> None:
    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sessions = [Session(0.0, (turn(),)), Session(0.01, (turn(),)), Session(60.0, (turn(),))]
    clock = Clock()
    server = Server(clock, 0.0)
    slow = Server(clock, 60.0)

    class Mixed:
        async def send(self, body: bytes, record: Record) -> None:
            if record.number == 1:
                asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGINT)
            await (slow if record.number == 1 else server).send(body, record)

    async def work() -> Run:
        return await Loader(Mixed(), lambda t, n: b"", clock).run(sessions)

    try:
        run = run_async(work())
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.interrupted
    assert [record.error for record in run.records] == ["", "interrupted"]
    report = summarize(run)
    assert (report.completed, report.failed) == (1, 1)
    assert "interrupted" in report.warnings[-1]


def test_a_mistake_in_the_generator_is_raised() -> None:
    def broken(turn: Turn, number: int) -> bytes:
        raise RuntimeError("broken")

    clock = Clock()

    async def work() -> Run:
        sessions = [Session(0.0, (turn(then=(Session(0.0, (turn(),)),)),))]
        bodies = iter([b"x"])
        loader = Loader(Server(clock), lambda t, n: next(bodies, None) or broken(t, n), clock)
        return await loader.run(sessions)

    with pytest.raises(RuntimeError, match="broken"):
        run_async(work())


def test_many_more_sessions_than_are_prepared_ahead() -> None:
    run, _ = load([Session(0.0, (turn(),)) for _ in range(5000)], seconds=0.0)
    assert len(run.records) == 5000
    assert run.cpu_share > 0


def queue(rate: float, number: int) -> Report:
    """A server that takes 0.1 s for each request, one after the other, and even arrivals: what a request waits
    grows without bound above 10 requests per second, and is nothing below."""
    records = []
    free = 0.0
    for index in range(200):
        arrival = index / rate
        free = max(free, arrival) + 0.1
        records.append(
            Record(
                number=index,
                wanted_input=1,
                wanted_output=1,
                arrival=arrival,
                due=arrival,
                sent=arrival,
                first=free,
                last=free,
                ended=free,
                gaps=array("d"),
                output_tokens=1,
            )
        )
    return summarize(Run(records=records, seconds=free), objectives={"ttft": 0.15})


async def search(measure: Callable[[float, int], Report], **more: Any) -> Any:
    async def probe(load: float, number: int) -> Report:
        return measure(load, number)

    return await find_load(probe, attainment=0.9, **more)


@pytest.mark.parametrize("start", [0.3, 9.0, 10.0, 700.0])
async def test_a_sweep_finds_the_knee(start: float) -> None:
    found = await search(queue, start=start, tolerance=0.02, max_probes=30)
    assert found.converged
    assert found.failing <= found.best * 1.02
    # With 200 requests a tenth may be late, so that a little more than 10 holds: 20 / (0.05 / (0.1 - 1 / rate)).
    assert found.best == pytest.approx(10.0, rel=0.04)
    assert queue(found.best, 0).attainment >= 0.9 > queue(found.failing, 0).attainment
    assert {probe.load for probe in found.probes} >= {found.best, found.failing}


async def test_a_sweep_is_bounded() -> None:
    found = await search(queue, start=1.0, tolerance=1e-9, max_probes=7)
    assert len(found.probes) == 7
    assert not found.converged
    assert 0 < found.best < found.failing


async def test_a_sweep_that_never_or_always_holds() -> None:
    never = await search(
        lambda load, number: summarize(Run(), objectives={"ttft": 1.0}), start=8.0, max_probes=4
    )
    assert (never.best, never.failing, never.converged) == (0.0, 1.0, False)
    always = await search(lambda load, number: queue(1.0, 0), start=8.0, max_probes=4)
    assert (always.best, always.failing) == (64.0, float("inf"))


async def test_an_interrupted_probe_ends_a_sweep_and_does_not_count() -> None:
    def measure(load: float, number: int) -> Report:
        if number == 2:
            return summarize(Run(interrupted=True), objectives={"ttft": 1.0})
        return queue(load, number)

    found = await search(measure, start=4.0, max_probes=9)
    assert len(found.probes) == 2
