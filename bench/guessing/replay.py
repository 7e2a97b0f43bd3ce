"""Parts `replay` and `batch16`: a proposer that knows the text and is right at a set rate.

It costs little, so this is what verification itself gains, on a target that is bound by memory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rounds import Case, Figures, Referee

from guessing.engines import engine_parts
from guessing.lanes import Lane, Step, lower_bound, make_lanes, take_turns, trimmed_mean
from guessing.script import Script, made_up_prompts, speculator_of, write_script
from tokenloom.clock import VirtualClock
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.runtime.simulated import SimulatedExecutor

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
    says: tokens of a step over the time of a step of so many rows. That time is not of the steps that made the
    speed-up: two further lanes take it, plain decoding and trees of the same shape in which nothing ever is right."""
    num_tokens = 48 if spec["quick"] else 192
    with engine_parts(spec, model=spec["model"], kv_memory_mb=512, prefix_cache=False) as parts:
        engine = parts.engine
        lanes = make_lanes(engine, 4)
        script = write_script(lanes[0], made_up_prompts(1, engine), num_tokens + 2 * len(CHAIN))
        settings: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
            f"chain7_{rate}": (CHAIN, (rate,)) for rate in RATES
        } | TREES
        if spec["quick"]:
            settings = {"chain7_0.7": settings["chain7_0.7"]}
        found = Referee.of(spec).measure(
            {
                name: _replay_case(engine, lanes, script, shape, rates, num_tokens)
                for name, (shape, rates) in settings.items()
            }
        )
    curve = {}
    for name, (shape, rates) in settings.items():
        step = found.median(name, "step_over_plain")
        expected = expected_tokens(shape, rates)
        curve[name] = {
            "speedup": found.median(name, "speedup"),
            "tokens_per_step": found.median(name, "tokens_per_step"),
            "expected_tokens_per_step": expected,
            "rows": 1 + _size(shape),
            "step_over_plain": step,
            "cost_model": found.median(name, "cost_model"),
            "cost_model_expected": expected / step,
            "error": found.median(name, "speedup_over_model") - 1,
        }
    return {
        "speedup_replay07_batch1": curve["chain7_0.7"]["speedup"],
        "curve": curve,
        "worst_cost_model_error": max(abs(case["error"]) for case in curve.values()),
        **found.summary(),
    }


def _replay_case(
    engine: Engine,
    lanes: Sequence[Lane],
    script: Script,
    shape: tuple[int, ...],
    rates: tuple[float, ...],
    num_tokens: int,
) -> Case:
    plain, guessing, one_row, all_rows = lanes
    limits = {"pace": "fixed", "max_depth": len(shape), "max_nodes": 64, "width": max(shape), "max_rows": 64}

    def run(seed: str) -> Figures:
        right = script.replay(engine, rates, shape, seed)
        wrong = script.replay(engine, (0.0,), shape, seed)
        for lane, replay in ((plain, None), (guessing, right), (one_row, None), (all_rows, wrong)):
            lane.begin(speculator_of(engine, replay, **limits), script.requests, script.texts)
        take_turns(lanes, num_tokens)
        rows = {step.rows for lane in (guessing, all_rows) for step in lane.steps}
        if rows != {1 + _size(shape)}:
            raise RuntimeError(f"steps of {sorted(rows)} rows instead of {1 + _size(shape)}")
        speedup = guessing.rate / plain.rate
        step_over_plain = all_rows.step_seconds / one_row.step_seconds
        model = guessing.tokens_per_step / step_over_plain
        return {
            "speedup": speedup,
            "tokens_per_step": guessing.tokens_per_step,
            "step_over_plain": step_over_plain,
            "cost_model": model,
            "speedup_over_model": speedup / model,
            "decode_tok_s": guessing.rate,
            "plain_tok_s": plain.rate,
            "full_step_ms": 1e3 * all_rows.step_seconds,
            "plain_step_ms": 1e3 * one_row.step_seconds,
            "outside_executor": 1
            - sum(s.record.seconds["execute"] for s in guessing.steps) / guessing.seconds,
        }

    return run


def _size(shape: tuple[int, ...]) -> int:
    total, level = 0, 1
    for width in shape:
        level *= width
        total += level
    return total


