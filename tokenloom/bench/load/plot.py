"""Figures of a run and of a sweep as PNG (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenloom.bench.load.records import Record
from tokenloom.bench.load.sweep import Probe
from tokenloom.errors import InvalidParameter

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> Figure:
    # Without pyplot: no window system, no state that outlives the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise InvalidParameter("--plot", str(path), f"a file that can be written ({error})") from None


def _cdf(axes: Any, values: Sequence[float] | np.ndarray, name: str) -> None:
    ordered = np.sort(np.asarray(values, np.float64)) * 1e3
    if len(ordered) > 5000:
        # More points than the picture has pixels only make the file large.
        ordered = np.quantile(ordered, np.linspace(0, 1, 5000))
    if len(ordered):
        axes.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), drawstyle="steps-post")
        if ordered[0] > 0 and ordered[-1] > 20 * ordered[0]:
            axes.set_xscale("log")
    axes.set(title=name, xlabel="ms", ylabel="share at most", ylim=(0, 1.02))
    axes.grid(alpha=0.3)


def plot_run(records: Sequence[Record], path: Path) -> None:
    """CDFs of TTFT, ITL and end-to-end latency, and a timeline of requests in flight and tokens per second.

    Raises `InvalidParameter` if the file cannot be written.
    """
    good = [record for record in records if record.ok]
    figure = _figure(12, 7)
    grid = figure.add_gridspec(2, 3)
    _cdf(figure.add_subplot(grid[0, 0]), [record.ttft for record in good], "time to first token")
    gaps = np.concatenate([np.frombuffer(record.gaps) for record in good]) if good else np.zeros(0)
    _cdf(figure.add_subplot(grid[0, 1]), gaps, "inter-token latency")
    _cdf(figure.add_subplot(grid[0, 2]), [record.e2el for record in good], "end-to-end latency")
    _timeline(figure.add_subplot(grid[1, :]), good)
    _save(figure, path)


def _timeline(axes: Any, good: Sequence[Record]) -> None:
    axes.set(xlabel="seconds since the start", ylabel="requests in flight")
    axes.grid(alpha=0.3)
    if not good:
        return
    changes = sorted(change for record in good for change in ((record.sent, 1), (record.ended, -1)))
    times = np.array([time for time, _ in changes])
    axes.step(times, np.cumsum([step for _, step in changes]), where="post", color="tab:blue")
    tokens = np.concatenate([record.first + np.cumsum([0.0, *record.gaps]) for record in good])
    counts, edges = np.histogram(tokens, bins=np.linspace(0, max(times[-1], 1e-3), 101))
    rate = axes.twinx()
    rate.step(edges[:-1], counts / np.diff(edges), where="post", color="tab:orange", alpha=0.7)
    rate.set_ylabel("chunks with tokens per second", color="tab:orange")
    rate.set_ylim(bottom=0)
    axes.yaxis.label.set_color("tab:blue")
    axes.set_ylim(bottom=0)


def plot_sweep(probes: Sequence[Probe], variable: str, attainment: float, path: Path) -> None:
    """Attainment and latencies of every probe over the load. Raises `InvalidParameter` as `plot_run`."""
    ordered = sorted(probes, key=lambda probe: probe.load)
    loads = [probe.load for probe in ordered]
    figure = _figure(9, 7)
    shares, latencies = figure.subplots(2, 1, sharex=True)
    shares.plot(loads, [probe.attainment for probe in ordered], "o-")
    shares.axhline(attainment, color="tab:red", linestyle="--")
    shares.set(ylabel="share that met the objectives", ylim=(-0.02, 1.02))
    for name in ("ttft", "tpot"):
        values = [probe.report.latencies[name].percentiles.get(99, np.nan) * 1e3 for probe in ordered]
        latencies.plot(loads, values, "o-", label=f"p99 {name}")
    latencies.set(xlabel=variable, ylabel="ms", yscale="log")
    latencies.legend()
    for axes in (shares, latencies):
        axes.grid(alpha=0.3)
    _save(figure, path)
