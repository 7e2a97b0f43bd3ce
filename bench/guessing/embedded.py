"""Parts `story` and `copy`: real proposers on the embedded models, `story` on any pair that tells stories, batch 1.

Both embedded models lie in the processor's caches here, so a verified row is not free: tokens of a target step, and the
draft's share of the time, say more about other models than the speed-up does.
"""

from __future__ import annotations

import random
import statistics
from typing import Any

from rounds import Case, Figures, Referee

from guessing.engines import Served, Texts, engine_parts, options_of, serve, speculate
from tokenloom import SamplingParams
from tokenloom.embedded import ADAPTERS
from tokenloom.engine.engine import Engine
from tokenloom.engine.proposer import Proposer
from tokenloom.engine.request import Request
from tokenloom.engine.speculator import Speculator
from tokenloom.runtime.adapter_host import offer_adapter
from tokenloom.serving.assembly import EngineParts, open_library

NOUNS = "dog cat bird ball tree boat king queen fox bear lake hill star cake hat shoe frog duck horse house".split()
OPENINGS = (
    "Once upon a time, there was a {} who had a {}.",
    "One day, a {} saw a {}.",
    "Once there was a little {}. It wanted a {}.",
)
DEPTH = 4


def stories(parts: EngineParts, count: int, num_output: int) -> list[Request]:
    """Requests for stories, of a model without a chat template their openings; half greedy, half sampled."""
    rng = random.Random(3)
    tokenizer = parts.tokenizer
    found = []
    for number in range(count):
        nouns = rng.sample(NOUNS, 2)
        if tokenizer.chat_template is None:
            prompt = tokenizer.encode(OPENINGS[number // 2 % len(OPENINGS)].format(*nouns))
        else:
            messages = [{"role": "user", "content": "Tell me a story about a {} and a {}.".format(*nouns)}]
            prompt = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        params = SamplingParams(
            temperature=0.8 * (number % 2), top_p=0.95, seed=number, max_tokens=num_output
        )
        found.append(Request(request_id=f"s{number}", prompt_token_ids=prompt, params=params))
    return found


def measure_story(spec: dict[str, Any]) -> dict[str, Any]:
    """The drafts before their target, the embedded ones unless `spec` names others: as they would run, as chains of
    each draft and as trees."""
    count, num_output = (4, 64) if spec["quick"] else (24, 160)
    served: dict[str, list[Served]] = {}
    pair = {"model": spec["target"], "draft_model": spec["draft"]} if spec["target"] else {}
    with engine_parts(spec, speculate=("draft",), prefix_cache=False, **pair) as parts:
        engine = parts.engine
        requests = stories(parts, count, num_output)
        proposers = [source.proposer for source in engine.speculator.sources]
        adaptive = engine.speculator
        speculate(engine, [])
        texts = serve(engine, requests).texts()
        settings = {
            "plain": speculate(engine, []),
            "adaptive": adaptive,
            "chain": _fixed(engine, proposers, 1, DEPTH),
            "tree": _fixed(engine, proposers, 3, 3 * DEPTH),
        }

        turns = _turns(engine, settings, requests, texts, served)
        # The curve and the chances are learned before anything counts.
        for number in range(2):
            turns(f"warm/{number}")
        found = Referee.of(spec).measure({"turns": turns})
    per_request = {
        name: [each.tokens_per_step for each in runs] for name, runs in served.items() if name != "plain"
    }
    ratios = [tree / chain for tree, chain in zip(per_request["tree"], per_request["chain"], strict=True)]
    return {
        "speedup_story_batch1": found.median("turns", "adaptive_speedup"),
        "speedup_chain": found.median("turns", "chain_speedup"),
        "tokens_per_step_story": found.median("turns", "adaptive_tokens_per_step"),
        "tokens_per_step_chain": found.median("turns", "chain_tokens_per_step"),
        "tree_over_chain": found.median("turns", "tree_tokens_per_step")
        / found.median("turns", "chain_tokens_per_step"),
        "tree_over_chain_by_request": statistics.mean(ratios),
        "tree_over_chain_error": statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None,
        "draft_share": found.median("turns", "adaptive_draft_share"),
        "depth": DEPTH,
        **found.summary(),
    }


def copies(parts: EngineParts, count: int, adapter: str) -> list[Request]:
    """Requests to repeat a text, greedily: words without any order, so that only the request says what comes next."""
    rng = random.Random(5)
    found = []
    for number in range(count):
        sentences = (" ".join(rng.sample(NOUNS, rng.randrange(3, 7))).capitalize() + "." for _ in range(9))
        messages = [{"role": "user", "content": "Repeat this text:\n" + " ".join(sentences)}]
        prompt = parts.tokenizer.encode(parts.tokenizer.render_chat(messages), add_special_tokens=False)
        params = SamplingParams(temperature=0.0, seed=number, max_tokens=120)
        found.append(
            Request(request_id=f"c{number}", prompt_token_ids=prompt, params=params, adapter=adapter)
        )
    return found


def _fixed(engine: Engine, proposers: list[Proposer], width: int, nodes: int) -> Any:
    return speculate(engine, proposers, pace="fixed", max_depth=DEPTH, max_nodes=nodes, width=width)


def _turns(
    engine: Engine,
    settings: dict[str, Speculator],
    requests: list[Request],
    texts: Texts,
    served: dict[str, list[Served]],
) -> Case:
    """Serves each request by all `settings` in turn before the next one, another first each time: the machine changes
    from second to second. What each run gave last is kept in `served`."""

    def run(seed: str) -> Figures:
        for name in settings:
            served[name] = []
        for number, request in enumerate(requests):
            names = list(settings)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                engine.speculate(settings[name])
                found = serve(engine, [request])
                if any(texts[key] != text for key, text in found.texts().items()):
                    raise RuntimeError("the text changed")
                served[name].append(found)
        figures = {name: _figures(found) for name, found in served.items()}
        plain = figures["plain"]["tok_s"]
        return {f"{name}_{key}": value for name, each in figures.items() for key, value in each.items()} | {
            f"{name}_speedup": each["tok_s"] / plain for name, each in figures.items() if name != "plain"
        }

    return run


def _figures(found: list[Served]) -> Figures:
    tokens = sum(step.decode_rows + step.num_accepted for each in found for step in each.decoding)
    roots = sum(step.decode_rows for each in found for step in each.decoding)
    seconds = sum(each.decode_seconds for each in found)
    proposing = sum(step.seconds["propose"] for each in found for step in each.decoding)
    return {
        "tok_s": tokens / seconds,
        "tokens_per_step": tokens / roots,
        "draft_share": proposing / seconds,
    }


def measure_copy(spec: dict[str, Any]) -> dict[str, Any]:
    """N-gram look-up with the embedded adapter that repeats what it is given."""
    if "repeat" not in ADAPTERS:
        return {"speedup_copy_batch1": None, "error": "there is no embedded adapter that repeats"}
    count = 4 if spec["quick"] else 16
    with engine_parts(spec, speculate=("ngram",), prefix_cache=False) as parts:
        engine = parts.engine
        library = open_library(options_of(spec))
        prepared, _ = library.packer.prepare(ADAPTERS["repeat"])
        offer_adapter(engine, parts.adapters, prepared.content_id, prepared.image)
        requests = copies(parts, count, prepared.content_id)
        adaptive = engine.speculator
        settings = {"plain": speculate(engine, []), "ngram": adaptive}
        texts = {}
        engine.speculate(settings["plain"])
        for request in requests:
            texts |= serve(engine, [request]).texts()

        served: dict[str, list[Served]] = {}
        turns = _turns(engine, settings, requests, texts, served)
        for number in range(2):
            turns(f"warm/{number}")
        found = Referee.of(spec).measure({"turns": turns})
        library.close()
    return {
        "speedup_copy_batch1": found.median("turns", "ngram_speedup"),
        "tokens_per_step_copy": found.median("turns", "ngram_tokens_per_step"),
        "output_tokens": sum(map(len, texts.values())),
        **found.summary(),
    }
