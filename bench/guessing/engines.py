"""Engines that speculate, and what they served."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

from tokenloom import SamplingParams
from tokenloom.config import Config, make_config
from tokenloom.engine.engine import Engine
from tokenloom.engine.plan import StepRecord
from tokenloom.engine.proposer import Proposer
from tokenloom.engine.request import Request, SequenceDelta
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.serving.assembly import EngineParts, build_engine
from tokenloom.serving.load_listener import SilentLoad
from tokenloom.serving.threads import set_blas_threads

Texts = dict[tuple[str, int], list[int]]


class Served(NamedTuple):
    """What a run gave: deltas in order, its steps, and the seconds of all steps in which nobody computed a prompt."""

    deltas: list[SequenceDelta]
    steps: list[StepRecord]
    seconds: float
    decode_seconds: float

    def texts(self) -> Texts:
        """Tokens of each sample."""
        found: Texts = {}
        for delta in self.deltas:
            found.setdefault((delta.request_id, delta.sample), []).extend(delta.token_ids)
        return found

    @property
    def decoding(self) -> list[StepRecord]:
        return [step for step in self.steps if not step.prefill_rows]

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a sequence gets from a step of the target."""
        roots = sum(step.decode_rows for step in self.decoding)
        return (roots + sum(step.num_accepted for step in self.decoding)) / max(roots, 1)

    @property
    def decode_rate(self) -> float:
        """Tokens a second of the steps without prompts."""
        tokens = sum(step.decode_rows + step.num_accepted for step in self.decoding)
        return tokens / self.decode_seconds

    def share(self, phase: str) -> float:
        """Part of the time of decoding that `phase` took."""
        return sum(step.seconds[phase] for step in self.decoding) / self.decode_seconds

    def median_seconds(self, rows: int) -> float:
        """Of the executor, over steps of so many rows."""
        found = [
            step.seconds["execute"] for step in self.decoding if step.decode_rows + step.verify_rows == rows
        ]
        return statistics.median(found) if found else float("nan")


def options_of(spec: dict[str, Any], **options: Any) -> Config:
    """The configuration of an engine under test."""
    chosen = {"threads": spec["threads"], "max_running": 64, "max_batch_tokens": 512}
    return make_config(chosen | options, env={})


@contextmanager
def engine_parts(spec: dict[str, Any], **options: Any) -> Iterator[EngineParts]:
    """The engine under test."""
    set_blas_threads(spec["threads"])
    parts = build_engine(options_of(spec, **options), SilentLoad())
    try:
        yield parts
    finally:
        parts.engine.close()


def speculate(engine: Engine, proposers: Sequence[Proposer], **limits: Any) -> Speculator:
    """Have `engine` use these proposers from now on; none: plain decoding."""
    speculator = Speculator(proposers, SpeculationLimits(**limits), engine.clock)
    engine.speculate(speculator)
    return speculator


def serve(
    engine: Engine, requests: Sequence[Request], during: Callable[[Engine, int], None] | None = None
) -> Served:
    """Serve all requests, submitted at once; `during` is called before each step."""
    steps: list[StepRecord] = []
    engine.on_step = steps.append
    deltas: list[SequenceDelta] = []
    for request in requests:
        engine.add_request(replace(request, arrival=-1.0))
    began = perf_counter()
    decode_seconds = 0.0
    while engine.has_work:
        if during is not None:
            during(engine, len(steps))
        started, count = perf_counter(), len(steps)
        deltas += engine.step()
        if len(steps) > count and not steps[-1].prefill_rows:
            decode_seconds += perf_counter() - started
    return Served(deltas, steps, perf_counter() - began, decode_seconds)


def greedy(prompts: Sequence[Sequence[int]], num_output: int, **options: Any) -> list[Request]:
    """Requests r0, r1, ... of fixed length."""
    params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    return [
        Request(request_id=f"r{i}", prompt_token_ids=list(prompt), params=params.with_seed(i), **options)
        for i, prompt in enumerate(prompts)
    ]
