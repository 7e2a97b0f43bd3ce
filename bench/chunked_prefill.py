"""Stall-free chunked prefill: simulated capacity and ablation, and a long prompt amid decodes on the real engine.

    python bench/chunked_prefill.py [--quick] [--json] [--out FILE]

Simulation runs the production scheduler on a cost model of a 34B-like machine (25 ms to read the weights, 0.1 ms a
row). Capacity is defined as in Sarathi-Serve (OSDI 2024): the highest Poisson rate with a median scheduling delay of
at most 2 s and P99 time between tokens within the SLO. The real run serves eight chats on a small random model on
this machine while one prompt of 32,000 tokens (quick: 8,000) arrives.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tokenloom.bench.simulation import SimulatedMachine, Slo, find_capacity, poisson_workload, simulate
from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.models.config import ModelConfig, RopeConfig
from tokenloom.models.llama import build
from tokenloom.models.rope import rope_tables
from tokenloom.runtime.local import LocalExecutor
from tokenloom.runtime.simulated import CostModel

MACHINE = SimulatedMachine(cost=CostModel(memory_bound=0.025, per_row=0.0001, per_key=2e-9, tile=32))
SHAREGPT, ARXIV = (1730.0, 7059.0)


def policies(tau: int) -> dict[str, ChunkedPrefill]:
    """Stall-free batching and its ablations."""
    return {
        "stall_free": ChunkedPrefill(tau),
        "hybrid_only": ChunkedPrefill(tau, chunked=False),
        "chunked_only": ChunkedPrefill(tau, mixed=False),
        "prefill_first": ChunkedPrefill(tau, chunked=False, mixed=False),
    }


def measure_simulated(num_requests: int) -> dict[str, Any]:
    """Ablation at one load, and capacities at the strict (5x) and relaxed (25x a decode step) SLO."""
    results: dict[str, Any] = {}
    for name, prompt in {"sharegpt": SHAREGPT, "arxiv": ARXIV}.items():
        rate = 2.2 * SHAREGPT / prompt
        workload = poisson_workload(num_requests, rate, (prompt, 0.3), (200, 0.5), seed=7)
        results[f"ablation_{name}"] = {
            policy: {
                key: round(value, 3)
                for key, value in asdict(simulate(MACHINE, budget, workload)).items()
                if key in ("ttft_p50", "tbt_p99")
            }
            for policy, budget in policies(1024).items()
        }

        def capacity(budget: ChunkedPrefill, slo: Slo, prompt: float = prompt) -> float:
            return find_capacity(
                lambda arrivals: simulate(
                    MACHINE,
                    budget,
                    poisson_workload(num_requests, arrivals, (prompt, 0.3), (200, 0.5), seed=7),
                ),
                slo,
            )

        for slo_name, tau, slo in (("strict", 512, Slo(0.125)), ("relaxed", 2048, Slo(0.625))):
            ours = capacity(ChunkedPrefill(tau), slo)
            theirs = capacity(policies(tau)["prefill_first"], slo)
            results[f"capacity_{name}_{slo_name}"] = {
                "stall_free": round(ours, 3),
                "prefill_first": round(theirs, 3),
                "ratio": round(ours / theirs, 2) if theirs else None,
            }
    return results


def small_engine(budget: ChunkedPrefill, max_context: int) -> Engine:
    """A random two-layer model on the local executor."""
    config = ModelConfig(
        family="llama",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        max_context=max_context,
        rms_norm_eps=1e-5,
        rope=RopeConfig(rotary_dim=32),
    )
    program = build(config)
    rng = np.random.default_rng(0)
    weights = {
        spec.name: (rng.standard_normal(spec.shape) * 0.1).astype(np.float32) for spec in program.weights
    }
    num_pages = max_context // PAGE_SIZE + 64
    executor = LocalExecutor(
        program,
        weights,
        rope_tables(config, max_context),
        num_frames=num_pages,
        frame_bytes=program.kv.page_elements(PAGE_SIZE) * 4,
        pages_per_frame=1,
        dtype="float32",
        kv_dtype="float32",
    )
    limits = EngineLimits(vocab_size=512, max_context=max_context, num_pages=num_pages, prefix_cache=False)
    return Engine(executor, limits, budget=budget)


def long_prompt_run(budget: ChunkedPrefill, num_prompt: int) -> dict[str, Any]:
    """Gaps between the tokens of eight chats, before and while a long prompt is computed."""
    engine = small_engine(budget, num_prompt + 1024)
    tokens: dict[str, list[int]] = {}

    def step() -> None:
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)

    for i in range(8):
        params = SamplingParams(temperature=0.0, max_tokens=600, ignore_eos=True)
        engine.add_request(Request(request_id=f"chat{i}", prompt_token_ids=[i + 5] * 20, params=params))
    before, during = [], []
    for _ in range(100):
        started = time.perf_counter()
        step()
        before.append(time.perf_counter() - started)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    prompt = [(7 * j) % 509 for j in range(num_prompt)]
    engine.add_request(Request(request_id="long", prompt_token_ids=prompt, params=params))
    while "long" not in tokens:
        started = time.perf_counter()
        step()
        during.append(time.perf_counter() - started)
    while engine.has_work:
        step()
    engine.close()
    return {
        "tbt_p99_before_ms": round(1e3 * float(np.percentile(before[5:], 99)), 2),
        "tbt_p99_during_ms": round(1e3 * float(np.percentile(during, 99)), 2),
        "steps_during": len(during),
        "seconds_during": round(sum(during), 2),
        "tokens": tokens,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests, a shorter prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--out", type=Path, default=Path("bench/results/chunked_prefill.jsonl"))
    args = parser.parse_args()
    results = measure_simulated(60 if args.quick else 300)
    num_prompt = 8_000 if args.quick else 32_000
    stall_free = long_prompt_run(ChunkedPrefill(512), num_prompt)
    prefill_first = long_prompt_run(ChunkedPrefill(512, chunked=False, mixed=False), num_prompt)
    outputs = stall_free.pop("tokens")
    results["outputs_equal"] = outputs == prefill_first.pop("tokens")
    results["long_prompt_stall_free"] = stall_free
    results["long_prompt_prefill_first"] = prefill_first
    results["long_prompt_tbt_ratio"] = round(
        prefill_first["tbt_p99_during_ms"] / stall_free["tbt_p99_during_ms"], 1
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        "".join(json.dumps({"id": key, "tokens": value}) + "\n" for key, value in outputs.items())
    )
    for name, value in results.items():
        print(f"{name}: {value}")
    if args.json:
        print(json.dumps(results))
    return 0 if results["outputs_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
