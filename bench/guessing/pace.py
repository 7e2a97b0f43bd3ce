"""Part `pace`: the adaptive pace against every fixed length of the same proposer, by batch size and acceptance.

The proposer knows the text and is right at a set rate; in one round all lanes have the same luck at the same places.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rounds import Figures, Referee, Rounds

from guessing.engines import engine_parts
from guessing.lanes import Lane, lower_bound, make_lanes, take_turns
from guessing.script import Script, made_up_prompts, speculator_of, write_script
from tokenloom.engine.engine import Engine

TOKENS: Final = {1: 64, 4: 40, 16: 24}
"""By sequences at a time, what each of them makes in a round."""
RATES: Final = (0.0, 0.5, 0.7, 0.9)
LENGTHS: Final = (0, 1, 2, 4, 7)
DEPTH: Final = 7
LEARNING_STEPS: Final = 120


class PaceCase:
    """One batch size and acceptance: a lane for the adaptive pace, and one for each of `lengths`."""

    def __init__(
        self,
        engine: Engine,
        lanes: Mapping[str, Lane],
        script: Script,
        batch: int,
        rate: float,
        tokens: int,
    ) -> None:
        self._engine = engine
        self._lanes = lanes
        self._script = script
        self._requests = script.first(batch)
        self._rate = rate
        self._goal = batch * tokens
        self._speculators = {}
        for name in lanes:
            length = DEPTH if name == "adaptive" else int(name)
            self._speculators[name] = speculator_of(
                engine,
                script.replay(engine, (rate,), (1,) * DEPTH, "") if length else None,
                pace="adaptive" if name == "adaptive" else "fixed",
                max_depth=max(length, 1),
                max_nodes=max(length, 1),
                width=1,
                max_rows=batch * DEPTH,
            )

    def _serve(self, names: Sequence[str], seed: str) -> None:
        replay = self._script.replay(self._engine, (self._rate,), (1,) * DEPTH, seed)
        for name in names:
            for source in self._speculators[name].sources:
                source.proposer = replay
            self._lanes[name].begin(self._speculators[name], self._requests, self._script.texts)
        take_turns([self._lanes[name] for name in names], self._goal)

    def learn(self, num_steps: int) -> None:
        """Have the adaptive pace serve alone, so that it knows the curve and the chances before anything counts."""
        while num_steps > 0:
            self._serve(["adaptive"], f"learn/{num_steps}")
            num_steps -= len(self._lanes["adaptive"].steps)

    def __call__(self, seed: str) -> Figures:
        self._serve(list(self._lanes), seed)
        adaptive = self._lanes["adaptive"]
        return {name: lane.rate for name, lane in self._lanes.items()} | {
            "tokens_per_step": adaptive.tokens_per_step,
            "rows": statistics.mean(step.rows for step in adaptive.steps),
        }


def measure_pace(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of the adaptive pace over those of the length that is best for each case in hindsight."""
    tokens, rates, lengths = ({2: 24}, (0.7,), (0, 2)) if spec["quick"] else (TOKENS, RATES, LENGTHS)
    names = ["adaptive", *map(str, lengths)]
    with engine_parts(spec, model=spec["model"], kv_memory_mb=512, prefix_cache=False) as parts:
        engine = parts.engine
        lanes = dict(zip(names, make_lanes(engine, len(names)), strict=True))
        # Twice what is asked for: nobody should come to the end of a text before the others are done.
        longest = 2 * max(tokens.values()) + 4 * DEPTH
        script = write_script(lanes["adaptive"], made_up_prompts(max(tokens), engine), longest)
        cases = {
            f"batch{batch}_{rate}": PaceCase(engine, lanes, script, batch, rate, count)
            for batch, count in tokens.items()
            for rate in rates
        }
        for case in cases.values():
            case.learn(8 if spec["quick"] else LEARNING_STEPS)
        found = Referee.of(spec | {"rounds": 1 if spec["quick"] else max(spec["pairs"] // 3, 2)}).measure(
            cases
        )
        for lane in lanes.values():
            lane.engine.reset()
    compared = {name: compare(found, name, [str(length) for length in lengths]) for name in cases}
    return {
        "adaptive_over_best_fixed": min(case["ratio"] for case in compared.values()),
        "adaptive_over_best_fixed_low": min(case["ratio_low"] for case in compared.values()),
        "cases": compared,
        **found.summary(),
    }


def compare(found: Rounds, case: str, lengths: Sequence[str]) -> dict[str, Any]:
    """The adaptive pace of `case` over the length with the highest median rate: mean ratio of the rounds, and its
    lower 95 % bound. That length is picked from the same numbers, so its luck counts against the adaptive pace."""
    figures = [entry["figures"] for entry in found.quiet(case)]
    best = max(lengths, key=lambda length: statistics.median(each[length] for each in figures))
    ratios = [each["adaptive"] / each[best] for each in figures]
    return {
        "best_fixed": int(best),
        "ratio": statistics.mean(ratios),
        "ratio_low": lower_bound(ratios),
        "ratios": ratios,
    }
