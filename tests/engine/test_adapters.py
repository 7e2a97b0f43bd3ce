"""Adapters in the frame pool: they come, stay while somebody needs them, and go; nobody waits for ever."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.engine.adapter_source import CheckedExecutor, FakeSource
from tests.engine.helpers import request, run
from tokenloom.clock import VirtualClock
from tokenloom.engine.adapter_pool import AdapterPool
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.frames import FramePool, PageClass
from tokenloom.engine.policies.admission import AdmissionPolicy, Demand, peak_pages, peak_tokens
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.errors import ContextLengthExceeded, InvalidParameter

PER_FRAME = 8
"""Adapter pages to a frame, of 4 KV pages."""


def make_engine(source: FakeSource, *, num_frames: int = 16, **limits: Any) -> Engine:
    clock = VirtualClock()
    executor = CheckedExecutor(clock, None, 1000)
    executor.source, executor.rows = source, {}
    limits = {"max_running": 16, "max_context": 512, "debug": True} | limits
    return Engine(
        executor,
        EngineLimits(
            vocab_size=1000,
            num_pages=4 * num_frames,
            pages_per_frame=4,
            max_waiting=10_000,
            adapter_pages_per_frame=PER_FRAME,
            adapter_page_bytes=1 << 18,
            **limits,
        ),
        budget=ChunkedPrefill(max_batch_tokens=64),
        order=QueueOrder(),
        clock=clock,
        adapters=source,
    )


def make_pool(frames: int, source: FakeSource) -> tuple[AdapterPool, FramePool]:
    pool = FramePool(frames)
    return AdapterPool(PageClass("adapters", pool, PER_FRAME), source, page_bytes=1 << 18), pool


def fetch(pool: AdapterPool, name: str, *, over_waiters: bool = False) -> bool:
    found = pool.reserve(name, lambda: False, over_waiters=over_waiters)
    while found and not pool.is_ready(name):
        pool.copy(name, 3)
    return found


def test_outputs_do_not_depend_on_adapters_that_come_and_go() -> None:
    """The simulated executor draws tokens by request: all requests end with theirs, whatever the pool."""
    names = [f"a{i}" for i in range(20)]
    sizes = {name: 1 + i % 30 for i, name in enumerate(names)}
    found = []
    for num_frames in (64, 9):
        engine = make_engine(FakeSource(sizes), num_frames=num_frames)
        for i in range(60):
            adapter = "" if i % 7 == 0 else names[7 * i % 20]
            engine.add_request(request(f"r{i}", range(4, 10 + i), seed=i, adapter=adapter, n=1 + i % 3))
        found.append(run(engine))
        assert engine.adapters.stats.num_fetched >= 17
        engine.adapters.check_books(iter(()))
    assert found[0] == found[1]


def test_a_small_pool_serves_many_adapters() -> None:
    """Room for 8 adapters at most, 500 of them (S-LoRA, acceptance 2)."""
    source = FakeSource({f"a{i}": 8 for i in range(500)})
    engine = make_engine(source, num_frames=12, max_adapter_bytes=8 * 8 << 18)
    for i in range(500):
        engine.add_request(request(f"r{i}", range(4, 9), seed=i, adapter=f"a{i}", max_tokens=3))
    assert len(run(engine)) == 500
    assert engine.adapters.stats.num_fetched == 500
    assert engine.executor.rows == {f"a{i}": 5 + 2 for i in range(500)}  # type: ignore[attr-defined]


def test_slices_bound_what_a_step_copies() -> None:
    """While somebody runs, a megabyte before each step; nobody runs: more."""
    source = FakeSource({"big": 80, "small": 8})
    engine = make_engine(source, num_frames=32)
    engine.add_request(request("base", range(4, 20), max_tokens=60))
    engine.step()
    engine.add_request(request("adapted", range(4, 20), adapter="big"))
    steps = 0
    while not engine.adapters.is_ready("big"):
        assert engine.step(), "the base request goes on"
        steps += 1
    assert steps == 20
    assert {count for _, count in source.copied} == {4}
    run(engine)
    source.copied.clear()
    engine.add_request(request("alone", range(4, 20), adapter="small"))
    run(engine)
    assert source.copied == [("small", 8)]


def test_an_adapter_in_use_is_never_evicted() -> None:
    source = FakeSource(dict.fromkeys("abcd", 8))
    pool, _ = make_pool(3, source)
    assert fetch(pool, "a")
    assert fetch(pool, "b")
    assert fetch(pool, "c")
    for name in "abc":
        pool.lease(name, 0.0)
    assert not fetch(pool, "d", over_waiters=True)
    pool.release("b")
    assert fetch(pool, "d")
    assert set(pool.resident) == {"a", "c", "d"}
    pool.check_books(iter("ac"))


def test_what_is_dear_to_fetch_stays_longer() -> None:
    """By last use where sizes are equal; of different sizes, large ones cost less per byte."""
    source = FakeSource({"a": 8, "b": 8, "c": 8, "d": 8, "small": 1, "large": 24})
    pool, _ = make_pool(3, source)
    for name in ("a", "b", "c"):
        fetch(pool, name)
    fetch(pool, "d")
    assert set(pool.resident) == {"b", "c", "d"}
    pool.lease("b", 1.0)
    pool.release("b")
    fetch(pool, "a")
    assert set(pool.resident) == {"a", "b", "d"}
    pool, _ = make_pool(4, FakeSource(source.sizes))
    fetch(pool, "small")
    fetch(pool, "large")
    fetch(pool, "a")
    assert set(pool.resident) == {"small", "a"}


def test_pinned_adapters_stay_and_retired_ones_go_with_their_last_request() -> None:
    source = FakeSource(dict.fromkeys("abcd", 8))
    engine = make_engine(source, num_frames=6)
    engine.adapters.pin("a", True)
    for i, name in enumerate("abcdabcd"):
        engine.add_request(request(f"{i}", range(4, 30), adapter=name, max_tokens=20))
    before = sum(len(delta.token_ids) for delta in engine.step())
    engine.adapters.retire("c")
    outputs = run(engine)
    assert len(outputs) == 8
    assert before + sum(map(len, outputs.values())) == 8 * 20
    assert "a" in engine.adapters.resident
    assert source.forgotten == ["c"]
    assert "c" not in engine.adapters.resident
    engine.adapters.retire("a")
    assert source.forgotten == ["c", "a"]
    engine.check()


def test_pins_leave_room_for_everybody() -> None:
    """A sequence of full length (8 frames of 16), and every live request, fit beside what is pinned."""
    source = FakeSource({"a": 4 * PER_FRAME, "b": 5 * PER_FRAME, "d": 7 * PER_FRAME})
    engine = make_engine(source)
    engine.pin_adapter("a", on=True)
    engine.pin_adapter("a", on=True)
    engine.add_request(request("long", range(4, 300), adapter="b", max_tokens=None, seed=1))
    with pytest.raises(InvalidParameter, match="beside all requests"):
        engine.pin_adapter("b", on=True)
    for name in ("b", "d"):
        with pytest.raises(InvalidParameter, match="beside all requests|at most"):
            engine.pin_adapter(name, on=True)
    with pytest.raises(InvalidParameter, match="loaded"):
        engine.pin_adapter("nobody", on=True)
    assert engine.adapters.pinned == {"a"}
    assert engine._context_beside("") == 512
    assert engine._context_beside("d") == 5 * 4 * 16
    with pytest.raises(ContextLengthExceeded, match="320 tokens"):
        engine.add_request(request("longer", range(4, 400), adapter="d"))
    run(engine)
    found = {use.adapter: use for use in engine.adapters.uses(engine.clock.now() + 1)}
    assert found["b"].num_bytes == 5 * PER_FRAME << 18
    assert found["b"].idle_seconds > 1
    assert (found["a"].num_bytes, found["a"].pinned) == (0, True)
    engine.pin_adapter("a", on=False)
    engine.pin_adapter("d", on=True)


def test_pages_of_an_abandoned_adapter_are_cleared() -> None:
    source = FakeSource({"big": 80})
    engine = make_engine(source, num_frames=32)
    engine.add_request(request("base", range(4, 20), max_tokens=60))
    engine.step()
    engine.add_request(request("adapted", range(4, 20), adapter="big"))
    for _ in range(3):
        engine.step()
    assert len(source.copied) == 3
    engine.cancel("adapted")
    assert source.cleared == 80
    run(engine)


def test_who_waits_for_room_is_not_starved_by_those_behind() -> None:
    """A large adapter needs most of the pool; a stream of base requests would always take what comes free."""
    source = FakeSource({"large": 12 * PER_FRAME})
    engine = make_engine(source, num_frames=16)
    serial = itertools.count()

    def base() -> None:
        engine.add_request(request(f"base{next(serial)}", range(4, 70), max_tokens=10, seed=next(serial)))

    for _ in range(16):
        base()
    engine.step()
    engine.add_request(request("large", range(4, 20), adapter="large", max_tokens=2))
    done = False
    for _ in range(400):
        if len(engine.scheduler.live) < 20:
            base()
        done = done or any(delta.request_id == "large" and delta.last for delta in engine.step())
    assert done


def test_who_comes_first_waits_for_what_was_begun() -> None:
    """An adapter is half there when somebody older comes, and there is no room for both: it cannot go before it is
    whole, so it is finished, and then makes room."""
    source = FakeSource({"young": 48, "old": 48})
    engine = make_engine(source, num_frames=10)
    engine.add_request(request("base", range(4, 20), max_tokens=4, arrival=0.5))
    engine.step()
    engine.add_request(request("y", range(4, 20), adapter="young", arrival=3.0))
    engine.step()
    assert 0 < engine.adapters.resident["young"].num_copied < 48
    engine.add_request(request("o", range(4, 20), adapter="old", arrival=2.0))
    engine.add_request(request("last", range(4, 20), arrival=4.0))
    assert {name for name, _ in run(engine, max_steps=200)} == {"base", "y", "o", "last"}
    assert [name for name, _ in itertools.groupby(name for name, _ in source.copied)] == [
        "young",
        "old",
        "young",
    ]


def test_where_adapters_have_all_they_may_have_no_cached_page_goes() -> None:
    source = FakeSource({"a": PER_FRAME, "b": PER_FRAME})
    engine = make_engine(source, max_adapter_bytes=PER_FRAME << 18, prefix_cache=True)
    engine.add_request(request("cached", range(4, 400), max_tokens=1))
    run(engine)
    assert len(engine.scheduler.cache.pages.frames) == 6
    engine.add_request(request("x", range(4, 20), adapter="a", max_tokens=30))
    engine.step()
    engine.step()
    before = engine.scheduler.cache.num_evictions
    engine.add_request(request("y", range(4, 20), adapter="b"))
    for _ in range(5):
        engine.step()
    assert not engine.adapters.is_ready("b")
    assert engine.scheduler.cache.num_evictions == before == 0
    assert len(run(engine)) == 2


def test_cancelling_the_last_who_wants_it_stops_the_fetch() -> None:
    source = FakeSource({"big": 80})
    engine = make_engine(source, num_frames=32)
    engine.add_request(request("base", range(4, 20), max_tokens=60))
    engine.add_request(request("adapted", range(4, 20), adapter="big"))
    engine.step()
    engine.step()
    assert "big" in engine.adapters.resident
    engine.cancel("adapted")
    assert not engine.adapters.resident
    assert engine.adapters.pages.num_used == 0
    engine.check()


def test_what_never_fits_is_refused() -> None:
    engine = make_engine(FakeSource({"huge": 16 * PER_FRAME, "large": 14 * PER_FRAME}), num_frames=16)
    for name in ("huge", "unknown"):
        with pytest.raises(InvalidParameter, match="adapter"):
            engine.add_request(request("r", adapter=name))
    with pytest.raises(ContextLengthExceeded):
        engine.add_request(request("r", range(4, 4 + 128), adapter="large"))
    engine.add_request(request("r", range(4, 4 + 120), adapter="large", max_tokens=None))
    ((_, tokens),) = run(engine).items()
    assert len(tokens) == 8


def test_reset_lets_everything_go() -> None:
    source = FakeSource({"a": 9, "b": 80})
    engine = make_engine(source)
    for name in ("a", "b"):
        engine.add_request(request(name, adapter=name))
    engine.step()
    engine.reset()
    assert engine.scheduler.cache.pages.pool.num_free == 16
    engine.add_request(request("again", adapter="a"))
    assert len(run(engine)) == 1


# --- admission --------------------------------------------------------------------------------------------

demands = st.lists(st.builds(Demand, st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=8)


@given(demands)
def test_the_peak_is_that_of_a_simulation(wanted: list[Demand]) -> None:
    peak = 0
    for step in range(max(d.left for d in wanted) + 1):
        peak = max(peak, sum(d.have + step for d in wanted if d.left >= step))
    assert peak_tokens(wanted) == peak
    pages = max(
        sum(-(-(d.have + step) // 16) for d in wanted if d.left >= step)
        for step in range(max(d.left for d in wanted) + 1)
    )
    assert peak_pages(wanted) >= pages


def test_reserving_never_preempts() -> None:
    sizes = {f"a{i}": 1 + 5 * i for i in range(6)}
    outputs = []
    preempted = []
    for admission in ("optimistic", "reserve"):
        engine = make_engine(FakeSource(sizes), num_frames=10, admission=admission)
        rng = np.random.default_rng(0)
        for i in range(60):
            adapter = f"a{i % 6}" if i % 3 else ""
            prompt = range(4, 4 + int(rng.integers(1, 60)))
            engine.add_request(
                request(f"r{i}", prompt, seed=i, adapter=adapter, max_tokens=int(rng.integers(1, 90)))
            )
        outputs.append(run(engine))
        preempted.append(engine.scheduler.num_preemptions)
    assert outputs[0] == outputs[1]
    assert preempted[0] > 0
    assert preempted[1] == 0


# --- any order of events ----------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Load, unload, replace, load again, pin, evict, request, cancel, step; `check` runs after every step."""

    admission: AdmissionPolicy = "optimistic"

    def __init__(self) -> None:
        super().__init__()
        self.source = FakeSource({})
        self.engine = make_engine(self.source, num_frames=10, max_running=6, admission=self.admission)
        self.names: dict[str, str] = {}
        self.serial = itertools.count()
        self.expected: dict[str, int] = {}
        self.outputs: dict[str, int] = {}

    @rule(name=st.sampled_from("xyz"), pages=st.integers(1, 8 * PER_FRAME))
    def load(self, name: str, pages: int) -> None:
        content = f"{name}{next(self.serial)}"
        self.source.sizes[content] = pages
        old = self.names.get(name)
        self.names[name] = content
        if old is not None:
            self.engine.adapters.retire(old)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        self.engine.adapters.retire(self.names.pop(data.draw(st.sampled_from(sorted(self.names)))))

    @rule(data=st.data(), name=st.sampled_from("uv"))
    def load_again(self, data: st.DataObject, name: str) -> None:
        """A content that no name has any more, which requests still run with."""
        left = sorted(self.source.sizes.keys() - set(self.names.values()))
        if left and name not in self.names:
            self.names[name] = data.draw(st.sampled_from(left))
            self.engine.adapters.revive(self.names[name])

    @rule()
    def evict(self) -> None:
        self.engine.adapters.evict_one(over_waiters=False)

    @precondition(lambda self: self.names)
    @rule(data=st.data(), on=st.booleans())
    def pin(self, data: st.DataObject, on: bool) -> None:
        with contextlib.suppress(InvalidParameter):
            self.engine.pin_adapter(data.draw(st.sampled_from(sorted(self.names.values()))), on)

    @rule(data=st.data(), length=st.integers(1, 120), tokens=st.integers(1, 60), n=st.integers(1, 4))
    def add(self, data: st.DataObject, length: int, tokens: int, n: int) -> None:
        adapter = self.names.get(data.draw(st.sampled_from("uvwxyz")), "")
        name = f"r{next(self.serial)}"
        new = request(name, range(4, 4 + length), seed=len(name), adapter=adapter, max_tokens=tokens, n=n)
        try:
            self.engine.add_request(new)
        except InvalidParameter:
            # Pinned ones leave no room; the base model always has it.
            assert adapter
            assert self.engine.adapters.pinned
        else:
            room = self.engine._context_beside(adapter) - length
            self.expected[name] = min(tokens, room) * n

    @precondition(lambda self: self.engine.scheduler.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine.scheduler.live)))
        self.engine.cancel(name)
        del self.expected[name]
        self.outputs.pop(name, None)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            for delta in self.engine.step():
                self.outputs[delta.request_id] = self.outputs.get(delta.request_id, 0) + len(delta.token_ids)

    @invariant()
    def books(self) -> None:
        self.engine.check()
        pool = self.engine.scheduler.cache.pages.pool
        pool.check()
        frames = len(self.engine.scheduler.cache.pages.frames) + len(self.engine.adapters.pages.frames)
        assert pool.num_free + frames == pool.num_frames

    def teardown(self) -> None:
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert self.outputs == self.expected
        for content in self.names.values():
            self.engine.adapters.retire(content)
        assert not self.source.sizes
        assert not self.engine.adapters.resident
        assert self.engine.adapters.pages.num_used == 0


class ReservingMachine(Machine):
    """The same, where nobody starts whose longest output may not fit."""

    admission = "reserve"


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, phases=(Phase.generate, Phase.reuse)
)
TestReservingMachine = ReservingMachine.TestCase
TestReservingMachine.settings = TestMachine.settings
