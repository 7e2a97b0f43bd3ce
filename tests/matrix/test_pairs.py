"""Every pair of features on random workloads, with `==` on tokens and logprobs against the plain engine.

The plain engine serves each request alone: one chunk, no prefix cache, a large pool.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.kernels.harness import NATIVE, Numerics, each_numerics
from tests.matrix.workload import ADAPTERS, CONFIG, Outputs, Setup, base_requests, serve
from tokenloom.engine.engine import Engine
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.request import Pooling, Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.serving.requests import EMBEDDING_PARAMS


def cancels(engine: Engine, step: int) -> None:
    """Others come and go all the time."""
    if step < 40:
        rng = random.Random(step)
        prompt = [rng.randrange(CONFIG.vocab_size) for _ in range(rng.randrange(1, 60))]
        params = SamplingParams(temperature=1.0, seed=step, max_tokens=30, ignore_eos=True)
        engine.add_request(Request(request_id=f"extra-c{step}", prompt_token_ids=prompt, params=params))
        engine.cancel(f"extra-c{step - 3}")


def company(engine: Engine, step: int) -> None:
    """64 others in flight."""
    if step == 0:
        for i in range(64):
            params = SamplingParams(temperature=1.0, seed=i, max_tokens=10, ignore_eos=True)
            engine.add_request(
                Request(
                    request_id=f"extra-o{i}",
                    prompt_token_ids=[(i * j) % 211 for j in range(9)],
                    params=params,
                )
            )


def adapter_company(engine: Engine, step: int) -> None:
    """Others have adapters, which are sent away all the time."""
    if step < 30:
        params = SamplingParams(temperature=1.0, seed=step, max_tokens=3, ignore_eos=True)
        adapter = ADAPTERS[step % 2]
        engine.add_request(
            Request(request_id=f"extra-a{step}", prompt_token_ids=[step] * 9, params=params, adapter=adapter)
        )
    if step % 5 == 0:
        engine.adapters.evict_one(over_waiters=False)


def urgent(engine: Engine, step: int) -> None:
    """More urgent requests preempt."""
    if step in (2, 4, 6):
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        engine.add_request(
            Request(request_id=f"extra-u{step}", prompt_token_ids=[step] * 90, params=params, priority=-1)
        )


SETUPS: dict[str, dict[str, Any]] = {
    "chunk_1": {"max_chunk_tokens": 1},
    "chunk_7": {"max_chunk_tokens": 7},
    "small_budget": {"max_batch_tokens": 24},
    "prefix_cache": {"prefix_cache": True},
    "tiny_pool": {"num_pages": 21},
    "few_at_once": {"max_running": 4},
    "company": {"during": company},
    "cancels": {"during": cancels},
    "reserving": {"admission": "reserve"},
    "adapter_company": {"during": adapter_company},
    "urgent": {"during": urgent, "order": QueueOrder("priority")},
}
PARAMS: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 0.9},
    "nucleus": {"temperature": 1.2, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
    "samples_3": {"n": 3, "temperature": 1.0},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "bias": {"logit_bias": {5: 4.0, 9: -100.0}},
    "allowed": {"allowed_token_ids": tuple(range(0, 200, 3))},
    "min_tokens": {"min_tokens": 4},
    "stop_tokens": {"stop_token_ids": tuple(range(100, 140))},
    "stop_strings": {"stop": ("ab", "q", "xyz")},
    "ignore_eos": {"ignore_eos": True},
    "no_output": {"max_tokens": 0},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "many_logprobs": {"logprobs": 20},
}
POOLINGS: dict[str, Pooling] = {"mean": "mean", "last": "last"}
"""Two of the requests become embeddings, and keep none of the parameters."""
BAD_WORDS = ((11,), (20, 30), (33, 34, 35))


def changed(requests: list[Request], *names: str) -> list[Request]:
    out = []
    for request in requests:
        options: dict[str, Any] = {}
        for name in sorted(names):
            options |= PARAMS.get(name, {})
        if "no_output" in names:
            options["min_tokens"] = 0
        params = replace(request.params, **options)
        bad_words = BAD_WORDS if "bad_words" in names else ()
        tenant = request.request_id[-1] if "tenants" in names else ""
        adapter = ("", *ADAPTERS)[int(request.request_id[1:]) % 3] if "adapters" in names else ""
        out.append(replace(request, params=params, bad_word_ids=bad_words, tenant=tenant, adapter=adapter))
    for name in sorted(POOLINGS.keys() & set(names)):
        for i in (0, 3) if name == "mean" else (1, 2):
            out[i] = replace(out[i], params=EMBEDDING_PARAMS, pooling=POOLINGS[name])
    return out


FEATURES = [*SETUPS, *PARAMS, *POOLINGS, "bad_words", "tenants", "adapters", "trees"]
_plain: dict[Any, Outputs] = {}


def plain(names: frozenset[str], seed: int, numerics: Numerics) -> Outputs:
    """Each request alone, with the same parameters and arithmetic."""
    key = (names, seed, numerics)
    if key not in _plain:
        outputs: Outputs = {}
        for request in changed(base_requests(seed), *names):
            outputs |= serve(Setup(numerics=numerics), [request])
        _plain[key] = outputs
    return _plain[key]


@each_numerics(Numerics(), *NATIVE[1:])
@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(FEATURES, 2)))
def test_pair(one: str, two: str, numerics: Numerics) -> None:
    seed = FEATURES.index(one) % 3
    options = SETUPS.get(one, {}) | SETUPS.get(two, {})
    hooks: list[Callable[[Engine, int], None]] = [
        SETUPS[name]["during"] for name in (one, two) if "during" in SETUPS.get(name, {})
    ]
    options["during"] = lambda engine, step: [hook(engine, step) for hook in hooks]
    names = frozenset({one, two} & ({*PARAMS, *POOLINGS, "bad_words", "tenants", "adapters"}))
    expected = plain(names, seed, numerics)
    if two == "trees":
        options["texts"] = {key: output[0] for key, output in expected.items()}
    outputs = serve(Setup(numerics=numerics, **options), changed(base_requests(seed), one, two))
    assert outputs == expected
