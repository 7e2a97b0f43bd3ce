"""The adaptive pace on the simulated executor: how deep it guesses, against the best fixed length and arithmetic."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tokenloom.bench.pace_simulation import (
    WIDTH,
    Class,
    Machine,
    ScriptedRequest,
    System,
    chains,
    serve,
)
from tokenloom.engine.speculator import SpeculationLimits
from tokenloom.runtime.simulated import CostModel

MEMORY_BOUND = CostModel(memory_bound=0.030, per_row=0.0005, per_key=0.0, fixed=0.0)
KIND = Class(name="any", share=1.0, tpot=float("inf"), prompt=(4, 0.0), predictable=0.0)
ADAPTIVE = System("adaptive", SpeculationLimits(max_depth=8, max_nodes=8, width=1, max_rows=1024))


def machine(level_seconds: float) -> Machine:
    return Machine(target=MEMORY_BOUND, draft=CostModel(level_seconds, 0.0, 0.0, 0.0))


def texts(requests: int, chances: list[float], prompt: int = 4, every: float = 0.0) -> list[ScriptedRequest]:
    """`requests` whose token at position i is the draft's first choice with probability `chances[i]`, which it says,
    or none of its choices; one arrives `every` so many seconds."""
    rng = np.random.default_rng(requests)
    said = np.stack([np.array(chances), np.zeros(len(chances)), np.zeros(len(chances))], 1)
    return [
        ScriptedRequest(
            KIND, i * every, prompt, said, said, np.where(rng.random(len(chances)) < said[:, 0], 0, WIDTH)
        )
        for i in range(requests)
    ]


def best_length(requests: int, chance: float, level_seconds: float) -> int:
    """The fixed length with the most expected tokens a second, which an oracle would have to know."""
    rates = [
        sum(chance**level for level in range(depth + 1))
        / (MEMORY_BOUND.seconds(requests * (1 + depth), 0) + depth * level_seconds)
        for depth in range(9)
    ]
    return rates.index(max(rates))


def fixed(length: int) -> System:
    return chains(length) if length else System("plain", None)


@pytest.mark.parametrize(
    ("requests", "chance", "num_output"),
    [(1, 0.3, 400), (1, 0.9, 600), (8, 0.9, 600), (40, 0.3, 100), (40, 0.9, 200)],
)
@pytest.mark.parametrize("level_seconds", [0.0005, 0.005])
def test_it_finds_the_best_depth(requests: int, chance: float, num_output: int, level_seconds: float) -> None:
    """At least 90 % of the best fixed length, with all that it takes to learn."""
    scripts = texts(requests, [chance] * num_output)
    best = serve(fixed(best_length(requests, chance, level_seconds)), machine(level_seconds), scripts)
    found = serve(ADAPTIVE, machine(level_seconds), scripts)
    assert found.throughput >= 0.9 * best.throughput


def test_a_fixed_length_makes_what_arithmetic_says() -> None:
    """One request, chains of two: the walk over its text gives the steps, and each takes a step and two levels."""
    scripts = texts(1, [0.6] * 100)
    outcome = scripts[0].outcome.tolist()
    place, steps = 1, 0
    while place < len(outcome):
        hits = 0
        while hits < 2 and place + hits < len(outcome) - 1 and outcome[place + hits] == 0:
            hits += 1
        place, steps = place + 1 + hits, steps + 1
    report = serve(chains(2), machine(0.001), scripts)
    assert report.tokens_per_step == pytest.approx(99 / steps)
    # The last steps draft less where less is left.
    assert report.tpot[0] * 99 == pytest.approx(steps * (0.030 + 0.002), abs=0.002 * 2)


def test_depth_falls_as_the_load_rises() -> None:
    depths = [
        serve(ADAPTIVE, machine(0.002), texts(requests, [0.7] * num_output)).mean_depth
        for requests, num_output in ((4, 200), (16, 120), (64, 80))
    ]
    assert all(more > fewer for more, fewer in pairwise(depths)), depths


def test_a_draft_that_does_not_pay_is_tried_seldom_and_comes_back_when_it_pays() -> None:
    bad = texts(1, [0.05] * 800)
    plain, tried = serve(fixed(0), machine(0.01), bad), serve(ADAPTIVE, machine(0.01), bad)
    assert tried.throughput >= 0.97 * plain.throughput
    assert 0 < tried.mean_depth <= 0.05
    # Twice as long, and good in its second half: most of that is decoded with depth.
    turned = serve(ADAPTIVE, machine(0.002), texts(1, [0.05] * 800 + [0.9] * 800))
    best = serve(chains(8), machine(0.002), texts(1, [0.9] * 800))
    seconds = 1600 / turned.throughput - 800 / plain.throughput
    assert seconds <= 1.5 * 800 / best.throughput


def test_beside_prompts_it_does_as_well_as_the_best_fixed_length() -> None:
    """By the rate of a step that computes a long prompt every row would seem to pay, though none does."""
    scripts = texts(40, [0.6] * 120, prompt=600, every=0.25)
    found = serve(ADAPTIVE, machine(0.002), scripts)
    best = max(np.mean(serve(fixed(k), machine(0.002), scripts).tpot) ** -1 for k in (0, 1, 2, 4))
    assert 1 / np.mean(found.tpot) >= 0.93 * best
