"""`tokenloom bench serve` and `tokenloom bench sweep`: load on a server, and what its clients saw."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import ceil, inf
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tokenloom.bench.load.metrics import Report, summarize
from tokenloom.bench.load.options import LoadOptions, SweepOptions, pairs
from tokenloom.bench.load.report import milliseconds
from tokenloom.errors import InvalidParameter, UnsupportedFeature

INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where results go besides the terminal."""

    save_result: bool = False
    save_detailed: bool = False
    result_dir: str = ""
    result_filename: str = ""
    metadata: tuple[str, ...] = ()
    label: str = ""
    plot: Path | None = None
    as_json: bool = False
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        pairs("--metadata", self.metadata)
        if not self.save_result:
            for name in ("save_detailed", "result_dir", "result_filename"):
                if getattr(self, name):
                    option = "--" + name.replace("_", "-")
                    raise InvalidParameter(option, getattr(self, name), "given together with --save-result")
        # Found out before an hour of load, not after it.
        if "/" in self.label and not self.result_filename:
            raise InvalidParameter("--label", self.label, "without a slash: it begins the name of the file")
        if Path(self.result_filename).name != self.result_filename:
            raise InvalidParameter("--result-filename", self.result_filename, "a name, in --result-dir")
        for path, option in ((self.plot, "--plot"), (self._named, "--result-filename")):
            if path is not None and path.is_dir():
                raise InvalidParameter(option, str(path), "a file, not a directory")
        folders = [] if self.plot is None else [(self.plot.parent, "--plot")]
        if self.save_result:
            folders.append((Path(self.result_dir or "."), "--result-dir"))
        for folder, option in folders:
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                raise InvalidParameter(option, str(folder), "in a directory that can be written to")

    @property
    def _named(self) -> Path | None:
        return Path(self.result_dir or ".") / self.result_filename if self.result_filename else None


def need(module: str, what: str) -> None:
    """Raise `UnsupportedFeature` naming the extra if a module is not installed."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        raise UnsupportedFeature(what, f"{module} is not installed: pip install 'tokenloom[bench]'") from None


def serve(options: LoadOptions, output: Output) -> None:
    """Run the load once, print and save what came of it. Exit code 1 if no request was answered."""
    _check_modules(output)
    from tokenloom.bench.load.assembly import make_target, make_workload
    from tokenloom.bench.load.benchmark import run_benchmark
    from tokenloom.bench.load.plot import plot_run
    from tokenloom.bench.load.report import counts_table, details, error_table, latency_table
    from tokenloom.bench.load.runner import run_async
    from tokenloom.bench.load.workload import count_turns

    workload = make_workload(options)
    model, vocabulary = _ask_server(options, workload.sessions)
    console = Console(stderr=True)
    if workload.left_out:
        console.print(f"{workload.left_out} requests are longer than --max-request-tokens and left out")
    with _progress(console, count_turns(workload.sessions), output.disable_tqdm) as advance:
        run = run_async(
            run_benchmark(
                make_target(options, model),
                workload.sessions,
                vocabulary,
                seed=options.seed,
                num_warmups=options.num_warmups,
                max_concurrency=options.max_concurrency,
                duration=options.duration,
                ready_timeout=options.ready_check_timeout_sec,
                on_done=lambda record: advance(),
            )
        )
    report = summarize(run, percentiles=options.percentiles, objectives=options.objectives)
    shown = Console()
    shown.print(counts_table(report))
    shown.print()
    shown.print(latency_table(report, options.metrics))
    errors = error_table(report)
    if errors is not None:
        shown.print()
        shown.print(errors)
    _warn(report)
    if output.plot is not None:
        plot_run(run.records, output.plot)
    settings = _settings(options, output, model)
    settings |= {"workload": workload.format, "requests_left_out": workload.left_out}
    _finish(options, output, settings | report.as_dict(), details(run) if output.save_detailed else {})
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not report.completed:
        raise typer.Exit(1)


def sweep(options: LoadOptions, search: SweepOptions, output: Output) -> None:
    """Look for the highest load that meets the objectives. Exit code 1 if none was found."""
    _check_sweep(options, output)
    _check_modules(output)
    from tokenloom.bench.load.assembly import make_target, make_workload
    from tokenloom.bench.load.benchmark import run_benchmark
    from tokenloom.bench.load.plot import plot_sweep
    from tokenloom.bench.load.runner import run_async
    from tokenloom.bench.load.sweep import Probe, find_load

    first = make_workload(options)
    if first.format == "coding-agent":
        reason = "in a closed loop there is no rate to raise; run `bench serve` with more or fewer sessions"
        raise UnsupportedFeature("a sweep over sessions of a coding-agent trace", reason)
    by_speed = bool(options.trace)
    variable = "speed" if by_speed else "requests/s"
    model, vocabulary = _ask_server(options, first.sessions)
    target = make_target(options, model)
    console = Console(stderr=True)

    async def measure(load: float, number: int) -> Report:
        # Another seed for each probe: the prompts of the one before may lie in a prefix cache.
        probe = replace(options, seed=options.seed + number)
        if by_speed:
            probe = replace(probe, speed=load)
        else:
            count = max(search.min_requests, ceil(load * search.probe_seconds))
            probe = replace(probe, request_rate=load, num_prompts=min(count, options.num_prompts))
        sessions = make_workload(probe).sessions
        if not by_speed and len(sessions) < count:
            lasts = f"a probe at {load:,.3f} requests/s lasts only {len(sessions) / load:,.1f} s"
            console.print(f"warning: {lasts}: it has {len(sessions)} requests, see --num-prompts")
        run = await run_benchmark(
            target,
            sessions,
            vocabulary,
            seed=probe.seed,
            num_warmups=probe.num_warmups,
            max_concurrency=probe.max_concurrency,
            duration=probe.duration,
            ready_timeout=probe.ready_check_timeout_sec,
        )
        return summarize(run, percentiles=probe.percentiles, objectives=probe.objectives, trim=search.trim)

    def tell(probe: Probe) -> None:
        if not output.disable_tqdm:
            console.print(f"{probe.load:,.3f} {variable}: {probe.attainment:.1%} met")

    found = run_async(
        find_load(
            measure,
            start=search.start,
            attainment=search.attainment,
            tolerance=search.tolerance,
            max_probes=search.max_probes,
            on_probe=tell,
        )
    )
    Console().print(_probe_table(found.probes, variable, search.attainment))
    held = f"highest load seen to hold: {found.best:,.3f} {variable}" if found.best else "no load held"
    above = "" if found.failing == inf else f"; lowest that did not: {found.failing:,.3f}"
    print(held + above + ("" if found.converged else " (not within the tolerance)"))
    if output.plot is not None:
        plot_sweep(found.probes, variable, search.attainment, output.plot)
    settings = _settings(options, output, model) | {
        "variable": variable,
        "attainment": search.attainment,
        "best": found.best,
        "failing": None if found.failing == inf else found.failing,
        "converged": found.converged,
        "probes": [{"load": probe.load, **probe.report.as_dict()} for probe in found.probes],
    }
    _finish(options, output, settings, {})
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not found.best:
        raise typer.Exit(1)


def _check_sweep(options: LoadOptions, output: Output) -> None:
    """Raise `InvalidParameter` for options that make no sense where the load is looked for."""
    if not options.objectives:
        raise InvalidParameter("--goodput", "nothing", "given: it says what the highest load has to meet")
    if options.request_rate is not None:
        raise InvalidParameter("--request-rate", options.request_rate, "left out: it is what is looked for")
    if options.speed != 1:
        raise InvalidParameter("--speed", options.speed, "left out: it is what is looked for")
    if output.save_detailed:
        raise InvalidParameter("--save-detailed", True, "left out: a sweep saves figures only")


def _check_modules(output: Output) -> None:
    need("aiohttp", "a load test without aiohttp")
    if output.plot is not None:
        need("matplotlib", "--plot without matplotlib")


def _ask_server(options: LoadOptions, sessions: Any) -> tuple[str, Any]:
    """The model's name, and the vocabulary if prompts have to be made up."""
    from tokenloom.bench.load.assembly import make_vocabulary, needs_vocabulary
    from tokenloom.bench.load.server import Server

    server = Server(options.root, options.headers)
    model = options.model or server.first_model()
    return model, make_vocabulary(options, server, model) if needs_vocabulary(sessions) else None


