"""Engines on the simulated executor, small enough to drive by the thousand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenloom.clock import VirtualClock
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.request import Request, SequenceDelta
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.runtime.simulated import CostModel, SimulatedExecutor

EOS = 3


def simulated_engine(
    *,
    num_pages: int = 64,
    pages_per_frame: int = 4,
    max_context: int = 512,
    max_running: int = 16,
    max_waiting: int = 10_000,
    budget: ChunkedPrefill | None = None,
    order: QueueOrder | None = None,
    prefix_cache: bool = True,
    debug: bool = True,
    vocab_size: int = 1000,
    cost: CostModel | None = None,
    **more: Any,
) -> Engine:
    clock = VirtualClock()
    return Engine(
        SimulatedExecutor(clock, cost, vocab_size),
        EngineLimits(
            vocab_size=vocab_size,
            max_context=max_context,
            num_pages=num_pages,
            pages_per_frame=pages_per_frame,
            max_running=max_running,
            max_waiting=max_waiting,
            eos_token_ids=(EOS,),
            prefix_cache=prefix_cache,
            debug=debug,
        ),
        budget=budget or ChunkedPrefill(max_batch_tokens=64),
        order=order,
        clock=clock,
        **more,
    )


def request(name: str, prompt: Iterable[int] = (1, 2, 4), *, seed: int = 0, **options: Any) -> Request:
    """A request with a fixed seed; `options` go to SamplingParams unless they are fields of Request."""
    fields = {
        k: options.pop(k)
        for k in ("priority", "tenant", "adapter", "arrival", "pooling", "slo")
        if k in options
    }
    options.setdefault("max_tokens", 8)
    options.setdefault("ignore_eos", True)
    return Request(
        request_id=name, prompt_token_ids=list(prompt), params=SamplingParams(seed=seed, **options), **fields
    )


def run(engine: Engine, max_steps: int = 100_000) -> dict[tuple[str, int], list[int]]:
    """Step until nothing is left; the tokens of each (request, sample)."""
    outputs: dict[tuple[str, int], list[int]] = {}
    for delta in drain(engine, max_steps):
        outputs.setdefault((delta.request_id, delta.sample), []).extend(delta.token_ids)
    return outputs


def drain(engine: Engine, max_steps: int = 100_000) -> list[SequenceDelta]:
    deltas: list[SequenceDelta] = []
    for _ in range(max_steps):
        if not engine.has_work:
            return deltas
        deltas.extend(engine.step())
    raise AssertionError(f"still {len(engine.scheduler.live)} live requests after {max_steps} steps")
