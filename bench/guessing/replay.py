"""Parts `replay` and `batch16`: a proposer that knows the text and is right at a set rate.

It costs nothing, so this is what verification itself gains, on a target that is bound by memory.
"""

from __future__ import annotations

import math
import random
import statistics
import zlib
from dataclasses import replace
from typing import Any

import machine
from rounds import Figures, Referee

from guessing.engines import Served, engine_parts, greedy, serve, speculate
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.speculator import Speculator
from tokenloom.speculation.replay import ReplayProposer

CHAIN = (1,) * 7
RATES = (0.5, 0.6, 0.7, 0.8, 0.9)
TREES: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "tree_2_2_1_1": ((2, 2, 1, 1), (0.6, 0.2)),
    "tree_3_1_1_1_1": ((3, 1, 1, 1, 1), (0.6, 0.15, 0.1)),
    "tree_4_2_1": ((4, 2, 1), (0.5, 0.2, 0.1, 0.05)),
}
"""Shape (children of a node by depth), and how often the child of each rank is right."""


def expected_tokens(shape: tuple[int, ...], rates: tuple[float, ...]) -> float:
    """Tokens of a step: the one that always comes, and each level that is reached."""
    total = reach = 1.0
    for width in shape:
        reach *= sum(rates[:width])
        total += reach
    return total


def measure_replay(spec: dict[str, Any]) -> dict[str, Any]:
    """Batch 1 on the model of `spec`: speed-up over plain decoding by acceptance and shape, and what the cost model
    says: tokens of a step over the time of a step of so many rows, both measured in this run."""
    num_output = 48 if spec["quick"] else 192
    with engine_parts(spec, model=spec["model"], kv_memory_mb=512, prefix_cache=False) as parts:
        engine = parts.engine
        prompts = _prompts(1, engine)
        requests = greedy(prompts, num_output)
        texts = serve(engine, requests).texts()
        vocab = engine.limits.vocab_size
        settings: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
            f"chain7_{rate}": (CHAIN, (rate,)) for rate in RATES
        } | TREES
        if spec["quick"]:
            settings = {"chain7_0.7": settings["chain7_0.7"]}
        found = Referee.of(spec).measure(
            {
                name: _case(engine, requests, texts, shape, rates, vocab)
                for name, (shape, rates) in settings.items()
            }
        )
    curve = {}
    for name, (shape, rates) in settings.items():
        rows = 1 + _size(shape)
        step = found.median(name, "step_over_plain")
        expected = expected_tokens(shape, rates)
        curve[name] = {
            "speedup": found.median(name, "speedup"),
            "tokens_per_step": found.median(name, "tokens_per_step"),
            "expected_tokens_per_step": expected,
            "rows": rows,
            "step_over_plain": step,
            "cost_model": found.median(name, "tokens_per_step") / step,
            "cost_model_expected": expected / step,
        }
    return {
        "speedup_replay07_batch1": curve["chain7_0.7"]["speedup"],
        "curve": curve,
        "worst_cost_model_error": max(abs(c["speedup"] / c["cost_model"] - 1) for c in curve.values()),
        **found.summary(),
    }


def _case(engine: Engine, requests: list[Request], texts: Any, shape: Any, rates: Any, vocab: int) -> Any:
    def run(seed: str) -> Figures:
        # Plain decoding right before: the machine changes from second to second.
        plain, _ = _once(engine, requests, texts)
        proposer = ReplayProposer(texts, rates, vocab, shape=shape, seed=zlib.crc32(seed.encode()))
        speculate(
            engine,
            [proposer],
            pace="fixed",
            max_depth=len(shape),
            max_nodes=64,
            width=max(shape),
            max_rows=64,
        )
        figures, served = _once(engine, requests, texts)
        speculate(engine, [])
        full = 1e3 * served.median_seconds(1 + _size(shape))
        return figures | {
            "speedup": figures["decode_tok_s"] / plain["decode_tok_s"],
            "plain_tok_s": plain["decode_tok_s"],
            "full_step_ms": full,
            "step_over_plain": full / plain["step_ms"],
        }

    return run


