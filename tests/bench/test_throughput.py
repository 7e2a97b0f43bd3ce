"""The throughput measurement, on the simulated executor."""

from __future__ import annotations

import pytest

from tokenloom.bench.throughput import measure, random_prompts
from tokenloom.clock import VirtualClock
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import ContextLengthExceeded
from tokenloom.runtime.simulated import SimulatedExecutor


def make_engine(max_waiting: int = 1024) -> Engine:
    clock = VirtualClock()
    limits = EngineLimits(vocab_size=100, max_context=256, num_pages=256, max_waiting=max_waiting)
    return Engine(SimulatedExecutor(clock, vocab_size=100), limits, clock=clock)


def test_counts_and_rates() -> None:
    engine = make_engine()
    done: list[int] = []
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
    result = measure(engine, random_prompts(20, 24, 100), params, done.append)
    assert (result.num_requests, result.prompt_tokens, result.output_tokens) == (20, 480, 160)
    assert result.steps >= 8
    assert done[-1] == 20
    assert not engine.has_work
    rates = result.as_dict()
    assert rates["output_tokens_per_second"] == pytest.approx(160 / result.seconds, rel=0.01)


def test_a_queue_shorter_than_the_prompts_is_enough() -> None:
    params = SamplingParams(max_tokens=4)
    result = measure(make_engine(max_waiting=2), random_prompts(30, 8, 100), params)
    assert result.output_tokens == 120


def test_random_prompts_are_reproducible_and_in_the_vocabulary() -> None:
    prompts = random_prompts(5, 7, 50, seed=3)
    assert prompts == random_prompts(5, 7, 50, seed=3)
    assert prompts != random_prompts(5, 7, 50, seed=4)
    assert all(len(prompt) == 7 and max(prompt) < 50 for prompt in prompts)


def test_prompts_that_can_never_run_are_refused_before_anything_runs() -> None:
    engine = make_engine()
    with pytest.raises(ContextLengthExceeded):
        measure(engine, random_prompts(2, 300, 100), SamplingParams(max_tokens=4))
    assert not engine.has_work
