"""Parts `mixes`, `zipf`, `all7`, `prefill`: how fast batches with adapters are."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import cases
import files
from cases import Choice, Shape, shape_of
from files import AdapterFiles, AdapterKind
from rounds import Case, Figures, Referee, say
from serving import Served, model_directory, serving

from tokenloom.bench.roofline import measure_limits
from tokenloom.engine.plan import StepRecord
from tokenloom.kernels.native import extension

STREAM: int = 96
POOL_MB: int = 1024


def decode_steps(steps: list[StepRecord], rows: int) -> list[float]:
    """Seconds of the steps that were nothing but one next token for each of `rows` sequences."""
    return [
        sum(step.seconds.values()) for step in steps if step.decode_rows == rows and not step.prefill_rows
    ]


def with_steps(served: Served, case: Case, rows: int) -> Case:
    """The case with the median time of its decode steps."""

    def run(seed: str) -> Figures:
        figures = case(seed)
        return figures | {"step_ms": 1e3 * statistics.median(decode_steps(served.steps, rows))}

    return run


def measure_mixes(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """Batches of 32: no adapter, 32 distinct ones of mixed ranks, 32 rows of one with as many ranks in sum, and
    the same with rank 16 on both sides."""
    shape = shape_of(spec["quick"])
    count = shape.requests
    kinds = files.mixed(count)
    kinds += files.alike(files.ATTENTION, files.MEAN_RANK, 1)
    kinds += files.alike(files.ATTENTION, 16, count, first=1000)
    chosen: dict[str, list[Choice]] = {
        "base": [None] * count,
        "distinct": list(range(count)),
        "identical": [count] * count,
        "distinct_rank16": list(range(count + 1, 2 * count + 1)),
        "identical_rank16": [count + 1] * count,
    }
    first_tokens: dict[str, list[int]] = {}
    with serving(spec, kv_memory_mb=1024) as served:
        served.load(adapters, kinds)
        found = Referee.of(spec).measure(
            {
                name: with_steps(served, cases.decode(served.serve, shape, numbers, first_tokens), count)
                for name, numbers in chosen.items()
            }
        )
    return {
        "distinct_over_base": found.ratio("distinct", "base", "decode_tok_s"),
        "distinct_over_identical": found.ratio("distinct", "identical", "decode_tok_s"),
        "distinct_over_identical_rank16": found.ratio("distinct_rank16", "identical_rank16", "decode_tok_s"),
        "identical_over_base": found.ratio("identical", "base", "decode_tok_s"),
        "distinct_over_base_end_to_end": found.ratio("distinct", "base", "end_to_end_tok_s"),
        "ranks_in_a_step": {"distinct": sum(k.rank for k in kinds[:count]), "identical": count * 30},
        "adapter_bytes_of_a_step": {
            "distinct": sum(map(adapters.shapes.num_bytes, kinds[:count])),
            "identical": adapters.shapes.num_bytes(kinds[count]),
        },
        "first_tokens": first_tokens,
        **found.summary(),
    }


def registered(spec: dict[str, Any], served: Served, adapters: AdapterFiles) -> float:
    """Have `spec["registered"]` adapters of mixed ranks under their names; the seconds that registering those
    took that were not there. Their directories are removed at once: there are thousands."""
    seconds = 0.0
    kinds = files.mixed(spec["registered"], first=10_000)
    known = set(served.llm.adapters())
    for done, kind in enumerate(kinds):
        if kind.name not in known:
            (directory,) = adapters.make([kind])
            started = time.perf_counter()
            served.llm.load_adapter(kind.name, directory)
            seconds += time.perf_counter() - started
            adapters.remove(kind)
        if done % 100 == 99:
            say(f"  {done + 1} of {len(kinds)} adapters are registered")
    served.names = [kind.name for kind in kinds]
    return seconds


def data_directory(spec: dict[str, Any], adapters: AdapterFiles) -> Path:
    """Where the registered adapters are kept. Raises RuntimeError if the disk has no room for them."""
    folder = Path(spec["work"]) / f"registered-{model_directory(spec).name}"
    folder.mkdir(parents=True, exist_ok=True)
    kinds = files.mixed(spec["registered"])
    # As they were read, and packed; half as much again stays free.
    needed = 3 * sum(map(adapters.shapes.num_bytes, kinds))
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise RuntimeError(f"{folder} needs {needed - there >> 20} MiB more, {free >> 20} are free (--work)")
    return folder


def measure_register(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """Register the adapters of `zipf`: read, checked, kept by content, packed."""
    folder = data_directory(spec, adapters)
    with serving(spec, data_dir=str(folder), **_pool(spec)) as served:
        before = len(served.llm.adapters())
        seconds = registered(spec, served, adapters)
    added = spec["registered"] - before
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "registered": spec["registered"],
        "registered_now": added,
        "seconds_each": seconds / added if added > 0 else None,
        "bytes_on_disk": size,
    }


def _pool(spec: dict[str, Any]) -> dict[str, int]:
    """Memory for KV pages, and the part of it that adapters may take."""
    if spec["quick"]:
        return {"kv_memory_mb": 64, "max_adapter_mb": 8}
    return {"kv_memory_mb": POOL_MB + 512, "max_adapter_mb": POOL_MB}


class Zipf:
    """Draws adapters 0, 1, 2, ... in proportion to 1, 1/2, 1/3, ..."""

    def __init__(self, count: int) -> None:
        self._numbers = range(count)
        self._weights = [1 / (number + 1) for number in range(count)]

    def draw(self, seed: str, count: int) -> list[Choice]:
        return list(random.Random(seed).choices(self._numbers, self._weights, k=count))


def stream(served: Served, shape: Shape, num_requests: int, zipf: Zipf | None) -> Case:
    """`num_requests` requests, of which as many run at once as there are rows in a batch. Adapters that are not
    in memory are fetched while others run. The call with one output token, which is subtracted, comes second and
    finds the adapters there: so fetching counts, and prefill does not."""

    def run(seed: str) -> Figures:
        adapters = zipf.draw(seed, num_requests) if zipf else [None] * num_requests
        prompts = cases.random_prompts(f"{seed}/whole", num_requests, shape.prompt, shape.highest_id)
        stats = served.engine.adapters.stats
        fetched, evicted, copied = stats.num_fetched, stats.num_evicted, stats.bytes_copied
        whole, _ = cases.timed(served.serve, prompts, shape.output, adapters)
        figures = {
            "distinct": float(len(set(adapters))),
            "fetched": float(stats.num_fetched - fetched),
            "evicted": float(stats.num_evicted - evicted),
            "copied_mb": (stats.bytes_copied - copied) / 2**20,
            "decode_steps": float(len(served.steps)),
        }
        prompts = cases.random_prompts(f"{seed}/first", num_requests, shape.prompt, shape.highest_id)
        first, _ = cases.timed(served.serve, prompts, 1, adapters)
        return cases.rates(num_requests, shape.output, first, whole) | figures

    return run


def burst(served: Served, shape: Shape, zipf: Zipf) -> Case:
    """One batch of requests that arrive at once, end to end: who must wait for an adapter starts later."""

    def run(seed: str) -> Figures:
        adapters = zipf.draw(seed, shape.requests)
        prompts = cases.random_prompts(seed, shape.requests, shape.prompt, shape.highest_id)
        whole, _ = cases.timed(served.serve, prompts, shape.output, adapters)
        return {"end_to_end_tok_s": shape.requests * shape.output / whole}

    return run


def measure_zipf(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """A Zipf mix over many registered adapters, in a pool that holds a part of them, against no adapters."""
    shape = shape_of(spec["quick"])
    folder = data_directory(spec, adapters)
    options = _pool(spec) | {"max_running": shape.requests}
    with serving(spec, data_dir=str(folder), **options) as served:
        registered(spec, served, adapters)
        zipf = Zipf(spec["registered"])
        # Fill the pool as traffic would have.
        warm = zipf.draw("warm", 20 * shape.requests)
        served.serve(cases.random_prompts("warm", len(warm), 1, shape.highest_id), 1, warm)
        requests = STREAM if not spec["quick"] else 2 * shape.requests
        everyone = [None] * shape.requests
        found = Referee.of(spec).measure(
            {
                "base": stream(served, shape, requests, None),
                "zipf": stream(served, shape, requests, zipf),
                "base_burst": cases.decode(served.serve, shape, everyone),
                "zipf_burst": burst(served, shape, zipf),
            }
        )
        resident = len(served.engine.adapters.resident)
        page_bytes = served.engine.adapters.page_bytes
        pool_bytes = served.engine.adapters.pages.num_used * page_bytes
    kinds = files.mixed(spec["registered"], first=10_000)
    return {
        "zipf1000_over_base": found.ratio("zipf", "base", "decode_tok_s"),
        "zipf1000_over_base_end_to_end": found.ratio("zipf", "base", "end_to_end_tok_s"),
        "zipf1000_burst_over_base": found.ratio("zipf_burst", "base_burst", "end_to_end_tok_s"),
        "registered": spec["registered"],
        "registered_bytes": sum(map(adapters.shapes.num_bytes, kinds)),
        "pool_limit_mb": options["max_adapter_mb"],
        "resident": resident,
        "pool_bytes": pool_bytes,
        "running": shape.requests,
        "requests": requests,
        **found.summary(),
    }


def measure_all7(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """Adapters of all seven projections: time of a step over what it must be, that of the base step and of reading
    the adapters at the memory bandwidth that this round found."""
    shape = shape_of(spec["quick"])
    count = shape.requests
    kinds: list[AdapterKind] = files.alike(files.ALL, 16, count)
    num_bytes = sum(map(adapters.shapes.num_bytes, kinds))
    numbers: list[Choice] = list(range(count))
    with serving(spec, kv_memory_mb=128 if spec["quick"] else 1024) as served:
        served.load(adapters, kinds)
        decode = cases.decode
        measured: dict[str, Case] = {
            "base": with_steps(served, decode(served.serve, shape, [None] * count), count),
            "all7": with_steps(served, decode(served.serve, shape, numbers), count),
        }
        if not extension.missing():
            measured["bandwidth"] = lambda seed: {"bytes_s": measure_limits(spec["threads"]).bandwidth}
        found = Referee.of(spec).measure(measured)
    result: dict[str, Any] = {"all7_over_bound": None, "adapter_bytes_of_a_step": num_bytes}
    if "bandwidth" in measured:
        bounds = [
            (1e3 * num_bytes / figures["bandwidth"]["bytes_s"] + figures["base"]["step_ms"], figures)
            for figures in _by_round(found.entries)
        ]
        result["bound_ms"] = statistics.median(bound for bound, _ in bounds)
        result["all7_over_bound"] = statistics.median(
            figures["all7"]["step_ms"] / bound for bound, figures in bounds
        )
    result["all7_over_base"] = found.ratio("all7", "base", "decode_tok_s")
    return result | found.summary()


def _by_round(entries: list[dict[str, Any]]) -> list[dict[str, Figures]]:
    """Figures by case of each round: of those that were not disturbed at all, or else of every one."""
    numbers = sorted({entry["round"] for entry in entries})
    grouped = [[entry for entry in entries if entry["round"] == number] for number in numbers]
    quiet = [group for group in grouped if all(entry["quiet"] for entry in group)]
    return [{entry["case"]: entry["figures"] for entry in group} for group in quiet or grouped]


def measure_prefill(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """One long prompt with an adapter of rank 16 on q, k, v and o, against none."""
    shape = shape_of(spec["quick"])
    with serving(spec, kv_memory_mb=128 if spec["quick"] else 1024) as served:
        served.load(adapters, files.alike(files.ATTENTION, 16, 1))
        found = Referee.of(spec).measure(
            {
                "base": cases.prefill(served.serve, shape, None),
                "adapter": cases.prefill(served.serve, shape, 0),
            }
        )
    ratio = found.ratio("adapter", "base", "prefill_tok_s")
    return {"prefill_adapter_over_base": ratio, "prompt_tokens": shape.long_prompt, **found.summary()}
