"""Part `loading`: what loading adapters does to the steps of those that run meanwhile.

A batch of 32 decodes without a pause. Beside it, in turn: nothing; requests of one token without adapters; adapters
that were packed before are registered and fetched by requests that need them; adapters are packed and registered,
and nobody asks for them; and all of it. Packing happens in a process of low priority, as in a server.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cases
import files
import numpy as np
from cases import Shape, shape_of
from files import AdapterFiles
from rounds import Case, Figures, Referee, Rounds
from serving import Served, model_directory, serving

from tokenloom import SamplingParams
from tokenloom.engine.request import Request
from tokenloom.errors import TokenloomError
from tokenloom.runtime.adapter_host import offer_adapter

ADAPTERS = 100
QUICK_ADAPTERS = 12
SETTLE_STEPS = 8
TURNS = 400
"""Of the cases in which nothing is loaded: about what fetching takes."""
QUICK_TURNS = 60


class Prepared(NamedTuple):
    """A packed adapter: its content id, and the file with it."""

    content_id: str
    image: Path


class Preparer:
    """Runs preparing.py on directories, one after another."""

    def __init__(self, spec: dict[str, Any], served: Served, directories: list[Path]) -> None:
        if served.host is None:
            raise TokenloomError("the executor takes no adapters")
        told = {
            "model": str(model_directory(spec)),
            "work": spec["work"],
            "format": list(served.host.format),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("preparing.py")), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._directories = directories
        self.take(timeout_s=120)

    def start(self) -> None:
        """Hand over all directories."""
        pipe = self._process.stdin
        if pipe is not None:
            pipe.write("".join(json.dumps(str(path)) + "\n" for path in self._directories))
            pipe.flush()

    def take(self, timeout_s: float = 0.0) -> Prepared | None:
        """The next one that is ready, if any. Raises RuntimeError if the process died."""
        try:
            line = self._answers.get(timeout=timeout_s) if timeout_s else self._answers.get_nowait()
        except queue.Empty:
            return None
        if line is None:
            raise RuntimeError("the process that packs adapters died")
        answer = json.loads(line)
        return None if answer == "ready" else Prepared(answer[0], Path(answer[1]))

    def stop(self) -> None:
        """Let it remove its files and end."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=60)

    def _read(self) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                self._answers.put(line)
        self._answers.put(None)


