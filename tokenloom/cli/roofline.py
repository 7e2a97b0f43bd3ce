"""`tokenloom bench roofline`: each op and each step against the limits of this machine."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from tokenloom.bench.roofline import Limits, StepReport, measure, measure_limits, native_backend
from tokenloom.cli.local import load
from tokenloom.config import Config
from tokenloom.errors import UnsupportedFeature
from tokenloom.runtime.local import LocalExecutor
from tokenloom.serving.assembly import choose_ops
from tokenloom.serving.threads import num_threads


def run(config: Config, as_json: bool) -> None:
    """Measure and print."""
    ops = choose_ops(config)
    if ops.kernels != "native":
        reason = f"it measures the native kernels, and the numpy reference would compute ({ops.reason})"
        raise UnsupportedFeature("a roofline", reason)
    limits = measure_limits(num_threads(config.runtime.threads), ops.isa)
    engine = load(config).engine
    try:
        executor = engine.executor
        if not isinstance(executor, LocalExecutor):
            raise UnsupportedFeature("a roofline of another executor", "it measures the local one")
        reports = measure(native_backend(executor.backend), limits, max_context=engine.max_context)
    finally:
        engine.close()
    _show(limits, reports)
    if as_json:
        print(
            json.dumps(
                {
                    "bandwidth": limits.bandwidth,
                    "peaks": limits.peaks,
                    "threads": limits.threads,
                    "steps": [report.as_dict() for report in reports],
                }
            )
        )


def _show(limits: Limits, reports: list[StepReport]) -> None:
    console = Console()
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in limits.peaks.items())
    console.print(
        f"{limits.threads} threads: memory {limits.bandwidth / 1e9:.1f} GB/s; registers {peaks} Gop/s"
    )
    for report in reports:
        table = Table(box=None, pad_edge=False, title_justify="left")
        table.title = f"{report.case}: {report.seconds * 1e3:.3f} ms, {report.fraction:.2f} of the limit"
        for name in ("op", "ms", "GB/s", "Gop/s", "of limit"):
            table.add_column(name, justify="left" if name == "op" else "right")
        for op in report.ops:
            rates = (
                (f"{op.bytes / op.seconds / 1e9:.1f}", f"{op.operations / op.seconds / 1e9:.0f}")
                if op.bytes and op.seconds
                else ("", "")
            )
            fraction = f"{op.fraction:.2f}" if op.bytes else ""
            table.add_row(op.op, f"{op.seconds * 1e3:.3f}", *rates, fraction)
        console.print(table)