def measure_batch16(spec: dict[str, Any]) -> dict[str, Any]:
    """Sixteen sequences at a time, plain and adaptive step by step in turns: the lower 95 % bound of the ratio, at
    acceptance 0.7 and where nothing is ever right (so that speculation switches itself off).

    Where it is off, each step has its like in the plain lane. Ratios of such pairs are trimmed by a tenth on both
    sides in each round; steps in which it tried again are no such pairs, and what they took more is added in full, as
    is the time of steps in which it asked for guesses that then were not worth a row.
    """
    num_tokens, learning = (24, 40) if spec["quick"] else (64, 160)
    with engine_parts(
        spec, model=spec["model"], kv_memory_mb=1024, prefix_cache=False, max_running=16
    ) as parts:
        engine = parts.engine
        lanes = dict(zip(("plain", "replay07", "never"), make_lanes(engine, 3), strict=True))
        script = write_script(lanes["plain"], made_up_prompts(16, engine), 2 * num_tokens + 16)
        rates = {"replay07": 0.7, "never": 0.0}
        speculators = {
            name: speculator_of(
                engine,
                script.replay(engine, (rates[name],), CHAIN, "") if name in rates else None,
                max_depth=len(CHAIN),
                width=1,
            )
            for name in lanes
        }

        def run(seed: str, *, goal: int = 16 * num_tokens) -> Figures:
            for name, lane in lanes.items():
                for source in speculators[name].sources:
                    source.proposer = script.replay(engine, (rates[name],), CHAIN, seed)
                lane.begin(speculators[name], script.requests, script.texts)
            take_turns(list(lanes.values()), goal)
            plain = lanes["plain"]
            return {
                "replay07": lanes["replay07"].rate / plain.rate,
                "never": lanes["never"].rate / plain.rate,
                "plain_step_ms": 1e3 * plain.step_seconds,
                **_switched_off(plain.steps, lanes["never"].steps),
            }

        # The curve and the chances are learned before anything counts, as in a server that has run for a minute.
        for number in range(-(-learning // num_tokens)):
            run(f"learn/{number}")
        found = Referee.of(spec | {"rounds": 2 if spec["quick"] else spec["pairs"]}).measure({"batch16": run})
    figures = [entry["figures"] for entry in found.quiet("batch16")]
    ratios = [each["replay07"] for each in figures]
    resting = [each["resting"] for each in figures]
    tried = sum(each["tried_s"] for each in figures) / sum(each["plain_s"] for each in figures)
    return {
        "ratio_batch16_low": lower_bound(ratios),
        "ratio_batch16": statistics.mean(ratios),
        "ratio_batch16_switched_off": 1 / (1 / statistics.mean(resting) + tried),
        "ratio_batch16_switched_off_low": 1 / (1 / lower_bound(resting) + tried),
        "ratio_batch16_switched_off_untrimmed": statistics.mean(each["never"] for each in figures),
        "tries_share": tried,
        "switched_off_us": switched_off_us(spec),
        "pairs": len(figures),
        **found.summary(),
    }


def _switched_off(plain: Sequence[Step], never: Sequence[Step]) -> Figures:
    """Of steps at the same place of the text: how the plain one compares to one without a tree (1 where there is
    none), and how many seconds those with trees took more, and those more than usual that only asked."""
    pairs = list(zip(plain, never, strict=False))
    tries = [other.seconds - mine.seconds for mine, other in pairs if other.record.verify_rows]
    resting = [(mine.seconds, other) for mine, other in pairs if not other.record.verify_rows]
    asking = [other.record.seconds["propose"] for _, other in resting] or [0.0]
    # Of logarithms: the mean of plain ratios is above 1 for two lanes of equal noise, whichever is divided.
    ratios = [math.log(mine / other.seconds) for mine, other in resting] or [0.0]
    return {
        "resting": math.exp(trimmed_mean(ratios)),
        "tries": len(tries),
        "tried_s": sum(tries) + sum(asking) - len(asking) * statistics.median(asking),
        "plain_s": sum(mine.seconds for mine, _ in pairs),
    }


def switched_off_us(spec: dict[str, Any]) -> float:
    """Microseconds that a speculator which is off adds to a step of 16 sequences: trimmed mean of the differences to
    plain steps in turns, both on an executor that computes nothing (the time that it pretends is another clock's)."""
    clock = VirtualClock()
    limits = EngineLimits(vocab_size=512, max_context=1024, num_pages=4096, max_running=16)
    engine = Engine(SimulatedExecutor(clock, vocab_size=512), limits, clock=clock)
    plain, never = lanes = make_lanes(engine, 2)
    num_steps = 200 if spec["quick"] else 800
    script = write_script(plain, made_up_prompts(16, engine), num_steps + 100)
    wrong = script.replay(engine, (0.0,), CHAIN, "")
    plain.begin(speculator_of(engine, None), script.requests, script.texts)
    never.begin(speculator_of(engine, wrong, max_depth=len(CHAIN), width=1), script.requests, script.texts)
    take_turns(lanes, 16 * num_steps)
    pairs = list(zip(plain.steps, never.steps, strict=False))[num_steps // 4 :]
    return 1e6 * trimmed_mean([b.seconds - a.seconds for a, b in pairs if not b.record.verify_rows])
