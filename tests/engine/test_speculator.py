"""What hangs below a plan: limits, budgets, proposers that fail, and switching off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.helpers import request, run, simulated_engine
from tokenloom.engine import speculator
from tokenloom.engine.batch import TokenBatch, Work
from tokenloom.engine.engine import Engine
from tokenloom.engine.plan import StepRecord
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.proposer import Proposal, Wanted
from tokenloom.engine.request import Slo
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.runtime.simulated import CostModel, SimulatedExecutor
from tokenloom.speculation.replay import ReplayProposer

CHAIN = (1,) * 5


class Told:
    """Proposes what a function says, and keeps what it was asked."""

    name = "told"

    def __init__(self, tell: Callable[[Wanted], Proposal]) -> None:
        self.tell = tell
        self.asked: list[Wanted] = []
        self.forgotten: list[Sequence] = []
        self.closed = False

    def propose(self, wanted: Any) -> list[Proposal]:
        self.asked += wanted
        return [self.tell(want) for want in wanted]

    def forget(self, seq: Sequence) -> None:
        self.forgotten.append(seq)

    def close(self) -> None:
        self.closed = True


def chain(count: int, token: int = 5) -> Proposal:
    return Proposal([token] * count, list(range(-1, count - 1)), [0] * count, [0.9] * count)


def texts_of(**options: Any) -> dict[tuple[str, int], list[int]]:
    engine = simulated_engine(**options)
    for i in range(4):
        engine.add_request(request(f"r{i}", range(4, 20 + i), seed=i, max_tokens=40, n=1 + i % 2))
    return run(engine)


TEXTS = texts_of(max_running=8)


def replayed(rate: float, *, pace: Any = "fixed", shape: tuple[int, ...] = CHAIN, **options: Any) -> Engine:
    engine = simulated_engine(max_running=8, **options)
    limits = SpeculationLimits(max_depth=5, max_nodes=20, pace=pace)
    proposer = ReplayProposer(TEXTS, (rate,), 1000, shape=shape)
    engine.speculate(Speculator([proposer], limits, engine.clock))
    for i in range(4):
        engine.add_request(request(f"r{i}", range(4, 20 + i), seed=i, max_tokens=40, n=1 + i % 2))
    return engine


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pace", ["fixed", "adaptive"])
def test_the_text_is_the_same_whatever_is_proposed(rate: float, pace: str) -> None:
    assert run(replayed(rate, pace=pace)) == TEXTS


def test_full_acceptance_gives_one_token_more_than_was_drafted() -> None:
    engine = replayed(1.0)
    deltas = []
    while engine.has_work:
        deltas.append([len(delta.token_ids) for delta in engine.step()])
    lengths = [length for step in deltas for length in step]
    assert max(lengths) == len(CHAIN) + 1
    # 40 tokens: one from the prompt, six steps of six, and one of the three that are left.
    assert sum(map(len, TEXTS.values())) == sum(lengths)
    assert len(deltas) <= 10


def test_nothing_is_drafted_past_the_longest_output() -> None:
    told = Told(lambda want: chain(want.max_depth))
    engine = simulated_engine()
    engine.speculate(Speculator([told], SpeculationLimits(pace="fixed"), engine.clock))
    engine.add_request(request("r", range(4, 9), max_tokens=4))
    run(engine)
    assert told.asked[0].max_depth == 2
    assert all(want.max_depth >= 1 for want in told.asked)


def test_rows_stay_within_the_token_budget_and_prompts_go_on() -> None:
    rows: list[tuple[int, int]] = []

    def watch(batch: TokenBatch) -> Any:
        verify = int((batch.work == Work.VERIFY).sum())
        rows.append((batch.num_rows, verify))
        return executor._hash(batch)

    told = Told(lambda want: chain(min(want.max_nodes, want.max_depth)))
    engine = simulated_engine(num_pages=200, budget=ChunkedPrefill(max_batch_tokens=32))
    executor = engine.executor
    assert isinstance(executor, SimulatedExecutor)
    executor.choose = watch
    engine.speculate(Speculator([told], SpeculationLimits(pace="fixed", max_rows=100), engine.clock))
    for i in range(12):
        engine.add_request(request(f"r{i}", range(4, 60), seed=i, max_tokens=20))
    run(engine)
    assert max(total for total, _ in rows) <= 32
    assert any(verify for _, verify in rows)


def test_an_end_token_has_nothing_below_it() -> None:
    told = Told(lambda want: Proposal([7, 8, 9], [-1, 0, 1], [0] * 3, [1.0] * 3))
    engine = simulated_engine()
    speculator = Speculator([told], SpeculationLimits(pace="fixed"), engine.clock)
    engine.speculate(speculator)
    engine.add_request(request("r", range(4, 9), max_tokens=20, stop_token_ids=(8,)))
    engine.step()
    plan_sizes: list[int] = []
    engine.on_step = lambda record: plan_sizes.append(record.verify_rows)
    run(engine)
    assert max(plan_sizes) == 2, plan_sizes


def test_a_proposer_that_raises_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    def fail(want: Wanted) -> Proposal:
        raise RuntimeError("out of ideas")

    told = Told(fail)
    engine = simulated_engine(max_running=8)
    good = ReplayProposer(TEXTS, (1.0,), 1000, shape=CHAIN)
    engine.speculate(Speculator([told, good], SpeculationLimits(pace="fixed"), engine.clock))
    for i in range(4):
        engine.add_request(request(f"r{i}", range(4, 20 + i), seed=i, max_tokens=40, n=1 + i % 2))
    with caplog.at_level(logging.ERROR):
        assert run(engine) == TEXTS
    assert len(caplog.records) == 1 and "told" in caplog.text
    assert engine.speculator.stats.num_accepted > 0


@pytest.mark.parametrize(
    "proposal",
    [
        Proposal([5, 5], [-1, -1], [0, 1], [0.5, 0.5]),
        Proposal([5, 5, 6, 6, 6], [-1, -1, 0, 1, 1], [0] * 5, [0.5] * 5),
        Proposal([5], [-1], [1.5], [0.5]),  # type: ignore[list-item]
        Proposal([5], [-1], [None], [0.5]),  # type: ignore[list-item]
        Proposal([5], [-1], [0], ["sure"]),  # type: ignore[list-item]
        Proposal([5, 6], [-1, 7], [0, 0], [0.5, 0.5]),
        Proposal([5, 6], [1, -1], [0, 0], [0.5, 0.5]),
        Proposal([5], [-1], [0], [float("nan")]),
        Proposal([5], [-1], [-3], [7.0]),
        Proposal([10**6], [-1], [0], [1.0]),
        Proposal([-4], [-1], [0], [1.0]),
        Proposal([5, 6], [-1], [0], [1.0]),
        Proposal(list(range(200)), [-1] * 200, list(range(200)), [0.01] * 200),
    ],
)
def test_nonsense_of_a_proposer_harms_nobody(proposal: Proposal) -> None:
    engine = simulated_engine(max_running=8)
    engine.speculate(Speculator([Told(lambda want: proposal)], SpeculationLimits(pace="fixed"), engine.clock))
    verify_trees(engine)
    for i in range(4):
        engine.add_request(request(f"r{i}", range(4, 20 + i), seed=i, max_tokens=40, n=1 + i % 2))
    assert run(engine) == TEXTS


def verify_trees(engine: Engine) -> None:
    """Have every tree that is verified checked to be one."""
    commit = engine.scheduler.commit

    def checked(plan: Any, *rest: Any) -> Any:
        for tree in plan.trees.values():
            tree.check()
        return commit(plan, *rest)

    engine.scheduler.commit = checked  # type: ignore[method-assign]


def test_a_proposer_that_cannot_forget_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Who fails when a sequence stops, or at the end, takes nobody else along."""

    class Forgetful(Told):
        def forget(self, seq: Sequence) -> None:
            raise KeyError(seq)

        def close(self) -> None:
            raise OSError("gone")

    engine = simulated_engine(max_running=8)
    proposers = [Forgetful(lambda want: chain(2)), Told(lambda want: chain(1, 6))]
    engine.speculate(Speculator(proposers, SpeculationLimits(pace="fixed"), engine.clock))
    closed: list[bool] = []
    engine.executor.close = lambda: closed.append(True)  # type: ignore[method-assign]
    for i in range(4):
        engine.add_request(request(f"r{i}", range(4, 20 + i), seed=i, max_tokens=40, n=1 + i % 2))
    with caplog.at_level(logging.ERROR):
        assert run(engine) == TEXTS
        assert len(caplog.records) == 1
        engine.close()
    assert len(proposers[1].forgotten) == len(TEXTS)
    assert closed and proposers[1].closed
    engine.scheduler.cache.pages.check()


