"""Texts that are known beforehand, and proposers that have the same luck with them in all lanes."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from guessing.engines import Texts, greedy
from guessing.lanes import Lane
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.speculation.replay import ReplayProposer

SHORT = 8
"""Tokens of a prompt: those of a batch fit into a step."""


class Script(NamedTuple):
    """Requests, and the whole text that each of them gets."""

    requests: list[Request]
    texts: Texts

    def first(self, count: int) -> list[Request]:
        """Requests of a batch of `count`."""
        return self.requests[:count]

    def replay(
        self, engine: Engine, rates: Sequence[float], shape: Sequence[int], seed: str
    ) -> ReplayProposer:
        """A proposer whose luck `seed` decides: the same at the same place, whatever the shape."""
        luck = zlib.crc32(seed.encode())
        return ReplayProposer(self.texts, rates, engine.limits.vocab_size, shape=shape, seed=luck)


def write_script(lane: Lane, prompts: Sequence[Sequence[int]], length: int) -> Script:
    """Decode `length` tokens after each prompt, plainly."""
    requests = greedy(prompts, length)
    lane.begin(Speculator(), requests)
    while lane.engine.has_work:
        lane.step()
    return Script(requests, lane.texts)


def made_up_prompts(
    count: int, engine: Engine, shortest: int = SHORT, longest: int = SHORT
) -> list[list[int]]:
    """Random tokens, of random lengths in [shortest, longest]."""
    rng = random.Random(7)
    vocab_size = engine.limits.vocab_size
    return [
        [rng.randrange(3, vocab_size) for _ in range(rng.randint(shortest, longest))] for _ in range(count)
    ]


def speculator_of(engine: Engine, replay: ReplayProposer | None, **limits: Any) -> Speculator:
    """One that asks `replay` within `limits`; without it, plain decoding."""
    return Speculator([replay] if replay else [], SpeculationLimits(**limits), engine.clock)
