"""One process that loads one engine, measures workloads with it, and reports each as a line of JSON.

run.py starts it in the engine's own environment with a specification (JSON) as its only argument. The lines go
to what was standard output at the start; whatever the engine prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import Any, TextIO

import machine
import workloads
from backends import Backend, Engine
from workloads import Generator, Request


def take_stdout() -> TextIO:
    """Keep standard output for the report and send everything else to standard error."""
    report = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return report


def short(error: Exception) -> str:
    """An error on one line; the log has all of it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class WrongLength(RuntimeError):
    """An engine gave another number of tokens than it was asked for."""


class Harness:
    """The engine and what is measured around its calls."""

    def __init__(self, spec: dict[str, Any], backend: Backend) -> None:
        self._spec = spec
        self._backend = backend
        self._served: list[dict[str, Any]] = []

    def timed(self, requests: list[Request]) -> float:
        """Serve the requests, check the lengths, keep the tokens; the seconds it took."""
        started = time.perf_counter()
        outputs = self._backend.generate(requests)
        seconds = time.perf_counter() - started
        lengths = [len(output) for output in outputs]
        wanted = [request.num_output for request in requests]
        if lengths != wanted:
            raise WrongLength(f"{lengths[:40]} tokens came out, {wanted[:40]} were asked for")
        prompts = zlib.crc32(json.dumps([request.prompt for request in requests]).encode())
        self._served.append({"prompts_crc32": prompts, "token_ids": outputs})
        return seconds

    def warm_up(self) -> None:
        """Let the engine allocate and compile what it does lazily."""
        make = Generator("warm-up", self._spec["highest_id"])
        self.timed(make.equal(2, 64, 8))
        self.timed(make.equal(1, 64 if self._spec["scale"] == "quick" else 512 // self._spec["divisor"], 4))

    def measure(self, name: str) -> dict[str, Any]:
        """Measure a workload until a measurement was undisturbed, a bounded number of times."""
        spec = self._spec
        scale = workloads.QUICK if spec["scale"] == "quick" else workloads.Scale(divisor=spec["divisor"])
        rejected = 0
        while True:
            machine.wait_until_quiet(spec["max_other"], spec["patience_s"])
            machine.reset_peaks(os.getpid())
            self._served.clear()
            make = Generator(f"{name}/{spec['round']}/{rejected}", spec["highest_id"])
            load = machine.OtherLoad()
            result = workloads.measure(name, make, self.timed, scale=scale, repeats=spec["repeats"])
            result["other_cores"] = round(load.cores(), 3)
            quiet = result["other_cores"] <= spec["max_other"]
            if quiet or rejected >= spec["attempts"] - 1:
                memory = machine.tree_memory(os.getpid())
                self._write_tokens(name)
                return {**result, "quiet": quiet, "rejected": rejected + (not quiet), **memory._asdict()}
            rejected += 1

    def _write_tokens(self, name: str) -> None:
        """The output token ids, one line for each call, so that anyone can compare engines."""
        path = Path(self._spec["tokens"].replace("WORKLOAD", name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as lines:
            for served in self._served:
                print(json.dumps(served, separators=(",", ":")), file=lines)


def start_up(spec: dict[str, Any]) -> tuple[Harness, Backend, dict[str, Any]]:
    """Load the engine and serve one token; the time and the memory that took."""
    engine = Engine(spec["model"], spec["precision"], spec["threads"], spec["options"])
    backend: Backend = importlib.import_module(f"backends.{spec['backend']}").Backend(engine)
    loaded = machine.seconds_since_process_start()
    harness = Harness(spec, backend)
    harness.timed(Generator("first", spec["highest_id"]).equal(1, 16, 1))
    seconds = machine.seconds_since_process_start()
    other_seconds = machine.busy_seconds() - spec["busy_at_start"] - machine.tree_seconds(os.getpid())
    other = round(machine.cores_of(other_seconds, seconds), 3)
    result = {"seconds": seconds, "load_seconds": loaded, "other_cores": other}
    result |= {"quiet": other <= spec["max_other"], "versions": backend.versions()}
    return harness, backend, result | machine.tree_memory(os.getpid())._asdict()


def main() -> None:
    spec = json.loads(sys.argv[1])
    report = take_stdout()

    def say(workload: str, content: dict[str, Any]) -> None:
        print(json.dumps({"workload": workload, **content}), file=report, flush=True)

    try:
        harness, backend, result = start_up(spec)
    except Exception as error:
        traceback.print_exc()
        say("startup", {"error": short(error)})
        sys.exit(1)
    say("startup", result)
    try:
        if spec["workloads"]:
            harness.warm_up()
        for name in spec["workloads"]:
            try:
                say(name, harness.measure(name))
            except (WrongLength, ValueError) as error:  # the engine lives on, so the next workload may do
                traceback.print_exc()
                say(name, {"error": short(error)})
    except Exception as error:
        traceback.print_exc()
        say("", {"error": short(error)})
        os._exit(1)
    say("", {})
    backend.close()


if __name__ == "__main__":
    main()