def test_proposers_hear_who_stopped_and_are_closed() -> None:
    told = Told(lambda want: chain(2))
    engine = simulated_engine()
    engine.speculate(Speculator([told], SpeculationLimits(pace="fixed"), engine.clock))
    for name in ("a", "b"):
        engine.add_request(request(name, range(4, 9), max_tokens=10))
    engine.step()
    engine.step()
    engine.cancel("a")
    run(engine)
    assert [seq.request.request_id for seq in told.forgotten] == ["a", "b"]
    engine.close()
    assert told.closed


def test_scratch_takes_no_page_that_a_running_sequence_needs() -> None:
    """In a pool that just suffices, speculation neither preempts nor stops: it shrinks."""
    plain = simulated_engine(num_pages=12, pages_per_frame=1, max_running=4, prefix_cache=False)
    guessing = simulated_engine(num_pages=12, pages_per_frame=1, max_running=4, prefix_cache=False)
    guessing.speculate(
        Speculator([Told(lambda want: chain(8))], SpeculationLimits(pace="fixed"), guessing.clock)
    )
    outputs = []
    for engine in (plain, guessing):
        for i in range(3):
            engine.add_request(request(f"r{i}", range(4, 34), seed=i, max_tokens=30))
        outputs.append(run(engine))
    assert outputs[0] == outputs[1]
    assert guessing.scheduler.num_preemptions <= plain.scheduler.num_preemptions
    assert guessing.scheduler.cache.pages.num_used == 0


