"""Stall-free batching against its ablations, in simulation (Sarathi-Serve, OSDI 2024, section 4 of the notes)."""

from __future__ import annotations

import random

import pytest

from tests.engine.helpers import request, simulated_engine
from tests.engine.test_machine import shadow_engine
from tokenloom.bench.latency import LatencySummary
from tokenloom.bench.simulation import (
    Arrival,
    SimulatedMachine,
    Slo,
    find_capacity,
    poisson_workload,
    simulate,
)
from tokenloom.clock import VirtualClock
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.token_budget import choose_budget
from tokenloom.errors import InvalidParameter
from tokenloom.runtime.simulated import CostModel

# A 34B-like machine: 25 ms to read the weights, 0.1 ms a row past the knee at 250 rows.
MACHINE = SimulatedMachine(cost=CostModel(memory_bound=0.025, per_row=0.0001, per_key=2e-9, tile=32))
TAU = 512
STALL_FREE = ChunkedPrefill(TAU)
PREFILL_FIRST = ChunkedPrefill(TAU, chunked=False, mixed=False)


def serve(budget: ChunkedPrefill, rate: float, prompt: float = 5500, requests: int = 120) -> LatencySummary:
    workload = poisson_workload(requests, rate, (prompt, 0.3), (200, 0.5), seed=7)
    return simulate(MACHINE, budget, workload)


def test_tbt_is_five_times_lower_than_prefill_first() -> None:
    ours, theirs = serve(STALL_FREE, 0.8), serve(PREFILL_FIRST, 0.8)
    assert theirs.tbt_p99 / ours.tbt_p99 >= 5


def test_capacity_at_a_strict_slo() -> None:
    slo = Slo(tbt_p99=0.2)
    ours = find_capacity(lambda rate: serve(STALL_FREE, rate, requests=60), slo, granularity=0.1)
    theirs = find_capacity(lambda rate: serve(PREFILL_FIRST, rate, requests=60), slo, granularity=0.1)
    assert ours > 0 and ours >= 1.5 * theirs


def test_chunking_overhead_of_a_prefill() -> None:
    def prefill_seconds(tau: int) -> float:
        return simulate(MACHINE, ChunkedPrefill(tau), [Arrival(0.0, 8192, 1)]).ttft_p50

    whole = prefill_seconds(8192)
    assert prefill_seconds(512) / whole <= 1.25
    assert prefill_seconds(2048) / whole <= 1.05


@pytest.mark.parametrize("prompt", [1730.0, 7059.0])
def test_ablation_order(prompt: float) -> None:
    """P50 TTFT and P99 TBT of hybrid-only, chunked-only and both, ordered as in the paper's table."""
    tau = 1024
    rate = 2.2 * 1730 / prompt
    hybrid = serve(ChunkedPrefill(tau, chunked=False), rate, prompt)
    chunked = serve(ChunkedPrefill(tau, mixed=False), rate, prompt)
    both = serve(ChunkedPrefill(tau), rate, prompt)
    assert hybrid.ttft_p50 < both.ttft_p50 < chunked.ttft_p50
    assert both.tbt_p99 < chunked.tbt_p99 < hybrid.tbt_p99


def test_a_long_prompt_leaves_the_time_between_tokens_flat() -> None:
    engine = simulated_engine(
        num_pages=4000, max_context=40_000, budget=ChunkedPrefill(512), debug=False, cost=MACHINE.cost
    )
    for i in range(8):
        engine.add_request(request(f"talk{i}", max_tokens=200))
    for _ in range(5):
        engine.step()
    engine.add_request(request("long", [4] * 32_000, max_tokens=1))
    worst = 0.0
    for _ in range(60):
        before = engine.clock.now()
        assert len({d.request_id for d in engine.step()} & {f"talk{i}" for i in range(8)}) == 8
        worst = max(worst, engine.clock.now() - before)
    assert worst <= MACHINE.cost.seconds(512, 512 * 32_512)


def test_capacity_search_finds_a_known_limit() -> None:
    def measure(rate: float) -> LatencySummary:
        return LatencySummary(1, 0, 0, 0, 0.01 * rate, 0, 0)

    assert 6.5 <= find_capacity(measure, Slo(tbt_p99=0.0667)) <= 6.67
    assert find_capacity(measure, Slo(tbt_p99=0.00001)) == 0.0


def test_budget_from_a_profile() -> None:
    def seconds(rows: int) -> float:
        return max(0.020, 0.0001 * (-(-rows // 64) * 64))

    profile = [(rows, seconds(rows)) for rows in (1, 64, 128, 256, 512, 1024)]
    assert choose_budget(profile, 0.050, tile=64) == 448
    assert choose_budget(profile, 0.001, tile=64) == 64
    assert choose_budget(profile, 9.0, tile=64) == 1024
    noisy = [(64, 0.02), (128, 0.03), (256, 0.01), (512, 0.06)]
    assert choose_budget(noisy, 0.035, tile=64) == 256
    with pytest.raises(InvalidParameter):
        choose_budget([], 1.0)


def test_many_random_steps_lose_nothing() -> None:
    """Arrivals, cancels and tiny pools for thousands of steps: no request is lost, no chunk is empty."""
    rng = random.Random(5)
    engine = shadow_engine(12, max_running=6, budget=ChunkedPrefill(16, max_chunk_tokens=7))
    live: set[str] = set()
    for step in range(100_000):
        if rng.random() < 0.2:
            name = f"r{step}"
            engine.add_request(
                request(
                    name,
                    [rng.randrange(13) for _ in range(rng.randrange(1, 60))],
                    max_tokens=rng.randrange(1, 20),
                    n=rng.choice([1, 1, 2]),
                    seed=step,
                )
            )
            live.add(name)
        if live and rng.random() < 0.02:
            name = rng.choice(sorted(live))
            assert engine.cancel(name)
            live.remove(name)
        for delta in engine.step():
            assert delta.request_id in live
            if delta.last:
                live.remove(delta.request_id)
        assert live == set(engine.scheduler.live)
    assert isinstance(engine.clock, VirtualClock)
