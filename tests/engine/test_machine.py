"""A hypothesis state machine drives the scheduler with arrivals, cancels, priorities and tiny pools."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.helpers import EOS, request
from tests.engine.shadow import ShadowExecutor
from tokenloom.clock import VirtualClock
from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.proposer import Proposal
from tokenloom.engine.request import NO_SLO, Slo
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.speculator import SpeculationLimits, Speculator

VOCAB = 13
STEP = 0.010


def shadow_engine(num_pages: int, **options: Any) -> Engine:
    clock = VirtualClock()
    budget = options.pop("budget", ChunkedPrefill(max_batch_tokens=64))
    order = options.pop("order", QueueOrder())
    speculator = options.pop("speculator", None)
    limits = EngineLimits(
        vocab_size=VOCAB,
        max_context=96,
        num_pages=num_pages,
        pages_per_frame=options.pop("pages_per_frame", 2),
        max_waiting=10_000,
        eos_token_ids=(EOS,),
        debug=True,
        **options,
    )
    slots = (num_pages + 4) * PAGE_SIZE
    engine = Engine(ShadowExecutor(clock, slots, VOCAB), limits, budget=budget, order=order, clock=clock)
    engine.speculate(speculator or Speculator())
    return engine


Output = tuple[list[int], Any, bytes | None]
"""All tokens of a sample, how it ended, and its embedding."""


class RandomTrees:
    """Proposes trees of any shape with tokens at random: with so small a vocabulary, many are right."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def propose(self, wanted: Any) -> list[Proposal]:
        return [self._tree(want.max_nodes) for want in wanted]

    def _tree(self, most: int) -> Proposal:
        rng = self._rng
        tree = Proposal()
        taken: dict[int, list[int]] = {-1: rng.sample(range(VOCAB), VOCAB)}
        for node in range(rng.randrange(0, min(most, 20) + 1)):
            parent = rng.choice([parent for parent, left in taken.items() if left])
            tree.tokens.append(taken[parent].pop())
            tree.parents.append(parent)
            tree.ranks.append(0)
            tree.confidences.append(rng.random())
            taken[node] = rng.sample(range(VOCAB), VOCAB)
        return tree

    def forget(self, seq: Sequence) -> None:
        pass

    def close(self) -> None:
        pass


def joined(outputs: dict[int, list[Output]]) -> dict[int, Output]:
    """Everything that each sample got, however many tokens came at a time."""
    return {
        sample: ([token for part in parts for token in part[0]], *parts[-1][1:])
        for sample, parts in outputs.items()
    }


def output_alone(spec: dict[str, Any]) -> dict[int, list[Output]]:
    engine = shadow_engine(64, max_running=16, prefix_cache=False)
    engine.add_request(request(**spec))
    outputs: dict[int, list[Output]] = {}
    while engine.has_work:
        for delta in engine.step():
            outputs.setdefault(delta.sample, []).append(
                (delta.token_ids, delta.finish_reason, delta.embedding)
            )
    return outputs