def records_of(engine: Engine) -> list[StepRecord]:
    records: list[StepRecord] = []
    engine.on_step = records.append
    run(engine)
    return records


def test_it_switches_itself_off_where_rows_are_dear_and_says_so() -> None:
    """Each row costs as much as a step: guesses that are right half of the time do not pay."""
    cost = CostModel(memory_bound=0.0, per_row=0.01, fixed=0.0)
    engine = replayed(0.5, pace="adaptive", cost=cost)
    engine.add_request(request("long", range(4, 40), seed=9, max_tokens=400))
    TEXTS["long", 0] = [0] * 400
    try:
        records_of(engine)
    finally:
        del TEXTS["long", 0]
    stats = engine.speculator.stats
    assert stats.skipped > 0.9 * (stats.skipped + stats.steps)


@pytest.mark.parametrize("requests", [1, 8])
def test_guesses_that_become_right_are_found_out(requests: int) -> None:
    """A proposer that is always sure and never right is left alone, but not for ever: rows become cheap for it again
    when what it says comes true."""
    names = [f"r{i}" for i in range(requests)]

    def begun(cost: CostModel) -> Engine:
        engine = simulated_engine(max_running=8, num_pages=900, max_context=1600, cost=cost, debug=False)
        for i, name in enumerate(names):
            engine.add_request(request(name, range(4, 10), seed=i, max_tokens=1500))
        return engine

    cost = CostModel(memory_bound=0.0, per_row=0.0014, fixed=0.02)
    texts = run(begun(cost))
    turn = 500

    def tell(want: Wanted) -> Proposal:
        first = want.seq.num_output
        text = texts[want.seq.request.request_id, 0][first : first + 5]
        return Proposal(
            [(token + (first < turn)) % 1000 for token in text],
            list(range(-1, len(text) - 1)),
            [0] * len(text),
            [0.8] * len(text),
        )

    told = Told(tell)
    engine = begun(cost)
    engine.speculate(Speculator([told], SpeculationLimits(max_depth=5), engine.clock))
    outputs: dict[tuple[str, int], list[int]] = {}
    tokens: list[int] = []
    asked = 0
    while engine.has_work:
        deltas = engine.step()
        tokens.append(sum(len(delta.token_ids) for delta in deltas))
        for delta in deltas:
            outputs.setdefault((delta.request_id, delta.sample), []).extend(delta.token_ids)
        if len(tokens) == turn:
            asked = len(told.asked)
    assert outputs == texts
    # In the first half there is little to learn, and little is asked; in the second there are whole chains.
    assert asked < turn * requests / 4
    assert len(tokens) < turn + 1000 * 0.6
    assert max(tokens[turn:]) == 6 * requests


