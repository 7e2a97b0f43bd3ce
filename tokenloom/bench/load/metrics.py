"""Figures of a run, under the names that `vllm bench serve` uses where they mean the same.

Latencies count from when a request was due to be written, not from when it was: a generator that falls behind
makes its figures worse, not better, and `lag` shows by how much. (vLLM counts from the write.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenloom.bench.load.objectives import meets
from tokenloom.bench.load.records import Record
from tokenloom.bench.load.runner import Run

LAG_WARNING: Final = 0.010
CPU_WARNING: Final = 0.8


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, median, standard deviation and percentiles (by percentile) in seconds; NaN without values."""

    mean: float
    median: float
    std: float
    percentiles: Mapping[float, float]

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.float64], percentiles: Sequence[float]) -> Distribution:
        """Of any number of values; percentiles are interpolated linearly."""
        array = np.asarray(values, np.float64)
        if not len(array):
            nan = float("nan")
            return cls(nan, nan, nan, dict.fromkeys(percentiles, nan))
        found = np.percentile(array, list(percentiles)).tolist() if percentiles else []
        return cls(
            float(array.mean()),
            float(np.median(array)),
            float(array.std()),
            dict(zip(percentiles, found, strict=True)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run. Rates are per second of `duration`, which is from the start to the end of the last answer."""

    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    wanted_output_tokens: int
    short_outputs: int
    wrong_inputs: int
    max_concurrent_requests: int
    tokens_per_chunk: float
    good: int | None
    latencies: Mapping[str, Distribution]
    lag: Distribution
    cpu_share: float
    errors: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def attainment(self) -> float | None:
        """Share of all requests, also of failed ones, that met every objective; None without objectives."""
        return None if self.good is None else self.good / max(1, self.completed + self.failed)

    @property
    def warnings(self) -> list[str]:
        """What makes the figures doubtful."""
        found = []
        lag = self.lag.percentiles.get(99, 0.0)
        if lag > LAG_WARNING:
            found.append(f"the generator was late: 99 % of the requests were sent within {lag * 1e3:.1f} ms")
        if self.cpu_share > CPU_WARNING:
            found.append(f"the generator used {self.cpu_share:.0%} of a core; the server may be faster")
        if self.interrupted:
            found.append("interrupted: the figures are those of the requests that ended before")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain data. Latencies in milliseconds; what could not be measured is None."""
        duration = max(self.duration, 1e-9)
        total = self.total_input_tokens + self.total_output_tokens
        plain: dict[str, Any] = {
            "duration": self.duration,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "requested_output_tokens": self.wanted_output_tokens,
            "requests_with_fewer_output_tokens": self.short_outputs,
            "requests_with_other_input_tokens": self.wrong_inputs,
            "request_throughput": self.completed / duration,
            "output_throughput": self.total_output_tokens / duration,
            "total_token_throughput": total / duration,
            "max_concurrent_requests": self.max_concurrent_requests,
            "tokens_per_chunk": _number(self.tokens_per_chunk),
        }
        if self.good is not None:
            plain["request_goodput"] = self.good / duration
            plain["goodput_attainment"] = self.attainment
        for name, values in (*self.latencies.items(), ("lag", self.lag)):
            plain |= {
                f"mean_{name}_ms": _number(values.mean * 1e3),
                f"median_{name}_ms": _number(values.median * 1e3),
                f"std_{name}_ms": _number(values.std * 1e3),
            }
            plain |= {f"p{p:g}_{name}_ms": _number(v * 1e3) for p, v in values.percentiles.items()}
        plain["generator_cpu_share"] = self.cpu_share
        plain["errors"] = {
            name: {"count": count, "example": text} for name, (count, text) in self.errors.items()
        }
        plain["interrupted"] = self.interrupted
        return plain


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def trimmed(records: Sequence[Record], share: float) -> list[Record]:
    """The requests that arrived in the middle of a run: without `share` of the time of arrivals at each end."""
    if not records or share <= 0:
        return list(records)
    times = [record.arrival for record in records]
    start, end = min(times), max(times)
    cut = (end - start) * share
    return [record for record in records if start + cut <= record.arrival <= end - cut]


def peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests that were in flight at once; one that ends when another begins is not counted with it."""
    changes = sorted(
        change
        for record in records
        if record.sent >= 0 and record.ended >= 0
        for change in ((record.sent, 1), (record.ended, -1))
    )
    now = most = 0
    for _, step in changes:
        now += step
        most = max(most, now)
    return most


def summarize(
    run: Run,
    *,
    percentiles: Sequence[float] = (50, 90, 99),
    objectives: Mapping[str, float] | None = None,
    trim: float = 0.0,
) -> Report:
    """Figures of a run. With `trim`, latencies, goodput and errors are those of the middle (`trimmed`), and
    rates those of the time in which the middle arrived."""
    records = trimmed(run.records, trim)
    good = [record for record in records if record.ok]
    seconds = run.seconds
    if trim > 0 and records:
        times = [record.arrival for record in run.records]
        seconds = (max(times) - min(times)) * (1 - 2 * trim) or run.seconds
    gaps = np.concatenate([np.frombuffer(record.gaps) for record in good]) if good else np.zeros(0)
    several = [record for record in good if record.output_tokens > 1]
    chunks = len(gaps) + len(good)
    output = sum(record.output_tokens for record in good)
    errors = Counter(record.error for record in records if record.error)
    examples = {record.error: record.detail for record in reversed(records) if record.error}
    return Report(
        duration=seconds,
        completed=len(good),
        failed=len(records) - len(good),
        total_input_tokens=sum(_input(record) for record in good),
        total_output_tokens=output,
        wanted_output_tokens=sum(record.wanted_output for record in good),
        short_outputs=sum(record.output_tokens < record.wanted_output for record in good),
        wrong_inputs=sum(0 <= record.input_tokens != record.wanted_input > 0 for record in good),
        max_concurrent_requests=peak_concurrency(records),
        tokens_per_chunk=output / chunks if chunks else float("nan"),
        good=sum(meets(record, objectives) for record in records) if objectives else None,
        latencies={
            "ttft": Distribution.of([record.ttft for record in good], percentiles),
            "tpot": Distribution.of([record.tpot for record in several], percentiles),
            "itl": Distribution.of(gaps, percentiles),
            "e2el": Distribution.of([record.e2el for record in good], percentiles),
        },
        lag=Distribution.of([record.lag for record in records], sorted({*percentiles, 99})),
        cpu_share=run.cpu_share,
        errors={name: (count, examples[name]) for name, count in errors.most_common()},
        interrupted=run.interrupted,
    )


def _input(record: Record) -> int:
    """Tokens of the prompt: what the server counted, or else what was asked for."""
    return record.input_tokens if record.input_tokens >= 0 else record.wanted_input
