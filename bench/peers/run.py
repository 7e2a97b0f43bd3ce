"""Measure tokenloom beside the peer engines, in alternating rounds, and print medians and ratios.

    python bench/peers/run.py --model M --precision bf16,int8,int4 --rounds 3 --results DIR [--json]
    python bench/peers/run.py --model DIR --peers none --workload decode1,decode8      (tokenloom alone)

Each engine is a process of its own in each round. A measurement during which something else used the CPU is
rejected and repeated. Finished measurements are kept in the directory of results, and a second start with the
same directory goes on where the first one was stopped. install.py makes what the peers need.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import machine
import report
import variants
import workloads
from store import Key, Record, Store
from variants import OURS, Variant

GRACE_S = 30.0
"""Left to an engine to end by itself."""


class Worker:
    """A worker.py process and the lines it reports."""

    def __init__(self, variant: Variant, spec: dict[str, Any], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", encoding="utf-8")
        spec |= {"busy_at_start": machine.busy_seconds()}
        self._process = subprocess.Popen(
            [str(variant.python), str(variants.HERE / "worker.py"), json.dumps(spec)],
            env={k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | variant.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # so that its children can be ended with it
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def next(self, timeout_s: float) -> Record:
        """The next report; one with an error if the process died or said nothing for `timeout_s`."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return {"workload": "", "error": f"no result within {timeout_s:.0f} s"}
        if line is None:
            return {"workload": "", "error": "the process died; its log says more"}
        content: Record = json.loads(line)
        return content

    def stop(self, grace_s: float = 0.0) -> None:
        """End the process and everything it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s or 0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


class Run:
    """One start of the benchmark."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = variants.find_model(args.model)
        self.name = self.model.name
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        self.highest_id = min(workloads.HIGHEST_ID, config["vocab_size"] - 1)
        # Small models read less: prompts and outputs of the long workloads are cut to what fits.
        self.divisor = -(-workloads.LONGEST // min(workloads.LONGEST, config["max_position_embeddings"]))
        self.store = Store(args.results / "measurements.jsonl")
        self.setting = {
            "model": self.name,
            "scale": "quick" if args.quick else "full",
            "threads": args.threads,
        }
        self.skipped: dict[str, str] = {}

    def key(self, engine: str, precision: str, workload: str, number: int) -> Key:
        return Key(**self.setting, precision=precision, engine=engine, workload=workload, round=number)

    def rounds(self) -> None:
        """Measure everything that is not measured yet."""
        engines = [OURS, *self.args.peers] if not self.args.without_ours else list(self.args.peers)
        for number in range(1, self.args.rounds + 1):
            if self.args.ruler:
                self.measure_ruler(number)
            # Another engine begins each round, so that none always runs on a machine in the same state.
            turn = (number - 1) % len(engines)
            for precision in self.args.precision:
                for engine in engines[turn:] + engines[:turn]:
                    self.measure_engine(engine, precision, number)

    def measure_engine(self, engine: str, precision: str, number: int) -> None:
        """Start an engine for what a round still wants of it."""
        wanted = [
            name
            for name in self.args.workload
            if not self.store.has(self.key(engine, precision, name, number))
        ]
        if not wanted:
            return
        options = self.args.option if engine == OURS else None
        variant = variants.make_variant(engine, precision, self.model, self.args.threads, options)
        reason = "no such precision" if variant is None else variant.missing
        if variant is None or reason:
            if self.skipped.setdefault(f"{engine} {precision}", reason) is reason:
                say(f"skipped: {engine} {precision}: {reason}")
            return
        say(f"round {number}: {engine} {precision}: {', '.join(wanted)}")
        self.run_worker(variant, wanted, number)

    def run_worker(self, variant: Variant, wanted: list[str], number: int) -> None:
        """One process for all `wanted` workloads; several if its start was disturbed and is to be measured."""
        log = self.args.results / "logs" / f"{self.name}-{variant.precision}-{variant.engine}-{number}.log"
        spec = self.specification(variant, [name for name in wanted if name != "startup"], number)
        for attempt in range(self.args.attempts):
            machine.wait_until_quiet(self.args.max_other, self.args.patience)
            worker = Worker(variant, spec, log)
            try:
                started = worker.next(self.args.timeout)
                disturbed = not started.get("quiet", True) and attempt < self.args.attempts - 1
                if "startup" in wanted and disturbed:
                    continue
                rejected = attempt + (not started.get("quiet", True))
                if "error" in started:
                    self.keep(variant, number, started | {"workload": wanted[0]})
                    return
                if "startup" in wanted:
                    self.keep(variant, number, started | {"rejected": rejected})
                self.follow(worker, variant, spec["workloads"], started["versions"], number)
                return
            finally:
                worker.stop()

    def follow(
        self, worker: Worker, variant: Variant, names: list[str], versions: dict[str, str], number: int
    ) -> None:
        """Keep what a worker reports on the workloads `names`, which it measures in this order."""
        for name in names:
            content = worker.next(self.args.timeout)
            self.keep(variant, number, content | {"workload": name, "versions": versions})
            if content["workload"] != name:  # it died or hangs
                return
        worker.next(GRACE_S)
        worker.stop(GRACE_S)

    def specification(self, variant: Variant, names: list[str], number: int) -> dict[str, Any]:
        """What worker.py is told."""
        args = self.args
        tokens = report.token_file(
            args.results, self.name, variant.engine, variant.precision, number, "WORKLOAD"
        )
        return {
            "backend": variant.backend,
            "model": str(variant.model),
            "precision": variant.precision,
            "threads": args.threads,
            "options": variant.options,
            "workloads": names,
            "round": number,
            "scale": self.setting["scale"],
            "repeats": args.repeats,
            "highest_id": self.highest_id,
            "divisor": self.divisor,
            "max_other": args.max_other,
            "attempts": args.attempts,
            "patience_s": args.patience,
            "tokens": str(tokens),
        }

    def keep(self, variant: Variant, number: int, content: Record) -> None:
        """Store a result and say it."""
        name = content["workload"]
        self.store.add(self.key(variant.engine, variant.precision, name, number), content)
        if "error" in content:
            say(f"  {name}: error: {content['error']}")
            return
        metric = workloads.metric_of(name)
        note = "" if content["quiet"] else f"  (rejected: others used {content['other_cores']:.2f} cores)"
        say(f"  {name}: {content[metric.key]:.2f} {metric.unit}, {content['peak_mb']:.0f} MiB{note}")

    def measure_ruler(self, number: int) -> None:
        """What the machine can do, by ruler.py, in an interpreter that has torch."""
        key = self.key("ruler", "", "ruler", number)
        if self.store.has(key):
            return
        python = variants.environment("transformers") / "bin" / "python"
        command = [str(python if python.exists() else sys.executable), str(variants.HERE / "ruler.py")]
        command += [str(self.model), str(self.args.threads)]
        say(f"round {number}: ruler")
        for attempt in range(self.args.attempts):
            machine.wait_until_quiet(self.args.max_other, self.args.patience)
            env = os.environ | {"OMP_NUM_THREADS": str(self.args.threads)}
            shown = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if shown.returncode != 0:
                say(f"  error: {shown.stderr.strip().splitlines()[-1:]}")
                self.store.add(key, {"error": shown.stderr[-500:]})
                return
            content: Record = json.loads(shown.stdout.splitlines()[-1])
            content["quiet"] = content["other_cores"] <= self.args.max_other
            if content["quiet"] or attempt == self.args.attempts - 1:
                self.store.add(key, content | {"rejected": attempt + (not content["quiet"])})
                say(f"  memory read bandwidth: {content['read_gb_s']:.1f} GB/s")
                return

    def summary(self) -> dict[str, Any]:
        """Everything that is known by now."""
        setting = {**self.setting, "machine": machine.describe(), "skipped": self.skipped}
        return report.summarise(
            self.store.all(), setting=setting, results=self.args.results, model=self.model
        )


def say(text: str) -> None:
    """Progress goes to standard error; standard output is for the result."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="M", help="S, M, L, E or the directory of a checkpoint (default M)")
    add("--precision", type=_list_of(variants.PRECISIONS), default=["bf16"], help="bf16,int8,int4 (bf16)")
    add("--workload", type=_workloads, default=list(workloads.DEFAULT), help=",".join(workloads.DEFAULT))
    peers = (*variants.PEERS, *variants.MORE_PEERS)
    add("--peers", type=_list_of(peers), default=list(variants.PEERS), help=f"none or {','.join(peers)}")
    add("--without-ours", action="store_true", help="measure the peers only")
    add("--rounds", type=int, default=3)
    add("--results", type=Path, default=variants.HERE / "results", help="directory of the results")
    add("--threads", type=int, default=2)
    add("--repeats", type=int, default=0, help="repeats in a round; 0 takes each workload's own number")
    add("--max-other", type=float, default=0.1, help="cores that others may use during a measurement (0.1)")
    add("--attempts", type=int, default=4, help="tries at a measurement until it is undisturbed (4)")
    add(
        "--patience",
        type=float,
        default=60.0,
        help="seconds to wait for a quiet machine before each try (60)",
    )
    add("--timeout", type=float, default=1800.0, help="seconds to wait for one result (1800)")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="more options of tokenloom's LLM")
    add("--weight-cache", default="", help="directory for tokenloom's packed weights")
    add("--no-ruler", dest="ruler", action="store_false", help="leave out bandwidth and matrix products")
    add("--quick", action="store_true", help="tiny workloads, to try out the harness")
    add("--report-only", action="store_true", help="measure nothing, print what the results hold")
    add(
        "--json", action="store_true", help="print the result as one JSON object, the table to standard error"
    )
    args = parser.parse_args()
    args.results = args.results.resolve()
    args.option = dict(map(_option, args.option))
    if args.weight_cache:
        args.option["weight_cache"] = str(Path(args.weight_cache).resolve())
    return args


def _list_of(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = [] if text == "none" else text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return parse


def _workloads(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        try:
            workloads.parse(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    args = parse_arguments()
    run = Run(args)
    args.results.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no engine is left behind
    try:
        if not args.report_only:
            run.rounds()
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
    summary = run.summary()
    text = report.table(summary)
    (args.results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (args.results / "summary.txt").write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text, file=sys.stderr, flush=True)
        print(json.dumps(summary))
    else:
        print(text)


if __name__ == "__main__":
    main()