def test_it_stays_on_where_rows_are_free() -> None:
    engine = replayed(1.0, pace="adaptive", cost=CostModel(memory_bound=0.02, per_row=1e-7))
    records = records_of(engine)
    assert sum(record.num_accepted for record in records) > 100
    assert engine.speculator.stats.seconds_saved > 0


def test_what_is_saved_for_one_of_eight_is_an_eighth_of_a_plain_step() -> None:
    """A plain step makes a token for everybody, so a token more for one of them saves a part of it."""
    cost = CostModel(memory_bound=0.02, per_row=1e-7)

    def begun() -> Engine:
        engine = simulated_engine(max_running=8, num_pages=200, cost=cost)
        for i in range(8):
            engine.add_request(request(f"r{i}", range(4, 20), seed=i, max_tokens=60))
        return engine

    texts = run(begun())
    engine = begun()
    known = {("r0", 0): texts["r0", 0]}
    known |= {(f"r{i}", 0): [] for i in range(1, 8)}
    proposer = ReplayProposer(known, (1.0,), 1000, shape=CHAIN)
    engine.speculate(Speculator([proposer], SpeculationLimits(max_depth=1, pace="fixed"), engine.clock))
    records = records_of(engine)
    plain = cost.memory_bound + cost.fixed
    counted = [record for record in records if record.speculation and record.speculation.seconds_saved]
    assert len(counted) > 10
    for record in counted:
        assert record.speculation is not None and record.num_accepted <= 1
        saved = record.speculation.seconds_saved
        assert saved == pytest.approx(plain * record.num_accepted / 8, rel=0.1, abs=plain / 100)


def test_places_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters come and go; what was counted for those that were not seen for longest goes."""
    monkeypatch.setattr(speculator, "MAX_PLACES", 3)
    engine = replayed(1.0)
    run(engine)
    places = engine.speculator.stats.by_place
    assert len(places) == 3 and {depth for _, _, depth in places} < set(range(1, 6))
    assert all(found.tested >= found.accepted > 0 for found in places.values())


def test_a_preempted_request_starts_anew_on_its_pace() -> None:
    """Who was preempted does not chase the pause."""
    told = Told(lambda want: chain(1))
    engine = simulated_engine(num_pages=12, pages_per_frame=1, max_running=4, prefix_cache=False)
    engine.speculate(Speculator([told], SpeculationLimits(pace="fixed"), engine.clock))
    for i in range(4):
        asked = request(f"r{i}", range(4, 34), seed=i, max_tokens=60)
        asked.slo = Slo(tpot=0.001)
        engine.add_request(asked)
    lags: list[float] = []
    while engine.has_work:
        before, now = engine.scheduler.num_preemptions, engine.clock.now()
        held = dict(engine.speculator._paces)
        engine.step()
        if engine.scheduler.num_preemptions > before:
            gone = held.keys() - engine.scheduler.running.keys()
            lags += [held[seq].need(now, 0.0) for seq in gone if seq.finish_reason is None]
            assert not gone & engine.speculator._paces.keys()
    assert lags and max(lags) > 1
    assert not engine.speculator._paces


def test_a_pace_gets_its_rows_first() -> None:
    """Two requests want the same rows; the one with a pace that it misses otherwise makes more tokens a step."""
    cost = CostModel(memory_bound=0.005, per_row=0.002, fixed=0.0)
    engine = simulated_engine(max_running=2, cost=cost, num_pages=200)
    names = ("slow", "fast")
    for name in names:
        engine.add_request(request(name, range(4, 20), seed=1, max_tokens=120))
    texts = run(engine)
    engine = simulated_engine(max_running=2, cost=cost, num_pages=200)
    proposer = ReplayProposer(texts, (0.8,), 1000, shape=(1,) * 6)
    engine.speculate(Speculator([proposer], SpeculationLimits(max_depth=6, max_rows=8), engine.clock))
    made = dict.fromkeys(names, 0)
    for name in names:
        asked = request(name, range(4, 20), seed=1, max_tokens=120)
        asked.slo = Slo(tpot=0.004) if name == "fast" else Slo()
        engine.add_request(asked)
    ended: list[str] = []
    while engine.has_work:
        for delta in engine.step():
            made[delta.request_id] += len(delta.token_ids)
            if delta.last:
                ended.append(delta.request_id)
    assert made == {"slow": 120, "fast": 120}
    assert ended == ["fast", "slow"]
