"""Engines that share one executor and take turns step by step, each in pages of its own.

The machine changes from second to second, by more than what is to be measured. So what is compared runs at the same
time: whoever has made the fewest tokens of its text takes the next step, and all lanes reach the same place of the
same text together.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from guessing.engines import Texts
from tokenloom.engine.batch import PAGE_SIZE, Executor, StepResult, Ticket, TokenBatch
from tokenloom.engine.engine import Engine
from tokenloom.engine.plan import StepRecord
from tokenloom.engine.request import Request
from tokenloom.engine.speculator import Speculator


class PagesFrom:
    """`executor`, with its page `first` as page 0. `moving_seconds` is what moving slots has taken."""

    def __init__(self, executor: Executor, first: int) -> None:
        self._executor = executor
        self._first = first
        self._first_slot = first * PAGE_SIZE
        self.moving_seconds = 0.0

    def submit(self, batch: TokenBatch) -> Ticket:
        batch.page_tables += np.int32(self._first)
        batch.slots[batch.slots >= 0] += self._first_slot
        if len(batch.page_copies):
            batch.page_copies += np.int32(self._first)
        return self._executor.submit(batch)

    def collect(self, ticket: Ticket) -> StepResult:
        return self._executor.collect(ticket)

    def logits(self, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._executor.logits(rows)

    def move_slots(self, moves: NDArray[np.int64]) -> None:
        began = perf_counter()
        self._executor.move_slots(moves + self._first_slot)
        self.moving_seconds += perf_counter() - began

    def close(self) -> None:
        """Nothing: the executor is that of all lanes."""


@dataclass(frozen=True)
class Step:
    """A step in which everybody decoded: `seconds` are those of the whole turn, `moving` those of moving slots, and
    `taken` the tokens of each sequence, in the order of the requests."""

    record: StepRecord
    seconds: float
    moving: float
    taken: list[int]

    @property
    def rows(self) -> int:
        return self.record.decode_rows + self.record.verify_rows

    @property
    def tokens(self) -> int:
        return self.record.decode_rows + self.record.num_accepted


class Lane:
    """An engine with pages of its own, and what its steps made since `begin`. Steps in which somebody computed a
    prompt do not count, nor those after the first end of a text."""

    def __init__(self, engine: Engine, executor: PagesFrom) -> None:
        self.engine = engine
        self._executor = executor
        self._expected: Texts = {}
        self._requests: Sequence[Request] = ()
        self.texts: Texts = {}
        self.steps: list[Step] = []
        self.tokens = 0
        self.seconds = 0.0

    def begin(
        self, speculator: Speculator, requests: Sequence[Request], expected: Texts | None = None
    ) -> None:
        """Start on `requests`, whose outputs begin with `expected`, where that is given. Prompts are computed and
        first tokens are there when it returns, without speculation: every lane starts at the same place."""
        self.engine.reset()
        self.engine.speculate(Speculator())
        self._requests, self._expected = requests, expected or {}
        self.texts = {(request.request_id, 0): [] for request in requests}
        for request in requests:
            self.engine.add_request(replace(request, arrival=-1.0))
        while not all(self.texts.values()):
            self.step()
        self.engine.speculate(speculator)
        self.steps, self.tokens, self.seconds = [], 0, 0.0

    def step(self) -> None:
        """One step. Raises RuntimeError where it gives another token than was expected, or nobody runs."""
        records: list[StepRecord] = []
        self.engine.on_step = records.append
        moving = self._executor.moving_seconds
        began = perf_counter()
        deltas = self.engine.step()
        seconds = perf_counter() - began
        if not records:
            raise RuntimeError("all texts have ended")
        for delta in deltas:
            name = (delta.request_id, delta.sample)
            text = self.texts[name]
            text += delta.token_ids
            if name in self._expected and self._expected[name][: len(text)] != text:
                raise RuntimeError(f"the text of {name[0]} changed")
        if records[0].prefill_rows or len(deltas) < len(self._requests):
            return
        taken = {delta.request_id: len(delta.token_ids) for delta in deltas}
        step = Step(
            records[0],
            seconds,
            self._executor.moving_seconds - moving,
            [taken[request.request_id] for request in self._requests],
        )
        self.steps.append(step)
        self.tokens += step.tokens
        self.seconds += seconds

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def step_seconds(self) -> float:
        """The mean, as that is what a text takes."""
        return self.seconds / len(self.steps)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a sequence gets from a step."""
        return self.tokens / len(self.steps) / len(self._requests)


def make_lanes(engine: Engine, count: int) -> list[Lane]:
    """`count` engines like `engine`, on its executor and in equal parts of its pages. `engine` must not run beside
    them. Raises ValueError where the pool is too small."""
    limits = engine.limits
    frames = limits.num_pages // limits.pages_per_frame // count
    if not frames:
        raise ValueError(f"{limits.num_pages} pages are too few for {count} lanes")
    pages = frames * limits.pages_per_frame
    lanes = []
    for number in range(count):
        executor = PagesFrom(engine.executor, number * pages)
        mine = replace(limits, num_pages=pages, prefix_cache=False)
        lanes.append(
            Lane(Engine(executor, mine, budget=engine.scheduler.budget, clock=engine.clock), executor)
        )
    return lanes


def take_turns(lanes: Sequence[Lane], goal: int) -> None:
    """Step lanes that have begun until each has made `goal` tokens: always one that has made fewest, and of several
    another one each time."""
    for turn in itertools.count():
        number = min(range(len(lanes)), key=lambda each: (lanes[each].tokens, (each - turn) % len(lanes)))
        if lanes[number].tokens >= goal:
            return
        lanes[number].step()


def lower_bound(values: Sequence[float]) -> float:
    """Of the mean, with 95 % confidence (one-sided, Student's t); the value itself where there is only one."""
    if len(values) < 2:
        return values[0]
    return statistics.mean(values) - student(len(values) - 1) * statistics.stdev(values) / math.sqrt(
        len(values)
    )


def student(freedom: int) -> float:
    """The 95 % quantile of Student's t: exact for 1 and 2 degrees of freedom, else by its series in their inverse."""
    if freedom < 3:
        return (6.314, 2.920)[freedom - 1]
    z = 1.64485
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def trimmed_mean(values: Sequence[float]) -> float:
    """Of what is left without the lowest and the highest tenth."""
    ranked = sorted(values)
    cut = len(ranked) // 10
    return statistics.mean(ranked[cut : len(ranked) - cut])