@contextmanager
def _progress(console: Console, total: int, disabled: bool) -> Iterator[Any]:
    with Progress(console=console, transient=True, disable=disabled or not sys.stderr.isatty()) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda: progress.advance(task)


def _warn(report: Report) -> None:
    for text in report.warnings:
        print(f"warning: {text}", file=sys.stderr)


def _probe_table(probes: Any, variable: str, attainment: float) -> Table:
    table = Table(box=None, pad_edge=False)
    latencies = ("p99 ttft, ms", "p99 tpot, ms", "p99 e2el, ms")
    for name in (
        variable,
        "requests",
        "failed",
        "met",
        "holds",
        "output tokens/s",
        *latencies,
        "p99 lag, ms",
    ):
        table.add_column(name, justify="right")
    for probe in sorted(probes, key=lambda probe: probe.load):
        report = probe.report
        values = [report.latencies[name].percentiles.get(99) for name in ("ttft", "tpot", "e2el")]
        lag = report.lag.percentiles[99]
        table.add_row(
            f"{probe.load:,.3f}",
            f"{report.completed + report.failed:,}",
            f"{report.failed:,}",
            f"{probe.attainment:.1%}",
            "yes" if probe.attainment >= attainment else "no",
            f"{report.total_output_tokens / max(report.duration, 1e-9):,.1f}",
            *("–" if value is None else milliseconds(value) for value in (*values, lag)),
        )
    return table


def _settings(options: LoadOptions, output: Output, model: str) -> dict[str, Any]:
    """What was run, as the JSON says it."""
    rate = options.request_rate
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": options.backend,
        "label": output.label or None,
        "base_url": options.root,
        "model_id": model,
        "tokenizer_id": options.tokenizer or None,
        "num_prompts": options.num_prompts,
        "request_rate": None if rate is None else "inf" if rate == inf else rate,
        "burstiness": "inf" if options.burstiness == inf else options.burstiness,
        "max_concurrency": options.max_concurrency or None,
        "trace": options.trace or None,
        "speed": options.speed,
        "length_scale": options.length_scale,
        "seed": options.seed,
        "goodput": {name: value * 1e3 for name, value in options.objectives.items()},
        **pairs("--metadata", output.metadata),
    }


def _finish(options: LoadOptions, output: Output, found: dict[str, Any], detailed: Mapping[str, Any]) -> None:
    """Save and print the JSON."""
    if output.save_result:
        rate = "trace" if options.trace else f"{options.request_rate or inf:g}qps"
        model = str(found["model_id"]).rstrip("/").rsplit("/", 1)[-1]
        name = (
            output.result_filename or f"{output.label or options.backend}-{rate}-{model}-{found['date']}.json"
        )
        path = Path(output.result_dir or ".") / name
        try:
            path.write_text(json.dumps({**found, **detailed}) + "\n")
        except OSError as error:
            raise InvalidParameter(
                "--result-filename", str(path), f"a file that can be written ({error})"
            ) from None
        print(f"saved {path}", file=sys.stderr)
    if output.as_json:
        print(json.dumps(found))