class Loading:
    """A decode batch and what happens beside it."""

    def __init__(self, spec: dict[str, Any], served: Served, directories: list[Path]) -> None:
        self._spec = spec
        self._served = served
        self._engine = served.engine
        self._directories = directories
        self._shape: Shape = shape_of(spec["quick"])
        self._count = 0
        self._offered: list[str] = []
        self.seconds: dict[str, list[float]] = {}
        """Of each turn of the step loop, by case and round."""

    def case(self, *, prepare: bool, register: bool, fetch: bool, arrivals: bool) -> Case:
        """Load every adapter: packed meanwhile with `prepare` (else before); requests with `fetch`. Without
        `register` nothing is loaded, and `arrivals` are requests to the model itself."""

        def run(seed: str) -> Figures:
            with self._preparer(register) as preparer:
                ready: list[Prepared] = []
                if preparer is not None and not prepare:
                    preparer.start()
                    while len(ready) < len(self._directories):
                        found = preparer.take(timeout_s=120)
                        if found is None:
                            raise RuntimeError("an adapter was not packed within 120 s")
                        ready.append(found)
                self._offered.clear()
                try:
                    self._start_batch(seed)
                    if preparer is not None and prepare:
                        preparer.start()
                    seconds = self._load(preparer if prepare else None, ready, register, fetch, arrivals)
                finally:
                    self._engine.reset()
                    for name in self._offered:
                        self._engine.adapters.retire(name)
            self.seconds[seed.rpartition("/")[0]] = seconds
            return {
                "p50_ms": 1e3 * float(np.quantile(seconds, 0.5)),
                "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
                "max_ms": 1e3 * max(seconds),
                "steps": float(len(seconds)),
            }

        return run

    @contextlib.contextmanager
    def _preparer(self, wanted: bool) -> Iterator[Preparer | None]:
        if not wanted:
            yield None
            return
        preparer = Preparer(self._spec, self._served, self._directories)
        try:
            yield preparer
        finally:
            preparer.stop()

    def _start_batch(self, seed: str) -> None:
        """32 sequences that decode until they are cancelled, or the context ends."""
        shape = self._shape
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        for prompt in cases.random_prompts(seed, shape.requests, 16, shape.highest_id):
            self._add(prompt, params, "")
        scheduler = self._engine.scheduler
        while len(scheduler.running) < shape.requests or any(
            seq.num_pending > 1 for seq in scheduler.running
        ):
            self._engine.step()
        for _ in range(SETTLE_STEPS):
            self._engine.step()

    def _add(self, prompt: list[int], params: SamplingParams, adapter: str) -> str:
        self._count += 1
        name = f"loading-{self._count}"
        self._engine.add_request(
            Request(request_id=name, prompt_token_ids=prompt, params=params, adapter=adapter)
        )
        return name

    def _load(
        self, preparer: Preparer | None, ready: list[Prepared], register: bool, fetch: bool, arrivals: bool
    ) -> list[float]:
        """Seconds of each turn of the step loop until all is loaded, one adapter after another; of `TURNS`
        turns where nothing is."""
        one_token = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        prompts = cases.random_prompts("arrivals", len(self._directories), 1, self._shape.highest_id)
        seconds: list[float] = []
        waiting: list[str] = []
        guest, num_guests = "", 0
        while True:
            started = time.perf_counter()
            found = preparer.take() if preparer is not None else None
            # One a turn, as a server hears of them one by one.
            if preparer is None and register and ready:
                found = ready.pop(0) if not guest and not waiting else None
            if found is not None:
                offer_adapter(self._engine, self._served.host, found.content_id, found.image)
                self._offered.append(found.content_id)
                if fetch:
                    waiting.append(found.content_id)
            if not guest and (waiting or (arrivals and not register and num_guests < len(prompts))):
                adapter = waiting.pop(0) if waiting else ""
                guest = self._add(prompts[num_guests], one_token, adapter)
                num_guests += 1
            deltas = self._engine.step()
            seconds.append(time.perf_counter() - started)
            if guest and any(delta.request_id == guest and delta.last for delta in deltas):
                guest = ""
            if not guest and len(self._engine.scheduler.running) < self._shape.requests:
                # The context ended first (small models are that fast): go on with a new batch.
                self._start_batch(f"after/{len(seconds)}")
            loaded = len(self._offered) == len(self._directories) and not waiting and not guest
            if loaded if register else len(seconds) >= (QUICK_TURNS if self._spec["quick"] else TURNS):
                return seconds

    def p99_ratio(self, found: Rounds, case: str, other: str) -> float:
        """Median over the rounds of P99 in `case` over that in `other`, both of as many turns from the start: a step
        takes longer as the texts grow."""
        ratios: dict[bool, list[float]] = {True: [], False: []}
        for number in sorted({entry["round"] for entry in found.entries}):
            ours, theirs = self.seconds[f"{case}/{number}"], self.seconds[f"{other}/{number}"]
            turns = min(len(ours), len(theirs))
            is_quiet = all(
                entry["quiet"]
                for entry in found.entries
                if entry["round"] == number and entry["case"] in (case, other)
            )
            ratios[is_quiet].append(
                float(np.quantile(ours[:turns], 0.99) / np.quantile(theirs[:turns], 0.99))
            )
        return statistics.median(ratios[True] or ratios[False])


def measure_loading(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """P99 of the time between the tokens of a batch while adapters are loaded beside it, over that without."""
    count = QUICK_ADAPTERS if spec["quick"] else ADAPTERS
    directories = adapters.make(files.alike(files.ATTENTION, 16, count, first=5000))
    with serving(spec, kv_memory_mb=128 if spec["quick"] else 1536) as served:
        loading = Loading(spec, served, directories)
        # The first steps of a process touch memory for the first time.
        loading.case(prepare=False, register=False, fetch=False, arrivals=True)("warm")
        found = Referee.of(spec).measure(
            {
                "alone": loading.case(prepare=False, register=False, fetch=False, arrivals=False),
                "arrivals": loading.case(prepare=False, register=False, fetch=False, arrivals=True),
                "fetch": loading.case(prepare=False, register=True, fetch=True, arrivals=True),
                "register": loading.case(prepare=True, register=True, fetch=False, arrivals=False),
                "load": loading.case(prepare=True, register=True, fetch=True, arrivals=True),
            }
        )
    return {
        "load_step_p99_ratio": loading.p99_ratio(found, "load", "alone"),
        "load_step_p99_ratio_over_arrivals": loading.p99_ratio(found, "load", "arrivals"),
        "fetch_step_p99_ratio": loading.p99_ratio(found, "fetch", "alone"),
        "register_step_p99_ratio": loading.p99_ratio(found, "register", "alone"),
        "adapters": count,
        "cores": os.cpu_count(),
        **found.summary(),
    }
