"""Does `tokenloom bench serve` tell the truth? The same trace, sent to the same server by another generator.

The other one is as simple as can be: the official `openai` client, one task for each request, its own reading of
the trace and its own clock. It shares no code with the package. Both take turns, with prompts that no round
before has sent, and the figures of all rounds are pooled. With --vllm PYTHON, vLLM's own `vllm bench serve` of
that environment is a third (it replays no Azure trace, so all three then send random prompts at --request-rate).

With --together both send at the same time: the server then sees the load twice, and both see the same server,
whatever else the machine does meanwhile. That is the way on a machine that is not quiet.

With --synthetic the server is one of this script that computes nothing: the first token takes 150 ms, every other
one 30 ms, each give or take a third (by a hash of the request). So what is compared are the generators alone, and
what they should have seen is known and printed too.

A request counts from when it was due here, as in tokenloom; vLLM counts from when it is sent.

    python bench/load_check.py --base-url http://127.0.0.1:8000 --trace AzureLLMInferenceTrace_conv.csv --json
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from openai import AsyncOpenAI

FIGURES = [
    f"{p}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for p in ("mean", "p50", "p90", "p99")
]
START_SECONDS = 1.0
# The command line of vLLM itself asks for the version of a package of that name; its CPU wheels may have another.
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
RATES = ["request_throughput", "output_throughput"]


class Ask(NamedTuple):
    """When (seconds), how many tokens in, how many out."""

    time: float
    prompt: int
    output: int


def read_azure(path: str, options: argparse.Namespace) -> list[Ask]:
    """The first requests of the trace that are short enough, from time 0."""
    asks: list[Ask] = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            prompt = max(1, round(int(row["ContextTokens"]) * options.length_scale))
            output = max(1, round(int(row["GeneratedTokens"]) * options.length_scale))
            if options.max_request_tokens and prompt + output > options.max_request_tokens:
                continue
            when = datetime.strptime(row["TIMESTAMP"][:26], "%Y-%m-%d %H:%M:%S.%f").timestamp()
            asks.append(Ask(when, prompt, output))
            if len(asks) == options.num_prompts:
                break
    first = asks[0].time
    return [Ask((ask.time - first) / options.speed, ask.prompt, ask.output) for ask in asks]


def random_asks(options: argparse.Namespace, seed: int) -> list[Ask]:
    """Poisson arrivals of prompts of one length."""
    draw = random.Random(seed)
    now, asks = 0.0, []
    for _ in range(options.num_prompts):
        now += draw.expovariate(options.request_rate)
        asks.append(Ask(now, options.random_input_len, options.random_output_len))
    return asks


async def one(
    client: AsyncOpenAI, model: str, ask: Ask, prompt: list[int], due: float
) -> tuple[float, list[float], int]:
    """Returns when it was due, the times of its chunks with a text, and the tokens that the server counted."""
    times: list[float] = []
    tokens = 0
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=ask.output,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        # A choice without a text is a token without one, unless it is the end.
        if chunk.choices and (chunk.choices[0].text or chunk.choices[0].finish_reason is None):
            times.append(time.perf_counter())
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return due, times, tokens


async def replay(options: argparse.Namespace, asks: list[Ask], seed: int) -> dict[str, Any]:
    """Send every request when it is due; returns the raw samples."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(options.vocab_size) for _ in range(ask.prompt)] for ask in asks]
    async with AsyncOpenAI(
        base_url=options.base_url + "/v1", api_key="none", max_retries=0, timeout=3600
    ) as client:
        model = options.model or (await client.models.list()).data[0].id
        await one(client, model, Ask(0, 8, 2), prompts[0][:8], 0)
        start = time.perf_counter()
        tasks = []
        for ask, prompt in zip(asks, prompts, strict=True):
            # Sleep to just before, then give the others a turn until it is time.
            while (left := start + ask.time - time.perf_counter()) > 0:
                await asyncio.sleep(left - 0.002 if left > 0.003 else 0)
            tasks.append(asyncio.create_task(one(client, model, ask, prompt, start + ask.time)))
        answers = await asyncio.gather(*tasks)
    samples: dict[str, Any] = {"ttft": [], "tpot": [], "itl": [], "e2el": [], "tokens": 0}
    for due, times, tokens in answers:
        samples["ttft"].append(times[0] - due)
        samples["e2el"].append(times[-1] - due)
        samples["itl"] += np.diff(times).tolist()
        if tokens > 1:
            samples["tpot"].append((times[-1] - times[0]) / (tokens - 1))
        samples["tokens"] += tokens
    samples["requests"] = len(answers)
    samples["seconds"] = max(times[-1] for _, times, _ in answers) - start
    return samples


