"""Offline measurements: the step's own cost with a null executor, and throughput of the embedded model.

    python bench/offline.py [--quick] [--json] [--out FILE] [--model DIR]

The last line of `--json` is one JSON object. Tokens and logprobs of the throughput run go to `--out`, one JSON
object a request, so that anyone can compare them with another run or another engine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tokenloom import LLM, SamplingParams
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.request import Request
from tokenloom.runtime.null import NullExecutor

SEQUENCES = (1, 64, 256, 1000)


def step_seconds(num_sequences: int, num_steps: int) -> float:
    """Median seconds of a pure decode step with `num_sequences` running, the executor computing nothing."""
    engine = Engine(
        NullExecutor(token=5),
        EngineLimits(vocab_size=32000, max_context=4096, num_pages=80_000, max_running=1024),
        budget=ChunkedPrefill(max_batch_tokens=8192),
    )
    for i in range(num_sequences):
        prompt = [4 + (i + j) % 1000 for j in range(128)]
        params = SamplingParams(temperature=0.0, max_tokens=3000, ignore_eos=True)
        engine.add_request(Request(request_id=f"r{i}", prompt_token_ids=prompt, params=params))
    while len(engine.scheduler.running) < num_sequences or any(
        seq.num_pending > 1 for seq in engine.scheduler.running
    ):
        engine.step()
    times = []
    for _ in range(num_steps):
        started = time.perf_counter()
        deltas = engine.step()
        times.append(time.perf_counter() - started)
        if len(deltas) != num_sequences:
            raise RuntimeError(f"{len(deltas)} of {num_sequences} sequences moved")
    return statistics.median(times)


def measure_overhead(num_steps: int) -> dict[str, Any]:
    """Cost of a step: at one sequence (fixed), and the slope from 1 to 1,000 sequences."""
    seconds = {count: step_seconds(count, num_steps) for count in SEQUENCES}
    slope = (seconds[1000] - seconds[1]) / 999
    return {
        "step_us": {str(count): round(1e6 * value, 1) for count, value in seconds.items()},
        "step_overhead_us_per_sequence": round(1e6 * slope, 3),
        "step_overhead_us_fixed": round(1e6 * (seconds[1] - slope), 1),
    }


def workload(count: int, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Random prompts of 16 to 256 tokens; half greedy, half sampled with a seed."""
    rng = random.Random(0)
    prompts, params = [], []
    for i in range(count):
        prompts.append([rng.randrange(300, vocab_size) for _ in range(rng.randrange(16, 256))])
        params.append(
            SamplingParams(
                temperature=0.8 * (i % 2),
                seed=i,
                max_tokens=rng.randrange(32, 128),
                ignore_eos=True,
                logprobs=0,
            )
        )
    return prompts, params


def outputs_of(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[dict[str, Any]]:
    """Tokens and logprobs of each prompt, in order."""
    found = []
    for prompt, out in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        completion = out.outputs[0]
        logprobs = [
            entry[token].logprob
            for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
        found.append({"prompt": prompt, "tokens": list(completion.token_ids), "logprobs": logprobs})
    return found


def measure_throughput(model: str, count: int, out: Path) -> dict[str, Any]:
    """Serve `count` requests at once, then every eighth of them alone: the outputs must be equal."""
    with LLM(model, max_running=64) as llm:
        prompts, params = workload(count, llm.card.vocab_size)
        outputs_of(llm, prompts[:2], params[:2])
        started = time.perf_counter()
        together = outputs_of(llm, prompts, params)
        seconds = time.perf_counter() - started
    alone = []
    with LLM(model, max_running=1, prefix_cache=False, max_batch_tokens=64) as llm:
        for i in range(0, count, 8):
            alone += outputs_of(llm, [prompts[i]], [params[i]])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(entry) + "\n" for entry in together))
    num_output = sum(len(entry["tokens"]) for entry in together)
    return {
        "requests": count,
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": num_output,
        "seconds": round(seconds, 3),
        "output_tokens_per_second": round(num_output / seconds, 1),
        "outputs_equal": together[::8] == alone,
        "outputs_file": str(out),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and requests")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--out", type=Path, default=Path("bench/results/offline.jsonl"))
    parser.add_argument("--model", default="", help="checkpoint directory; the embedded model by default")
    args = parser.parse_args()
    results = measure_overhead(100 if args.quick else 500)
    print(
        f"step overhead: {results['step_overhead_us_fixed']} us + "
        f"{results['step_overhead_us_per_sequence']} us per running sequence"
    )
    for count, value in results["step_us"].items():
        print(f"  {count:>5} sequences: {value} us")
    results["throughput"] = measure_throughput(args.model, 16 if args.quick else 64, args.out)
    for name, value in results["throughput"].items():
        print(f"  {name}: {value}")
    if args.json:
        print(json.dumps(results))
    return 0 if results["throughput"]["outputs_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
