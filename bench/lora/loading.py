"""Part `loading`: what loading adapters does to the steps of those that run meanwhile.

A batch of 32 decodes without a pause. Beside it, in turn: nothing; requests of one token without adapters; adapters
that were packed before are registered and fetched by requests that need them; adapters are packed and registered,
and nobody asks for them; and all of it. Packing happens in the process of idle priority that a server has for it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import files
import numpy as np
from cases import Shape, shape_of
from files import AdapterFiles
from rounds import Case, Figures, Referee, Rounds
from serving import Served, serving

from tokenloom import SamplingParams
from tokenloom.engine.request import Request
from tokenloom.errors import TokenloomError
from tokenloom.runtime.adapter_host import offer_adapter
from tokenloom.serving.adapter_library import AdapterLibrary
from tokenloom.serving.adapter_packer import PreparedAdapter
from tokenloom.serving.packer_client import PackerClient

ADAPTERS = 100
QUICK_ADAPTERS = 12
SETTLE_STEPS = 8
TURNS = 400
"""Of the cases in which nothing is loaded: about what fetching takes."""
QUICK_TURNS = 60


class Preparer:
    """Has adapters prepared one after another, by the process that a server has for it."""

    def __init__(self, library: AdapterLibrary, directories: list[Path]) -> None:
        self._client = PackerClient(library.packer)
        self._directories = directories
        self._ready: queue.SimpleQueue[PreparedAdapter | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._prepare)

    def start(self) -> None:
        """Begin with the first directory."""
        self._thread.start()

    def take(self, timeout_s: float = 0.0) -> PreparedAdapter | None:
        """The next one that is ready, if any. Raises what was wrong with it."""
        try:
            found = self._ready.get(timeout=timeout_s) if timeout_s else self._ready.get_nowait()
        except queue.Empty:
            return None
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self) -> None:
        """End the process."""
        self._client.close()
        if self._thread.ident is not None:
            self._thread.join()

    def _prepare(self) -> None:
        try:
            for directory in self._directories:
                self._ready.put(self._client.prepare(directory)[0])
        except TokenloomError as error:
            self._ready.put(error)


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
                ready: list[PreparedAdapter] = []
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
        with (
            tempfile.TemporaryDirectory(dir=self._spec["work"], prefix="preparing-") as folder,
            contextlib.closing(self._served.open_library(folder)) as library,
        ):
            preparer = Preparer(library, self._directories)
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
        self,
        preparer: Preparer | None,
        ready: list[PreparedAdapter],
        register: bool,
        fetch: bool,
        arrivals: bool,
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