class SchedulerMachine(RuleBasedStateMachine):
    """Whatever happens, each request gets what it would have got alone, in bounded time."""

    @initialize(
        num_pages=st.integers(6, 14),
        pages_per_frame=st.integers(1, 3),
        max_batch=st.sampled_from([8, 17, 64]),
        max_chunk=st.sampled_from([0, 1, 5]),
        max_running=st.integers(3, 8),
        policy=st.sampled_from(["fcfs", "priority", "slo"]),
        prefix_cache=st.booleans(),
        trees=st.none() | st.integers(0, 9),
    )
    def start(
        self,
        num_pages: int,
        pages_per_frame: int,
        max_batch: int,
        max_chunk: int,
        max_running: int,
        policy: Any,
        prefix_cache: bool,
        trees: int | None,
    ) -> None:
        self.engine = shadow_engine(
            num_pages,
            pages_per_frame=pages_per_frame,
            max_running=max_running,
            prefix_cache=prefix_cache,
            budget=ChunkedPrefill(max_batch_tokens=max_batch, max_chunk_tokens=max_chunk),
            order=QueueOrder(policy, age_bound=1.0),
            speculator=None
            if trees is None
            else Speculator(
                [RandomTrees(trees)],
                SpeculationLimits(max_nodes=20, pace="fixed" if trees % 2 else "adaptive"),
            ),
        )
        self.specs: dict[str, dict[str, Any]] = {}
        self.outputs: dict[str, dict[int, list[Output]]] = {}
        self.deadlines: dict[str, float] = {}
        self.ended: set[str] = set()
        self.work_ahead = 0

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 50),
        tail=st.integers(0, 3),
        max_tokens=st.integers(0, 30),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(0, 2),
        slo=st.sampled_from([NO_SLO, Slo(ttft=0.1), Slo(tpot=0.01, ttft=0.5), Slo(tpot=0.001)]),
        tenant=st.sampled_from(["", "t"]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        ignore_eos=st.booleans(),
        pooling=st.sampled_from([None, None, None, "mean", "last"]),
    )
    def arrive(self, family: int, length: int, tail: int, **options: Any) -> None:
        name = f"r{len(self.specs)}"
        prompt = [(family + j * j) % VOCAB for j in range(length)] + [tail] * (tail % 2)
        if options["pooling"] is not None:
            options |= {"max_tokens": 0, "n": 1, "prompt_logprobs": None}
        spec = {"name": name, "prompt": prompt, "seed": len(self.specs), **options}
        self.engine.add_request(request(**spec))
        self.specs[name] = spec
        self.outputs[name] = {}
        # Everything that arrived before, plus what may be running when the age bound passes.
        self.work_ahead += options["n"] * (len(prompt) + options["max_tokens"] + 2)
        running = self.engine.max_running * 2 * 96
        self.deadlines[name] = self.engine.clock.now() + 1.0 + STEP * (self.work_ahead + running)

    @precondition(lambda self: self.specs.keys() - self.ended)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.specs.keys() - self.ended)))
        assert self.engine.cancel(name)
        self.ended.add(name)
        del self.outputs[name]

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    def _step(self) -> None:
        engine = self.engine
        scheduler = engine.scheduler
        decodes = [seq for seq in scheduler.running if seq.num_pending == 1 and seq.num_output > 0]
        before = scheduler.num_preemptions
        waiting = set(scheduler.waiting)
        now = engine.clock.now()
        deltas = engine.step()
        got = {(delta.request_id, delta.sample) for delta in deltas}
        if scheduler.num_preemptions == before:
            for seq in decodes:
                assert (seq.request.request_id, seq.index) in got, "a decode was stalled"
        self._check_age_order(waiting, now)
        for delta in deltas:
            assert delta.request_id in self.outputs, "output of a request that is not live"
            samples = self.outputs[delta.request_id].setdefault(delta.sample, [])
            assert not samples or samples[-1][1] is None, "output after the end"
            samples.append((delta.token_ids, delta.finish_reason, delta.embedding))
            if delta.last:
                self.ended.add(delta.request_id)
                assert engine.clock.now() <= self.deadlines[delta.request_id], "starved"

    def _check_age_order(self, waiting: set[Sequence], now: float) -> None:
        """Of those that waited, nobody was admitted past an older one beyond its age bound."""
        still = [seq for seq in waiting if seq in self.engine.scheduler.waiting]
        aged = [seq.request.arrival for seq in still if now - seq.request.arrival > 1.0]
        for seq in waiting - set(still):
            assert not aged or seq.request.arrival <= min(aged), "an old request was passed"

    @invariant()
    def budget_is_kept(self) -> None:
        if hasattr(self, "engine"):
            executor = self.engine.executor
            assert isinstance(executor, ShadowExecutor)
            assert executor.max_rows <= self.engine.scheduler.budget.max_batch_tokens

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            if not self.engine.has_work:
                break
            self._step()
        assert not self.engine.has_work, "lost or stuck requests"
        cache = self.engine.scheduler.cache
        assert not cache.references
        cache.clear()
        assert cache.pages.num_used == 0
        assert cache.pages.pool.num_free == cache.pages.pool.num_frames
        for name, outputs in self.outputs.items():
            assert joined(outputs) == joined(output_alone(self.specs[name])), name


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
