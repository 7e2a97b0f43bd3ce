"""Load tests of the real scheduler on the simulated executor and a virtual clock.

Definitions after Sarathi-Serve (OSDI 2024): the capacity of a policy is the highest rate of requests at which the
median scheduling delay stays within 2 s and the P99 time between tokens within its SLO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenloom.bench.latency import LatencySummary, RequestTrace, summarize
from tokenloom.clock import VirtualClock
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.runtime.simulated import CostModel, SimulatedExecutor


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload: time in seconds, prompt and output tokens."""

    time: float
    num_prompt: int
    num_output: int


def poisson_workload(
    num_requests: int,
    rate: float,
    prompt: tuple[float, float],
    output: tuple[float, float],
    seed: int,
    longest: int = 8192,
) -> list[Arrival]:
    """Poisson arrivals at `rate` per second; lengths are log-normal with (median, sigma of the log)."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0, num_requests)) / rate
    prompts = np.clip(rng.lognormal(np.log(prompt[0]), prompt[1], num_requests), 1, longest).astype(int)
    outputs = np.clip(rng.lognormal(np.log(output[0]), output[1], num_requests), 1, longest).astype(int)
    return [Arrival(*row) for row in zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedMachine:
    """What the simulation runs on."""

    cost: CostModel
    num_pages: int = 20_000
    max_running: int = 128
    max_context: int = 20_480


def simulate(
    machine: SimulatedMachine, budget: ChunkedPrefill, workload: Sequence[Arrival]
) -> LatencySummary:
    """Serve the whole workload; returns what its clients saw."""
    clock = VirtualClock()
    engine = Engine(
        SimulatedExecutor(clock, machine.cost),
        EngineLimits(
            vocab_size=32000,
            max_context=machine.max_context,
            num_pages=machine.num_pages,
            max_running=machine.max_running,
            max_waiting=len(workload) + 1,
            prefix_cache=False,
        ),
        budget=budget,
        clock=clock,
    )
    traces = {f"{i:06d}": RequestTrace(arrival.time) for i, arrival in enumerate(workload)}
    upcoming = list(zip(traces, workload, strict=True))[::-1]
    while upcoming or engine.has_work:
        if not engine.has_work and upcoming[-1][1].time > clock.now():
            clock.advance(upcoming[-1][1].time - clock.now())
        while upcoming and upcoming[-1][1].time <= clock.now():
            name, arrival = upcoming.pop()
            params = SamplingParams(max_tokens=arrival.num_output, ignore_eos=True, seed=0)
            engine.add_request(
                Request(
                    request_id=name,
                    prompt_token_ids=[0] * arrival.num_prompt,
                    params=params,
                    arrival=arrival.time,
                )
            )
        for delta in engine.step():
            trace = traces[delta.request_id]
            trace.token_times.append(clock.now())
            if delta.timings is not None:
                trace.scheduled = delta.timings.scheduled
    return summarize(list(traces.values()))


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds: P99 of the time between tokens, and the median scheduling delay."""

    tbt_p99: float
    delay_p50: float = 2.0

    def met(self, summary: LatencySummary) -> bool:
        return bool(summary.tbt_p99 <= self.tbt_p99 and summary.delay_p50 <= self.delay_p50)


def find_capacity(
    measure: Callable[[float], LatencySummary],
    slo: Slo,
    *,
    start: float = 1.0,
    granularity: float = 0.025,
    max_steps: int = 20,
) -> float:
    """Highest rate (requests per second) that meets `slo`, by doubling and then bisection.

    `measure(rate)` serves the workload at that rate. Stops when the bracket is within `granularity` of its lower
    end or after `max_steps` measurements; 0.0 when not even 1/64 of `start` meets the SLO.
    """
    low, high = 0.0, start
    for _ in range(max_steps):
        met = slo.met(measure(high))
        if met:
            low, high = high, high * 2
        elif low == 0.0 and high > start / 64:
            high /= 2
        else:
            break
    for _ in range(max_steps):
        if low == 0.0 or (high - low) / low <= granularity:
            break
        middle = (low + high) / 2
        if slo.met(measure(middle)):
            low = middle
        else:
            high = middle
    return low
