"""A report for people (a table) and for machines (JSON, under vLLM's names)."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from rich.table import Table
from rich.text import Text

from tokenloom.bench.load.metrics import Report
from tokenloom.bench.load.objectives import METRICS
from tokenloom.bench.load.records import Record
from tokenloom.bench.load.runner import Run


def counts_table(report: Report) -> Table:
    """Counts and rates."""
    plain = report.as_dict()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows: list[tuple[str, str]] = [
        ("duration, s", f"{report.duration:,.2f}"),
        ("requests completed", f"{report.completed:,}"),
        ("requests failed", f"{report.failed:,}"),
        ("input tokens", f"{report.total_input_tokens:,}"),
        ("output tokens (asked for)", f"{report.total_output_tokens:,} ({report.wanted_output_tokens:,})"),
        ("requests/s", f"{plain['request_throughput']:,.2f}"),
        ("output tokens/s", f"{plain['output_throughput']:,.1f}"),
        ("input and output tokens/s", f"{plain['total_token_throughput']:,.1f}"),
        ("most requests in flight", f"{report.max_concurrent_requests:,}"),
        ("tokens per chunk", f"{report.tokens_per_chunk:.2f}" if report.completed else "–"),
    ]
    if report.good is not None:
        rows.append(("goodput, requests/s", f"{plain['request_goodput']:,.2f} ({report.attainment:.1%} met)"))
    if report.short_outputs:
        rows.append(("answers shorter than asked for", f"{report.short_outputs:,}"))
    if report.wrong_inputs:
        rows.append(("prompts of another length than asked for", f"{report.wrong_inputs:,}"))
    rows.append(("generator's CPU", f"{report.cpu_share:.0%} of a core"))
    for name, text in rows:
        table.add_row(name, text)
    return table


def latency_table(report: Report, metrics: Sequence[str] = tuple(METRICS)) -> Table:
    """Latencies in milliseconds: the `metrics`, and by how much requests were sent late."""
    table = Table(box=None, pad_edge=False)
    table.add_column("ms")
    for name in ("mean", "median", "std", *(f"p{p:g}" for p in report.latencies["ttft"].percentiles)):
        table.add_column(name, justify="right")
    names = {name: f"{METRICS[name]} ({name})" for name in metrics}
    shown = {names[name]: report.latencies[name] for name in metrics} | {"sent late by (lag)": report.lag}
    for name, values in shown.items():
        wanted = [values.percentiles[p] for p in report.latencies["ttft"].percentiles]
        table.add_row(name, *map(milliseconds, (values.mean, values.median, values.std, *wanted)))
    return table


def milliseconds(seconds: float) -> str:
    """As tables show it; a dash for what could not be measured."""
    return f"{seconds * 1e3:,.2f}" if isfinite(seconds) else "–"


def error_table(report: Report) -> Table | None:
    """Failed requests by error, with an example of each; None if there were none."""
    if not report.errors:
        return None
    table = Table(box=None, pad_edge=False)
    table.add_column("error")
    table.add_column("requests", justify="right")
    table.add_column("for example", overflow="fold")
    for name, (count, text) in report.errors.items():
        table.add_row(name, f"{count:,}", Text(text))
    return table


def details(run: Run) -> dict[str, list[Any]]:
    """What each request saw, as `vllm bench serve --save-detailed` writes it: seconds, tokens and errors."""
    records = run.records
    return {
        "input_lens": [record.input_tokens for record in records],
        "output_lens": [max(0, record.output_tokens) for record in records],
        "start_times": [record.due for record in records],
        "ttfts": [_seconds(record, record.ttft) for record in records],
        "e2els": [_seconds(record, record.e2el) for record in records],
        "itls": [record.gaps.tolist() for record in records],
        "lags": [record.lag for record in records],
        "errors": [f"{record.error}: {record.detail}" if record.error else "" for record in records],
    }


def _seconds(record: Record, value: float) -> float | None:
    return value if record.first >= 0 else None
