"""Scores and embeddings of prompts, of every family, through the engine.

In fp32 they equal those of transformers: the log-softmax of its teacher-forced logits, and its last hidden state
behind the last norm. In every format they do not depend on chunks, company, threads or preemption.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.harness import NATIVE, REFERENCE, Numerics, each_numerics
from tests.models import test_families as families
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.pooling import vector_of
from tokenloom.engine.request import Pooling, Request, TokenLogprobs
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.serving.requests import embedding_request

torch = pytest.importorskip("torch", reason="torch is the oracle here")

TOP = 3
each_family = pytest.mark.parametrize("name", families.FAMILIES)


@functools.cache
def hidden_states(name: str) -> NDArray[np.float32]:
    """What the head of the model of transformers reads, [length, width]."""
    model = families.theirs(name)
    with torch.no_grad():
        output = model(torch.tensor([families.tokens(name)]), output_hidden_states=True)
    states: NDArray[np.float32] = output.hidden_states[-1][0].numpy()
    return states


def engine_of(
    name: str, numerics: Numerics, max_batch_tokens: int = 512, max_chunk_tokens: int = 0
) -> Engine:
    vocab_size = families.SMALL["vocab_size"]
    limits = EngineLimits(vocab_size=vocab_size, max_context=256, num_pages=20, debug=True)
    return Engine(
        families.ours(name, numerics),
        limits,
        budget=ChunkedPrefill(max_batch_tokens, max_chunk_tokens),
        order=QueueOrder("priority"),
    )


def scoring(name: str, text: list[int], **options: Any) -> Request:
    params = SamplingParams(max_tokens=0, temperature=0.0, seed=0, prompt_logprobs=TOP)
    return Request(request_id=name, prompt_token_ids=text, params=params, **options)


def embedding(name: str, text: list[int], pooling: Pooling, **options: Any) -> Request:
    return embedding_request(text, pooling, request_id=name, **options)


Answer = bytes | list[TokenLogprobs]


def answers(engine: Engine) -> dict[str, Answer]:
    """The embedding or the scores of each request."""
    found: dict[str, Answer] = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.embedding is not None:
                found[delta.request_id] = delta.embedding
            elif delta.prompt_logprobs is not None:
                found[delta.request_id] = delta.prompt_logprobs
    engine.close()
    return found


@each_family
@pytest.mark.column("outputs")
@each_numerics(Numerics(), NATIVE[0])
def test_scores_and_embeddings_equal_those_of_transformers(name: str, numerics: Numerics) -> None:
    text = families.tokens(name)
    engine = engine_of(name, numerics, max_batch_tokens=90)
    engine.add_request(scoring("scores", text))
    found = answers(engine)["scores"]
    logits = torch.tensor(families.expected(name)).double()
    logprobs = torch.log_softmax(logits, dim=-1).numpy()
    assert len(found) == len(text) - 1
    for position, entry in enumerate(found):
        assert isinstance(entry, TokenLogprobs)
        row = logprobs[position]
        assert entry.token_id == text[position + 1]
        np.testing.assert_allclose(entry.logprob, row[entry.token_id], rtol=1e-4, atol=2e-4)
        np.testing.assert_allclose(
            [value for _, value in entry.top], np.sort(row)[: -TOP - 1 : -1], atol=2e-4
        )
        near = np.abs(row - row[entry.token_id]) < 2e-4
        assert abs(entry.rank - 1 - int((row > row[entry.token_id]).sum())) < near.sum()

    states = hidden_states(name)
    assert np.abs(states).mean() > 0.1
    for length in (1, 16, 137, len(text)):
        engine = engine_of(name, numerics, max_batch_tokens=70)
        for pooling in ("mean", "last"):
            engine.add_request(embedding(pooling, text[:length], pooling))  # type: ignore[arg-type]
        got = {key: vector_of(value) for key, value in answers(engine).items() if isinstance(value, bytes)}
        mean = states[:length].mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(got["mean"], mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got["last"], states[length - 1], rtol=1e-4, atol=1e-4)


def crowd(text: list[int]) -> list[Request]:
    """Scores and embeddings of texts that share prefixes."""
    requests = []
    for i, length in enumerate((150, 64, 33, 1)):
        # One token has no score.
        requests += [scoring(f"s{i}", text[:length])] if length > 1 else []
        requests += [embedding(f"m{i}", text[:length], "mean"), embedding(f"l{i}", text[:length], "last")]
    return requests


@each_family
@pytest.mark.column("cache")
@each_numerics(*REFERENCE, *NATIVE)
def test_they_depend_on_nothing_but_the_prompt(name: str, numerics: Numerics) -> None:
    text = families.tokens(name)
    alone: dict[str, Answer] = {}
    engine = engine_of(name, numerics)
    for request in crowd(text):
        # Nobody finds the pages of the one before.
        engine.add_request(request)
        while engine.has_work:
            for delta in engine.step():
                alone[delta.request_id] = delta.embedding or delta.prompt_logprobs or []
        engine.scheduler.cache.clear()
    engine.close()
    together = engine_of(name, numerics, max_batch_tokens=48, max_chunk_tokens=13)
    for request in crowd(text):
        request.priority = 1
        together.add_request(request)
    for _ in range(3):
        together.step()
    # It needs pages of those that are half done.
    together.add_request(
        Request(
            request_id="urgent",
            prompt_token_ids=text[::-1][:180],
            params=SamplingParams(max_tokens=4, temperature=1.0, seed=1, ignore_eos=True),
        )
    )
    found = answers(together)
    assert together.scheduler.num_preemptions > 0
    assert together.scheduler.prefix_hits > 0
    assert found == alone
