"""How many requests and tokens per second an engine finishes when all requests are there at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Counts of one run, and `seconds` from the first arrival to the last token."""

    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    steps: int
    preemptions: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The counts and the rates made of them, by name."""
        return {
            "num_requests": self.num_requests,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "steps": self.steps,
            "preemptions": self.preemptions,
            "seconds": round(self.seconds, 4),
            "requests_per_second": round(self.num_requests / self.seconds, 3),
            "prompt_tokens_per_second": round(self.prompt_tokens / self.seconds, 1),
            "output_tokens_per_second": round(self.output_tokens / self.seconds, 1),
        }


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """`num_prompts` prompts of `num_tokens` uniform token ids each; no two share a prefix worth caching."""
    generator = np.random.default_rng(seed)
    tokens: list[list[int]] = generator.integers(0, vocab_size, (num_prompts, num_tokens)).tolist()
    return tokens


def measure(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    on_finished: Callable[[int], None] | None = None,
) -> Throughput:
    """Run `prompts` (token ids) to their ends. The queue is kept full, but never past its limit.

    `on_finished` hears how many requests are done, after each step that ended one. Raises `InvalidParameter`
    for a prompt that the engine cannot serve.
    """
    requests = [
        Request(request_id=f"bench-{index}", prompt_token_ids=list(prompt), params=params)
        for index, prompt in enumerate(prompts)
    ]
    for request in requests:
        engine.check_request(request)
    scheduler = engine.scheduler
    steps, preemptions, hits = scheduler.num_steps, scheduler.num_preemptions, scheduler.prefix_hits
    finished = output_tokens = added = 0
    start = perf_counter()
    while finished < len(requests):
        while added < len(requests) and len(scheduler.waiting) < engine.limits.max_waiting:
            engine.add_request(requests[added])
            added += 1
        ended = 0
        for delta in engine.step():
            output_tokens += len(delta.token_ids)
            ended += delta.last
        finished += ended
        if ended and on_finished is not None:
            on_finished(finished)
    return Throughput(
        num_requests=len(requests),
        prompt_tokens=sum(len(prompt) for prompt in prompts),
        cached_tokens=scheduler.prefix_hits - hits,
        output_tokens=output_tokens,
        steps=scheduler.num_steps - steps,
        preemptions=scheduler.num_preemptions - preemptions,
        seconds=perf_counter() - start,
    )