def _size(shape: tuple[int, ...]) -> int:
    total, level = 0, 1
    for width in shape:
        level *= width
        total += level
    return total


def _once(engine: Engine, requests: list[Request], texts: Any) -> tuple[Figures, Served]:
    served = serve(engine, requests)
    if served.texts() != texts:
        raise RuntimeError("the text changed")
    return {
        "decode_tok_s": served.decode_rate,
        "tokens_per_step": served.tokens_per_step,
        "step_ms": 1e3 * statistics.median(step.seconds["execute"] for step in served.decoding),
    }, served


def measure_batch16(spec: dict[str, Any]) -> dict[str, Any]:
    """Sixteen sequences at a time, plain and adaptive in alternation: the lower 95 % bound of the ratio, at acceptance
    0.7 and where nothing is ever right (so that speculation switches itself off)."""
    lengths = [16, 24, 32] if spec["quick"] else [32, 48, 64, 80]
    pairs = 2 if spec["quick"] else spec["pairs"]
    with engine_parts(
        spec, model=spec["model"], kv_memory_mb=1024, prefix_cache=False, max_running=16
    ) as parts:
        engine = parts.engine
        # Twice as many as run at once, of different lengths: a row that ends is followed by another.
        requests = [
            replace(request, params=replace(request.params, max_tokens=lengths[i % len(lengths)]))
            for i, request in enumerate(greedy(_prompts(32, engine), 1))
        ]
        texts = serve(engine, requests).texts()
        vocab = engine.limits.vocab_size
        speculators = {
            name: speculate(engine, [ReplayProposer(texts, (rate,), vocab)], max_depth=7, width=1)
            for name, rate in (("replay07", 0.7), ("never", 0.0))
        }
        # The curve and the chances are learned before anything counts, as in a server that has run for a minute.
        for speculator in speculators.values():
            engine.speculate(speculator)
            serve(engine, requests)
        plain = speculate(engine, [])
        ratios: dict[str, list[float]] = {name: [] for name in speculators}
        rejected = 0
        for number in range(pairs):
            for name, speculator in speculators.items():
                turns = [plain, speculator] if number % 2 else [speculator, plain]
                for _ in range(spec["attempts"]):
                    if spec["max_other"] < 2:
                        machine.wait_until_quiet(spec["max_other"], spec["patience_s"])
                    load = machine.OtherLoad()
                    seconds = {turn is plain: _seconds(engine, turn, requests, texts) for turn in turns}
                    if load.cores() <= spec["max_other"]:
                        break
                    rejected += 1
                ratios[name].append(seconds[True] / seconds[False])
        engine.speculate(plain)
    bounds = {name: lower_bound(values) for name, values in ratios.items()}
    return {
        "ratio_batch16_low": bounds["replay07"],
        "ratio_batch16": statistics.mean(ratios["replay07"]),
        "ratio_batch16_switched_off": statistics.mean(ratios["never"]),
        "ratio_batch16_switched_off_low": bounds["never"],
        "pairs": pairs,
        "rejected": rejected,
        "ratios": ratios,
    }


def _seconds(engine: Engine, speculator: Speculator, requests: list[Request], texts: Any) -> float:
    engine.speculate(speculator)
    served = serve(engine, requests)
    if served.texts() != texts:
        raise RuntimeError("the text changed")
    return served.seconds


def lower_bound(values: list[float]) -> float:
    """Of the mean, with 95 % confidence (normal approximation, one-sided)."""
    if len(values) < 2:
        return values[0]
    return statistics.mean(values) - 1.645 * statistics.stdev(values) / math.sqrt(len(values))


def _prompts(count: int, engine: Engine) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, engine.limits.vocab_size) for _ in range(64)] for _ in range(count)]
