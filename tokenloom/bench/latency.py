"""What a client sees, from the timestamps of its tokens: TTFT, time between tokens, scheduling delay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class RequestTrace:
    """Times of one request in seconds: arrival, first scheduled, and each output token."""

    arrival: float
    scheduled: float = -1.0
    token_times: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Percentiles over requests (TTFT, scheduling delay) and over all gaps between tokens (TBT), in seconds."""

    num_requests: int
    ttft_p50: float
    ttft_p99: float
    tbt_p50: float
    tbt_p99: float
    delay_p50: float
    delay_p99: float


def summarize(traces: Sequence[RequestTrace]) -> LatencySummary:
    """Percentiles of finished requests; NaN where there is nothing to measure."""
    done = [trace for trace in traces if trace.token_times]
    ttft = [trace.token_times[0] - trace.arrival for trace in done]
    delay = [trace.scheduled - trace.arrival for trace in done]
    gaps = np.concatenate([np.diff(trace.token_times) for trace in done]) if done else np.zeros(0)
    return LatencySummary(
        len(done),
        *_percentiles(ttft),
        *_percentiles(gaps),
        *_percentiles(delay),
    )


def _percentiles(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    if len(values) == 0:
        return (float("nan"), float("nan"))
    p50, p99 = np.percentile(values, [50, 99])
    return (float(p50), float(p99))