def tokenloom(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """One round of `tokenloom bench serve` in a process of its own."""
    command = [
        sys.executable,
        "-c",
        "from tokenloom.cli.main import main; main()",
        "bench",
        "serve",
        *_common(options, seed, folder / "ours.json"),
        *("--vocab-size", str(options.vocab_size), "--metric-percentiles", "50,90,99", "--disable-tqdm"),
    ]
    if options.trace:
        command += ["--trace", options.trace, "--speed", str(options.speed)]
        command += ["--length-scale", str(options.length_scale)]
        command += ["--max-request-tokens", str(options.max_request_tokens)]
    else:
        command += _random(options)
    return _samples(command, folder / "ours.json")


async def together(
    options: argparse.Namespace, asks: list[Ask], seed: int, other_seed: int, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A round of both at the same time."""
    ours = asyncio.create_task(asyncio.to_thread(tokenloom, options, other_seed, folder))
    # About what the other process takes to start.
    await asyncio.sleep(START_SECONDS)
    theirs = await replay(options, asks, seed)
    return await ours, theirs


def synthetic_times(prompt: list[int] | str, output: int) -> tuple[float, list[float]]:
    """Seconds until the first token, and between each two."""
    draw = random.Random(f"{prompt} {output}")
    return 0.15 * draw.uniform(2 / 3, 4 / 3), [0.03 * draw.uniform(2 / 3, 4 / 3) for _ in range(output - 1)]


async def serve_synthetic() -> None:
    """Print the port and serve; at the end of the input, print what clients should have seen."""
    from aiohttp import web

    seen: dict[str, Any] = {name: [] for name in ("ttft", "tpot", "itl", "e2el")}

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        now = asyncio.get_running_loop().time()
        first, gaps = synthetic_times(body["prompt"], body["max_tokens"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for gap in [first, *gaps]:
            now += gap
            await asyncio.sleep(now - asyncio.get_running_loop().time())
            await response.write(b'data: {"id":"","object":"","created":0,"model":"","choices":[{"index":0,')
            await response.write(b'"text":"w","logprobs":null,"finish_reason":null}]}\n\n')
        count = len(gaps) + 1
        total = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count, "total_tokens": 0}
        end = {"id": "", "object": "", "created": 0, "model": "", "choices": [], "usage": total}
        await response.write(f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n".encode())
        if count > 2:
            seen["ttft"].append(first)
            seen["itl"] += gaps
            seen["e2el"].append(first + sum(gaps))
            seen["tpot"].append(sum(gaps) / len(gaps))
        return response

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps({**seen, "tokens": 0, "requests": 0, "seconds": float("nan")}))
    await runner.cleanup()


def vllm(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """One round of `vllm bench serve` in a process of its own."""
    command = [
        options.vllm,
        "-c",
        VLLM_BENCH_SERVE,
        *("--backend", "openai", "--tokenizer", options.tokenizer),
        *_common(options, seed, folder / "vllm.json"),
        *("--disable-tqdm", "--dataset-name", "random", *_random(options)),
    ]
    return _samples(command, folder / "vllm.json")


def _random(options: argparse.Namespace) -> list[str]:
    return [
        *("--random-input-len", str(options.random_input_len)),
        *("--random-output-len", str(options.random_output_len)),
        *("--request-rate", str(options.request_rate)),
    ]


def _common(options: argparse.Namespace, seed: int, path: Path) -> list[str]:
    return [
        *("--base-url", options.base_url, "--num-prompts", str(options.num_prompts), "--seed", str(seed)),
        *("--ignore-eos", "--temperature", "0", "--save-result", "--save-detailed"),
        *("--result-dir", str(path.parent), "--result-filename", path.name),
        *(("--model", options.model) if options.model else ()),
    ]


def _samples(command: list[str], path: Path) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    found = json.loads(path.read_text())
    if found["failed"]:
        sys.exit(f"{found['failed']} requests failed: {found['errors']}")
    itls = found["itls"]
    spans = [sum(gaps) for gaps in itls]
    tokens = found["output_lens"]
    return {
        "ttft": found["ttfts"],
        "itl": [gap for gaps in itls for gap in gaps],
        "e2el": [ttft + span for ttft, span in zip(found["ttfts"], spans, strict=True)],
        "tpot": [s / (n - 1) for s, n in zip(spans, tokens, strict=True) if n > 1],
        "tokens": sum(tokens),
        "requests": len(tokens),
        "seconds": found["duration"],
    }


def figures(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Of all rounds together."""
    found: dict[str, float] = {}
    for name in ("ttft", "tpot", "itl", "e2el"):
        values = np.array([value for samples in rounds for value in samples[name]]) * 1e3
        found[f"mean_{name}_ms"] = float(values.mean())
        for percentile in (50, 90, 99):
            found[f"p{percentile}_{name}_ms"] = float(np.percentile(values, percentile))
    seconds = sum(samples["seconds"] for samples in rounds)
    found["request_throughput"] = sum(samples["requests"] for samples in rounds) / seconds
    found["output_throughput"] = sum(samples["tokens"] for samples in rounds) / seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="")
    parser.add_argument("--trace", default="", help="an Azure CSV; random prompts if not given")
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--length-scale", type=float, default=1.0)
    parser.add_argument("--max-request-tokens", type=int, default=0)
    parser.add_argument("--request-rate", type=float, default=5.0)
    parser.add_argument("--random-input-len", type=int, default=128)
    parser.add_argument("--random-output-len", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", default="", help="python of an environment with vLLM")
    parser.add_argument("--tokenizer", default="", help="directory of the tokenizer, for vLLM")
    parser.add_argument("--synthetic", action="store_true", help="a server with known latencies")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--together", action="store_true", help="both at the same time")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.vllm and options.trace:
        parser.error("vLLM replays no Azure trace: leave out --trace")
    if options.vllm and options.together:
        parser.error("--together is for two: leave out --vllm")
    if options.quick:
        options.rounds, options.num_prompts = 1, 30

    if options.serve:
        asyncio.run(serve_synthetic())
    elif options.synthetic:
        with subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            options.base_url, options.model = f"http://127.0.0.1:{server.stdout.readline().strip()}", "m"
            rounds = run_rounds(options)
            truth = json.loads(server.communicate()[0])
        report({**rounds, "the server": [truth]}, options.json)
    else:
        report(run_rounds(options), options.json)


def run_rounds(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The samples of every round by generator, which take turns to begin."""
    seeds = iter(random.Random(time.time_ns()).sample(range(1, 1 << 30), 3 * options.rounds))
    rounds: dict[str, list[dict[str, Any]]] = {"tokenloom": [], "openai client": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            seed, other = next(seeds), next(seeds)
            asks = read_azure(options.trace, options) if options.trace else random_asks(options, seed)
            turns = ["tokenloom", "openai client"]
            if options.together:
                both = asyncio.run(together(options, asks, seed, other, Path(folder)))
                for name, samples in zip(turns, both, strict=True):
                    rounds[name].append(samples)
                turns = []
            for name in turns if number % 2 == 0 else turns[::-1]:
                if name == "tokenloom":
                    rounds[name].append(tokenloom(options, other, Path(folder)))
                else:
                    rounds[name].append(asyncio.run(replay(options, asks, seed)))
            if options.vllm:
                rounds.setdefault("vllm", []).append(vllm(options, next(seeds), Path(folder)))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    return rounds


def report(rounds: dict[str, list[dict[str, Any]]], as_json: bool) -> None:
    """Figures side by side, the ratios of tokenloom to the others, and how far single rounds lie apart."""
    found = {name: figures(samples) for name, samples in rounds.items()}
    single = {name: [figures([samples]) for samples in all_of] for name, all_of in rounds.items()}
    others = [name for name in found if name != "tokenloom"]
    print(f"{'':22}" + "".join(f"{name:>15}" for name in found) + "".join(f"{'/ ' + n:>17}" for n in others))
    for figure in FIGURES + RATES:
        ratios = "".join(f"{found['tokenloom'][figure] / found[name][figure]:17.3f}" for name in others)
        print(f"{figure:22}" + "".join(f"{found[name][figure]:15.3f}" for name in found) + ratios)
    for name, each in single.items():
        if len(each) > 1:
            values = [one["p50_ttft_ms"] for one in each]
            spread = (max(values) - min(values)) / statistics.median(values)
            print(f"rounds of {name}: median TTFT within {spread:.1%} of each other")
    if as_json:
        print(json.dumps({"figures": found, "rounds": single}))


if __name__ == "__main__":
    main()
