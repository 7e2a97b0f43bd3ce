"""Part `equal`: what every proposer and all of them together leave alone, which is everything."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from guessing.engines import engine_parts, serve
from tokenloom import SamplingParams
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request, SequenceDelta

MAX_PROMPT = 320
NUM_PROMPTS = 200
SETTINGS: dict[str, dict[str, Any]] = {
    "batch1": {"max_running": 1},
    "batch8": {"max_running": 8, "max_chunk_tokens": 48, "prefix_cache": True},
    "batch64_tiny_pool": {"max_running": 64, "prefix_cache": True, "num_pages": 260, "max_batch_tokens": 192},
}
"""The tiny pool holds a fifth of what 64 sequences need, so there are preemptions all the time."""

PROPOSERS = (("ngram",), ("draft",), ("draft", "ngram"))


def texts(directory: str) -> Iterator[str]:
    """The prompts of the files in `directory`; made-up ones without."""
    for path in sorted(Path(directory).glob("*.jsonl.gz")) if directory else []:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                turns = entry.get("turns") or [entry.get("question") or entry.get("prompt")]
                yield str(turns[0])
    for number in itertools.count():
        yield f"Tell me story number {number} about a fox, a fox and another fox."


def requests_of(parts: Any, directory: str, count: int) -> list[Request]:
    """`count` requests with all kinds of parameters in turn."""
    vocab = parts.engine.limits.vocab_size
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0, "min_p": 0.05, "logit_bias": {300: 2.0, 301: -100.0}},
        {"temperature": 0.7, "top_k": 40, "repetition_penalty": 1.2},
        {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"temperature": 0.9, "allowed_token_ids": tuple(range(2, vocab, 2))},
        {"temperature": 0.0, "stop": ("the", "."), "min_tokens": 6},
        {"temperature": 1.0, "n": 2},
        {"temperature": 0.0, "ignore_eos": True},
    ]
    found = []
    # Short ones of every file, not all of the first.
    candidates = list(itertools.islice(texts(directory), 1200 if directory else count))
    random.Random(1).shuffle(candidates)
    for number, text in enumerate(candidates[:count]):
        prompt = parts.tokenizer.encode(text)[:MAX_PROMPT]
        params = SamplingParams(
            max_tokens=24 + number % 24, seed=number, logprobs=2, **kinds[number % len(kinds)]
        )
        found.append(Request(request_id=f"p{number}", prompt_token_ids=prompt, params=params))
    return found


def outputs_of(deltas: list[SequenceDelta]) -> dict[str, Any]:
    """Everything that each sample got."""
    found: dict[str, Any] = {}
    for delta in deltas:
        if delta.request_id.startswith("extra"):
            continue
        entry = found.setdefault(f"{delta.request_id}/{delta.sample}", {"tokens": [], "logprobs": []})
        entry["tokens"] += delta.token_ids
        entry["logprobs"] += [(each.token_id, each.logprob, each.rank, each.top) for each in delta.logprobs]
        entry["finish"] = [delta.finish_reason, delta.stop]
    return found


def cancels(engine: Engine, step: int) -> None:
    """Others come and go."""
    if step % 3 == 0 and step < 300 and engine.has_room:
        params = SamplingParams(temperature=1.0, seed=step, max_tokens=40, ignore_eos=True)
        engine.add_request(
            Request(request_id=f"extra{step}", prompt_token_ids=[9, step + 10] * 9, params=params)
        )
        engine.cancel(f"extra{step - 12}")


def measure_equal(spec: dict[str, Any]) -> dict[str, Any]:
    """Whether tokens and logprobs are `==` in every setting; how much was guessed right."""
    count = 18 if spec["quick"] else NUM_PROMPTS
    plain = {"max_running": 2, "prefix_cache": False, "max_batch_tokens": 512}
    with engine_parts(spec, **plain) as parts:
        requests = requests_of(parts, spec["prompts"], count)
        expected = outputs_of(serve(parts.engine, requests).deltas)
    cases: dict[str, Any] = {}
    for proposers, (name, options) in itertools.product(PROPOSERS, SETTINGS.items()):
        for pace in ("fixed",) if spec["quick"] else ("adaptive", "fixed"):
            chosen = {"speculate": proposers, "draft_pace": pace} | options
            with engine_parts(spec, **chosen) as parts:
                mine = [
                    replace(r, params=replace(r.params, n=1)) if options["max_running"] < r.params.n else r
                    for r in requests
                ]
                served = serve(parts.engine, mine, cancels)
                stats = parts.engine.speculator.stats
                found = outputs_of(served.deltas)
                cases["+".join(proposers) + f" {name} {pace}"] = {
                    "equal": found == {key: expected[key] for key in found} and len(found) >= count,
                    "outputs": len(found),
                    "drafted": stats.num_drafted,
                    "accepted": stats.num_accepted,
                    "preemptions": parts.engine.scheduler.num_preemptions,
                }
    path = Path(spec["tokens"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"request": key} | value) + "\n" for key, value in expected.items()))
    return {
        "outputs_equal": all(case["equal"] for case in cases.values()),
        "prompts": count,
        "cases": cases,
        "tokens": str(path),
    }
