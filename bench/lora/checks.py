"""Parts `equal` and `many`: outputs with adapters do not depend on who shares the batch; thousands in one process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import cases
import files
import machine
from cases import shape_of
from files import AdapterFiles, AdapterKind
from rounds import say
from serving import Served, serving

from tokenloom import SamplingParams

Output = dict[str, Any]

BASE_REQUESTS = 8


def _kinds() -> list[AdapterKind]:
    """16 adapters of mixed ranks and targets."""
    targets = (files.ATTENTION, files.ALL, files.QUERY_VALUE, files.MLP)
    return [AdapterKind(targets[i // 4], files.RANKS[i % 4], 3000 + i) for i in range(4 * len(files.RANKS))]


def _params(count: int, output: int) -> list[SamplingParams]:
    """Greedy and sampled in turn, with logprobs."""
    return [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=output, ignore_eos=True, logprobs=3)
        for i in range(count)
    ]


def _outputs(
    served: Served, prompts: list[list[int]], params: list[SamplingParams], adapters: list[int | None]
) -> list[Output]:
    """Tokens and all logprobs that were asked for."""
    outputs = served.llm.generate(prompts, params, adapter=served.adapter_names(adapters), progress=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                {str(token): entry.logprob for token, entry in position.items()}
                for position in output.outputs[0].logprobs or []
            ],
        }
        for output in outputs
    ]


def measure_equal(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """`==` of tokens and logprobs: 32 requests with 16 adapters and 8 without in one batch, against each alone on
    an engine of one sequence and short chunks without a prefix cache, and against an engine without adapters."""
    shape = shape_of(spec["quick"])
    kinds = _kinds()
    numbers: list[int | None] = [i % len(kinds) for i in range(2 * len(kinds))]
    numbers += [None] * BASE_REQUESTS
    count = len(numbers)
    prompts = [
        prompt[: 8 + 5 * i % (shape.prompt - 8)]
        for i, prompt in enumerate(cases.random_prompts("equal", count, shape.prompt, shape.highest_id))
    ]
    params = _params(count, 12 if spec["quick"] else 32)
    memory = {"kv_memory_mb": 128 if spec["quick"] else 1024}
    with serving(spec, **memory) as served:
        served.load(adapters, kinds)
        together = _outputs(served, prompts, params, numbers)
    say("  together: done")
    with serving(spec, max_running=1, prefix_cache=False, **memory | {"max_batch_tokens": 32}) as served:
        served.load(adapters, kinds)
        alone = [
            _outputs(served, [prompts[i]], [params[i]], [numbers[i]])[0] for i in reversed(range(count))
        ][::-1]
    say("  alone: done")
    with serving(spec, **memory) as served:
        base = _outputs(served, prompts, params, [None] * count)
    with Path(spec["tokens"]).open("w", encoding="utf-8") as lines:
        for number, prompt, mine, other in zip(numbers, prompts, together, alone, strict=True):
            name = None if number is None else kinds[number].name
            print(json.dumps({"adapter": name, "prompt": prompt, "batch": mine, "alone": other}), file=lines)
    first_base = len(numbers) - BASE_REQUESTS
    differ = [i for i in range(count) if together[i] != alone[i]]
    base_differ = [i for i in range(first_base, count) if together[i] != base[i]]
    # A check of adapters that change nothing would prove nothing.
    unchanged = [i for i in range(first_base) if together[i]["logprobs"] == base[i]["logprobs"]]
    return {
        "outputs_equal": not (differ or base_differ or unchanged),
        "requests": count,
        "adapters": len(kinds),
        "differ_from_alone": differ,
        "differ_from_engine_without_adapters": base_differ,
        "not_changed_by_their_adapter": unchanged,
        "tokens_file": spec["tokens"],
    }


def measure_many(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """Register and serve thousands of adapters (rank 8, q and v) from one process: each gets one request."""
    count = spec["many"]
    kinds = files.alike(files.QUERY_VALUE, 8, count, first=20_000)
    shape = shape_of(spec["quick"])
    pool = (
        {"kv_memory_mb": 64, "max_adapter_mb": 8}
        if spec["quick"]
        else {"kv_memory_mb": 1024, "max_adapter_mb": 512}
    )
    with serving(spec, **pool) as served:
        loaded = machine.tree_memory(os.getpid())
        registering = 0.0
        for done, kind in enumerate(kinds):
            (directory,) = adapters.make([kind])
            started = time.perf_counter()
            served.llm.load_adapter(kind.name, directory)
            registering += time.perf_counter() - started
            adapters.remove(kind)
            if done % 500 == 499:
                say(f"  {done + 1} of {count} adapters are registered")
        served.names = [kind.name for kind in kinds]
        known = machine.tree_memory(os.getpid())
        prompts = cases.random_prompts("many", count, 8, shape.highest_id)
        started = time.perf_counter()
        outputs = served.serve(prompts, 4, list(range(count)))
        seconds = time.perf_counter() - started
        pool_use = served.engine.adapters
        peak = machine.tree_memory(os.getpid())
        result = {
            "adapters": count,
            "answered": sum(len(output) == 4 for output in outputs),
            "distinct_outputs": len({tuple(output) for output in outputs}),
            "adapter_bytes": sum(map(adapters.shapes.num_bytes, kinds)),
            "pool_limit_mb": pool["max_adapter_mb"],
            "pool_bytes": pool_use.pages.num_used * pool_use.page_bytes,
            "resident": len(pool_use.resident),
            "fetched": pool_use.stats.num_fetched,
            "register_seconds": registering,
            "serve_seconds": seconds,
            "requests_per_second": count / seconds,
        }
    memory = {
        "peak_resident_mb": peak.peak_mb,
        "anonymous_mb_model": loaded.anonymous_mb,
        "anonymous_mb_registered": known.anonymous_mb,
        "anonymous_mb_served": peak.anonymous_mb,
    }
    return result | {name: round(value, 1) for name, value in memory.items()}
