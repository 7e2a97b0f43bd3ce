"""Part `ragged`: what it costs that sequences of a batch accept different numbers of tokens.

Here nothing is realigned: positions are counted for each sequence, and only the path of a tree that is not its first
moves its keys and values. A rectangular layout moves whole rows, unless all have accepted the same number; how much
that is, is measured for the very same numbers (guessing/padded.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from rounds import Case, Figures, Referee

from guessing.engines import engine_parts
from guessing.lanes import Lane, make_lanes, take_turns
from guessing.padded import PaddedKV
from guessing.script import Script, made_up_prompts, speculator_of, write_script
from tokenloom.engine.engine import Engine
from tokenloom.runtime.local import LocalExecutor

BATCHES: Final = (1, 4, 8, 16, 32)
SHAPES: Final[dict[str, tuple[tuple[int, ...], tuple[float, ...]]]] = {
    "chain5": ((1,) * 5, (0.7,)),
    "tree": ((3, 1, 1, 1, 1), (0.5, 0.12, 0.08)),
}
"""Children of a node by depth, and how often the child of each rank is right: 0.7 in all."""
PROMPTS: Final = (64, 256)
"""The fewest and the most tokens of a prompt."""


def measure_ragged(spec: dict[str, Any]) -> dict[str, Any]:
    """On the embedded target and, where there is one, the model of `spec`."""
    models = {"embedded": ""} | ({Path(spec["model"]).name: spec["model"]} if spec["model"] else {})
    found = {name: _measure(spec, model) for name, model in models.items()}
    cases = [case for one in found.values() for case in one["cases"].values()]
    return {
        "worst_realign_share": max(case["realign_share"] for case in cases),
        "worst_padded_share": max(case["padded_share"] for case in cases),
        "models": found,
    }


def _measure(spec: dict[str, Any], model: str) -> dict[str, Any]:
    batches, num_tokens, prompts = ((1, 4), 24, (16, 32)) if spec["quick"] else (BATCHES, 64, PROMPTS)
    with engine_parts(spec, model=model, kv_memory_mb=768, prefix_cache=False) as parts:
        engine = parts.engine
        lanes = make_lanes(engine, 1)
        longest = 2 * num_tokens + 16
        script = write_script(lanes[0], made_up_prompts(max(batches), engine, *prompts), longest)
        found = Referee.of(spec).measure(
            {
                f"batch{batch}_{name}": _case(spec, engine, lanes[0], script, batch, shape, rates, num_tokens)
                for batch in batches
                for name, (shape, rates) in SHAPES.items()
            }
        )
        kv, dtype = kv_of(engine)
    summary = found.summary()
    return {
        "kv_bytes_per_token": 2 * math.prod(kv) * np.dtype(dtype).itemsize,
        "prompts": prompts,
        "cases": summary["medians"],
        **summary,
    }


def kv_of(engine: Engine) -> tuple[tuple[int, int, int], str]:
    """What a token leaves in the pool: (layers, heads, numbers of a head) and a type as wide as its numbers."""
    backend = cast(LocalExecutor, engine.executor).backend
    kv = cast(Any, backend).program.kv
    wide = getattr(backend, "kv_dtype", "float32") == "float32"
    return (kv.num_layers, kv.num_kv_heads, kv.head_dim), "uint32" if wide else "uint16"


def _case(
    spec: dict[str, Any],
    engine: Engine,
    lane: Lane,
    script: Script,
    batch: int,
    shape: tuple[int, ...],
    rates: tuple[float, ...],
    num_tokens: int,
) -> Case:
    requests = script.first(batch)

    def run(seed: str) -> Figures:
        replay = script.replay(engine, rates, shape, seed)
        speculator = speculator_of(
            engine, replay, pace="fixed", max_depth=len(shape), max_nodes=16, width=max(shape), max_rows=480
        )
        lane.begin(speculator, requests, script.texts)
        # The last token has no keys and values yet.
        lengths = [
            len(request.prompt_token_ids) + len(lane.texts[request.request_id, 0]) - 1 for request in requests
        ]
        take_turns([lane], batch * num_tokens)
        steps = lane.steps
        padded = padded_seconds(spec, engine, lengths, [step.taken for step in steps])
        count = len(steps)
        building = sum(step.record.seconds["build"] for step in steps)
        moving = sum(step.moving for step in steps)
        return {
            "grouped": sum(len(set(step.taken)) == 1 for step in steps) / count,
            "tokens_per_step": lane.tokens_per_step,
            "step_ms": 1e3 * lane.step_seconds,
            "realign_ms": 1e3 * moving / count,
            "realign_share": moving / lane.seconds,
            "layout_share": (moving + building) / lane.seconds,
            "padded_ms": 1e3 * padded / count,
            "padded_share": padded / (lane.seconds - moving + padded),
        }

    return run


def padded_seconds(
    spec: dict[str, Any], engine: Engine, lengths: Sequence[int], taken: Sequence[Sequence[int]]
) -> float:
    """What aligning takes in a rectangle for sequences of `lengths` that take `taken[step]` tokens."""
    shape, dtype = kv_of(engine)
    growth = sum(max(step) for step in taken)
    padded = PaddedKV(shape, lengths, growth, dtype=dtype, threads=spec["threads"])
    seconds = sum(padded.accept(step) for step in taken)
    padded.close()
    return seconds
