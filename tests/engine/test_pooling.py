"""Embeddings in the engine: which rows are asked for, and what becomes of them."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest

from tests.engine.helpers import drain, request, simulated_engine
from tests.engine.test_machine import shadow_engine
from tokenloom.clock import VirtualClock
from tokenloom.engine.batch import Ticket, TokenBatch
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.pooling import add_rows, mean_bytes, normalized, vector_of
from tokenloom.errors import ContextLengthExceeded, InvalidParameter
from tokenloom.runtime.null import NullExecutor
from tokenloom.runtime.simulated import SimulatedExecutor


def embedding(name: str, prompt: Any, pooling: str = "mean", **options: Any) -> Any:
    return request(name, prompt, pooling=pooling, max_tokens=0, **options)


def embeddings_of(engine: Engine) -> dict[str, bytes]:
    """The embedding of each request; every other delta has none."""
    found: dict[str, bytes] = {}
    for delta in drain(engine):
        assert (delta.embedding is not None) <= delta.last
        if delta.embedding is not None:
            assert delta.token_ids == [] and delta.finish_reason == "stop"
            found[delta.request_id] = delta.embedding
    return found


def watched(engine: Engine) -> list[TokenBatch]:
    """The batches that the engine submits from now on."""
    batches: list[TokenBatch] = []
    submit = engine.executor.submit

    def note(batch: TokenBatch) -> Ticket:
        batches.append(batch)
        return submit(batch)

    engine.executor.submit = note  # type: ignore[method-assign]
    return batches


# --- arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_a_sum_does_not_depend_on_how_it_is_cut(width: int) -> None:
    rng = np.random.default_rng(width)
    rows = (rng.standard_normal((300, width)) * 10.0 ** rng.integers(-9, 9, (300, width))).astype(np.float32)
    expected = np.zeros(width)
    for row in rows:
        expected += row.astype(np.float64)
    for _ in range(20):
        cuts = np.sort(rng.integers(0, 301, rng.integers(0, 12)))
        total = None
        for part in np.split(rows, cuts):
            total = add_rows(total, part)
        assert total is not None
        assert total.tobytes() == expected.tobytes()
    # Other orders do give other bits here, so that the comparison above can fail.
    assert add_rows(None, rows[::-1]).tobytes() != expected.tobytes()


def test_a_mean_is_rounded_once_and_written_little_endian() -> None:
    total = np.array([1.0, 1e-30, -7.0])
    data = mean_bytes(total, 3)
    assert data == struct.pack("<3f", *(value / 3 for value in total))
    assert vector_of(data).tolist() == [np.float32(value / 3) for value in total]


def test_the_length_of_a_normalized_vector_is_1() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-30, 1.0, 1e30):
        vector = (rng.standard_normal(1000) * scale).astype(np.float32)
        unit = normalized(vector)
        assert unit.dtype == np.float32
        assert math.isclose(math.fsum(float(x) ** 2 for x in unit), 1.0, rel_tol=1e-6)
        np.testing.assert_allclose(unit, vector / np.linalg.norm(vector.astype(np.float64)), rtol=2e-7)
    assert normalized(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


# --- rows ------------------------------------------------------------------------------------------------


def test_only_the_rows_that_are_pooled_are_asked_for_and_no_logits() -> None:
    engine = simulated_engine(budget=ChunkedPrefill(max_batch_tokens=16))
    batches = watched(engine)
    engine.add_request(embedding("m", range(40), "mean"))
    engine.add_request(embedding("l", range(100, 150), "last"))
    assert embeddings_of(engine).keys() == {"m", "l"}
    positions = [
        (int(batch.token_ids[row]), int(batch.positions[row]))
        for batch in batches
        for row in batch.hidden_rows
    ]
    assert sorted(positions) == [*((i, i) for i in range(40)), (149, 49)]
    assert sum(len(batch.logit_rows) for batch in batches) == 0


def test_values_of_the_simulated_executor() -> None:
    """What comes out is the mean of the rows that the executor gave, and the last of them."""
    engine = simulated_engine(budget=ChunkedPrefill(max_batch_tokens=7))
    rows: list[np.ndarray] = []
    collect = engine.executor.collect

    def note(ticket: Ticket) -> Any:
        result = collect(ticket)
        rows.append(result.hidden)
        return result

    engine.executor.collect = note  # type: ignore[method-assign]
    engine.add_request(embedding("m", range(4, 34)))
    mean = vector_of(embeddings_of(engine)["m"])
    given = np.concatenate(rows)
    assert len(given) == 30
    np.testing.assert_allclose(mean, given.mean(axis=0, dtype=np.float64), rtol=1e-7)
    engine.add_request(embedding("l", range(4, 34), "last"))
    assert (vector_of(embeddings_of(engine)["l"]) == given[-1]).all()


def test_the_null_executor_gives_zeros() -> None:
    limits = EngineLimits(vocab_size=10, max_context=64, num_pages=8, debug=True)
    engine = Engine(NullExecutor(), limits, clock=VirtualClock())
    engine.add_request(embedding("m", [1, 2, 3]))
    assert vector_of(embeddings_of(engine)["m"]).tolist() == [0.0]


# --- prefix cache, preemption, cancel --------------------------------------------------------------------


def test_last_reads_cached_pages_and_mean_does_not() -> None:
    prompt = [(3 * i) % 11 for i in range(48)]
    engine = shadow_engine(12)
    cached, found = [], []
    for i, pooling in enumerate(["mean", "mean", "last", "last"]):
        engine.add_request(embedding(f"r{i}", prompt, pooling))
        [delta] = drain(engine)
        cached.append(delta.num_cached_tokens)
        found.append(delta.embedding)
    assert cached == [0, 0, 47, 47]
    assert found[0] == found[1] != found[2] == found[3]
    # What a mean computed again is found by a completion.
    engine.add_request(request("c", prompt, max_tokens=1))
    assert drain(engine)[-1].num_cached_tokens == 47


def test_a_mean_that_is_preempted_half_way_goes_on() -> None:
    prompt = [(5 * i) % 11 for i in range(60)]
    alone = shadow_engine(8)
    alone.add_request(embedding("m", prompt))
    expected = embeddings_of(alone)["m"]
    engine = shadow_engine(
        8, budget=ChunkedPrefill(max_batch_tokens=16), order=QueueOrder("priority"), prefix_cache=True
    )
    engine.add_request(embedding("m", prompt, priority=5))
    engine.step()
    engine.step()
    [seq] = engine.scheduler.running
    assert seq.num_pooled == 32
    engine.add_request(request("urgent", [7] * 90, priority=0, max_tokens=3))
    engine.step()
    assert engine.scheduler.num_preemptions == 1
    assert seq.row < 0
    assert embeddings_of(engine) == {"m": expected}


def test_cancelled_embeddings_leave_nothing() -> None:
    engine = simulated_engine(budget=ChunkedPrefill(max_batch_tokens=16))
    for i in range(4):
        engine.add_request(embedding(f"r{i}", range(60), ["mean", "last"][i % 2]))
    engine.step()
    for i in range(4):
        assert engine.cancel(f"r{i}")
    assert not engine.has_work
    assert not engine.scheduler.cache.references
    engine.check()


# --- refusals --------------------------------------------------------------------------------------------


def test_the_whole_context_may_be_embedded() -> None:
    engine = simulated_engine(max_context=64)
    engine.add_request(embedding("fits", [1] * 64))
    assert embeddings_of(engine).keys() == {"fits"}
    with pytest.raises(ContextLengthExceeded, match="64"):
        engine.add_request(embedding("long", [1] * 65))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"pooling": "max"}, "pooling"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ],
)
def test_what_is_no_embedding_is_refused(options: dict[str, Any], param: str) -> None:
    engine = simulated_engine()
    with pytest.raises(InvalidParameter) as caught:
        engine.add_request(request("r", **({"pooling": "mean", "max_tokens": 0} | options)))
    assert caught.value.param == param
    assert not engine.has_work


def test_a_simulated_hidden_row_depends_on_nothing_but_its_token_and_position() -> None:
    assert isinstance(simulated_engine().executor, SimulatedExecutor)
    found = set()
    for chunk in (1, 5, 64):
        for company in (0, 3):
            engine = simulated_engine(budget=ChunkedPrefill(64, chunk))
            for i in range(company):
                engine.add_request(request(f"other{i}", range(i + 1, 30)))
            engine.add_request(embedding("m", range(50)))
            found.add(embeddings_of(engine)["m"])
    assert len(found) == 1
