"""The native sampler against its oracle, bit for bit on every instruction set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels.harness import Entry, logit_rows
from tokenloom.engine.batch import LogitEdits, LogitRows
from tokenloom.kernels.spec_sampling import choose, finished, scored

native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native module is not built")

Float32 = NDArray[np.float32]
ISAS = native.isas()
INFINITY = float("inf")


def bits(values: Any) -> list[int]:
    """Bits of fp32 numbers, with one NaN."""
    array = np.array(values, np.float32).reshape(-1)
    array[np.isnan(array)] = np.nan
    return list(array.view(np.uint32).tolist())


def expected(logits: Float32, entry: Entry) -> tuple[int, list[int], Any]:
    with np.errstate(all="ignore"):
        token = entry.target
        if token < 0:
            token = choose(
                logits,
                entry.edits,
                temperature=entry.temperature,
                top_k=entry.top_k,
                top_p=entry.top_p,
                min_p=entry.min_p,
                seed=entry.seed,
                sample_index=entry.sample_index,
                position=entry.position,
            )
        result = scored(logits, token, entry.num_logprobs, entry.target >= 0)
    top = result.top and (result.top.token_ids.tolist(), bits(result.top.logprobs), result.top.rank)
    return token, bits(result.logprob), top


def check(logits: Any, entries: list[Entry], softcap: float | None = None) -> None:
    rows = np.ascontiguousarray(logits, np.float32)
    with np.errstate(all="ignore"):
        final = finished(rows, softcap)
    wanted = [expected(final[entry.row], entry) for entry in entries]
    for isa in ISAS:
        tokens, logprobs, tops = native.sample(rows, logit_rows(entries), isa, softcap)
        for i, (entry, (token, logprob, top)) in enumerate(zip(entries, wanted, strict=True)):
            assert tokens[i] == token, (isa, entry)
            assert bits(logprobs[i]) == logprob, (isa, entry)
            assert (i in tops) == (top is not None)
            if top is not None:
                ids, values, rank = tops[i]
                assert (ids.tolist(), bits(values), rank) == top, (isa, entry)


def random_edits(rng: np.random.Generator, vocab_size: int) -> LogitEdits:
    edits = LogitEdits()
    if rng.random() < 0.4:
        edits.allowed_ids = rng.permutation(vocab_size)[: rng.integers(0, vocab_size)].astype(np.int32)
    if rng.random() < 0.6:
        edits.seen_ids = rng.integers(0, vocab_size, rng.integers(1, vocab_size + 1)).astype(np.int32)
        if rng.random() < 0.7:
            edits.output_counts = rng.integers(0, 3, len(edits.seen_ids)).astype(np.int32)
        edits.repetition_penalty = float(rng.choice([1.0, 1.3, 0.7, 1e-40]))
        edits.frequency_penalty = float(rng.choice([0.0, 0.5]))
        edits.presence_penalty = float(rng.choice([0.0, -0.4]))
    if rng.random() < 0.6:
        edits.bias_ids = rng.integers(0, vocab_size, rng.integers(1, 9)).astype(np.int32)
        edits.bias = rng.choice([2.5, -3.0, -np.inf, np.inf, np.nan], len(edits.bias_ids)).astype(np.float32)
    return edits


def random_entry(rng: np.random.Generator, num_rows: int, vocab_size: int) -> Entry:
    return Entry(
        row=int(rng.integers(num_rows)),
        target=int(rng.integers(vocab_size)) if rng.random() < 0.1 else -1,
        temperature=float(np.float32(rng.choice([0, 1e-40, 1e-4, 0.2, 1, 1, 1.7, 30, 1e20, 3e38]))),
        top_k=int(rng.choice([0, 0, 1, 5, 40, vocab_size, 100000])),
        top_p=float(np.float32(rng.choice([1, 1, 0.9999, 0.9, 0.3, 1e-6, 0]))),
        min_p=float(np.float32(rng.choice([0, 0, 1e-42, 0.02, 0.5, 1]))),
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        sample_index=int(rng.integers(2**32)),
        position=int(rng.integers(2**56)),
        num_logprobs=int(rng.choice([-1, -1, 0, 1, 5, 20, vocab_size + 3])),
        edits=random_edits(rng, vocab_size) if rng.random() < 0.4 else None,
    )


def random_logits(rng: np.random.Generator, shape: tuple[int, int]) -> Float32:
    scale = rng.choice([0, 1e-6, 0.5, 3, 12, 1e4, 1e38])
    with np.errstate(over="ignore"):
        logits = (rng.standard_normal(shape) * scale).astype(np.float32)
    if rng.random() < 0.3:  # many ties
        logits = np.round(logits)
    if rng.random() < 0.2:
        special = rng.random(shape) < rng.choice([0.01, 0.5, 0.99])
        values = np.array([np.nan, np.inf, -np.inf, -0.0, 3e38, 1e-42], np.float32)
        logits[special] = rng.choice(values, int(special.sum()))
    return logits


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vocab_size=st.sampled_from([1, 2, 9, 16, 33, 64, 70, 127, 1025]))
def test_equals_the_oracle(seed: int, vocab_size: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (3, vocab_size))
    softcap = None if rng.random() < 0.7 else float(rng.choice([0.5, 30.0]))
    check(logits, [random_entry(rng, 3, vocab_size) for _ in range(8)], softcap)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0])
@pytest.mark.parametrize("vocab_size", [5003, 20000])
def test_large_vocabularies(spread: float, vocab_size: int) -> None:
    """Where shells have to be cut more than once, and lists are sorted out by mass."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, vocab_size)) * spread
    truncations: list[dict[str, Any]] = [
        {"top_k": 3000}, {"top_p": 0.5}, {"top_p": 0.999}, {"top_k": 2500, "top_p": 0.7}, {"min_p": 0.1},
        {"top_k": vocab_size - 1}, {"min_p": 0.01, "top_p": 0.95},
    ]  # fmt: skip
    entries = [Entry(0, temperature=0.9, seed=i, **rule) for i, rule in enumerate(truncations)]
    check(logits, [replace(e, num_logprobs=2 * e.seed) for e in entries])


def test_sums_at_the_largest_vocabulary() -> None:
    """All tokens alike: every sum of masses is as large as it can be."""
    logits = np.zeros((1, native.max_vocabulary), np.float32)
    check(logits, [Entry(0, temperature=1.0, top_p=0.6, seed=3, num_logprobs=2)])


def test_coarse_scores_in_a_large_vocabulary() -> None:
    """Boundaries of top_k and top_p within thousands of ties."""
    logits = np.round(np.random.default_rng(1).standard_normal((1, 6001)))
    rules: list[dict[str, Any]] = [{"top_k": 1000}, {"top_p": 0.6}, {"top_k": 4000, "top_p": 0.8}]
    check(logits, [Entry(0, temperature=1.0, num_logprobs=900, **rule) for rule in rules])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 0.0, -0.0])
def test_rows_of_one_value(value: float) -> None:
    logits = np.zeros((2, 300), np.float32)
    logits[0] = value
    logits[1, 7] = value
    entries = [
        Entry(row, temperature=t, top_k=k, top_p=p, num_logprobs=2, position=i)
        for row in (0, 1)
        for t, k, p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.5, 3, 0.5), (1e-30, 0, 1.0), (1.0, 0, 0.4))
        for i in range(3)
    ]
    check(logits, entries)


def test_everything_is_excluded() -> None:
    nothing, bias = np.arange(6, dtype=np.int32), np.full(6, -np.inf, np.float32)
    edits = LogitEdits(bias_ids=nothing, bias=bias)
    narrowed = LogitEdits(allowed_ids=np.array([4, 3], np.int32), bias_ids=nothing, bias=bias)
    none = LogitEdits(allowed_ids=np.zeros(0, np.int32))
    check(
        np.ones((1, 6)),
        [
            Entry(0, temperature=t, edits=e, num_logprobs=1)
            for t in (0.0, 1.0)
            for e in (edits, narrowed, none)
        ],
    )


def test_noise_decides_everywhere() -> None:
    """Flat rows: every token is drawn at some position, and each draw is the oracle's."""
    entries = [Entry(0, temperature=1.0, position=i, sample_index=i % 3) for i in range(300)]
    check(np.zeros((1, 50)), entries)
    check(np.zeros((1, 2000)), entries[:40])


def test_no_entries() -> None:
    tokens, logprobs, tops = native.sample(np.zeros((1, 4), np.float32), logit_rows([]))
    assert len(tokens) == len(logprobs) == len(tops) == 0


def _spoiled(**columns: Any) -> LogitRows:
    return replace(logit_rows([Entry(0, temperature=1.0)]), **columns)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", np.array([1], np.int32)),
        ("rows", np.array([-1], np.int32)),
        ("rows", np.array([0], np.int64)),
        ("targets", np.array([4], np.int32)),
        ("targets", np.array([-2], np.int32)),
        ("targets", np.array([0, 0], np.int32)),
        ("temperatures", np.array([-1], np.float32)),
        ("temperatures", np.array([np.nan], np.float32)),
        ("temperatures", np.array([np.inf], np.float32)),
        ("temperatures", np.array([1], np.float64)),
        ("temperatures", np.array([[1]], np.float32)),
        ("top_k", np.array([-1], np.int32)),
        ("top_p", np.array([1.5], np.float32)),
        ("top_p", np.array([np.nan], np.float32)),
        ("min_p", np.array([-0.5], np.float32)),
        ("seeds", np.array([1], np.int64)),
        ("sample_index", None),
        ("positions", np.array([2**56])),
        ("positions", np.array([-1])),
        ("num_logprobs", np.array([-2], np.int32)),
    ],
)
def test_refuses_bad_columns(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        native.sample(np.zeros((1, 4), np.float32), _spoiled(**{name: value}))


@pytest.mark.parametrize(
    ("name", "edits"),
    [
        ("allowed_ids", {"allowed_ids": np.array([4], np.int32)}),
        ("allowed_ids", {"allowed_ids": np.array([1], np.int64)}),
        ("seen_ids", {"seen_ids": np.array([-1], np.int32)}),
        ("output_counts", {"seen_ids": np.array([1], np.int32), "output_counts": np.array([-1], np.int32)}),
        ("output_counts", {"seen_ids": np.array([1], np.int32), "output_counts": np.zeros(2, np.int32)}),
        ("bias_ids", {"bias_ids": np.array([9], np.int32), "bias": np.zeros(1, np.float32)}),
        ("bias", {"bias_ids": np.array([1], np.int32), "bias": np.zeros(2, np.float32)}),
        ("bias", {"bias_ids": np.array([1], np.int32), "bias": np.zeros(1)}),
    ],
)
def test_refuses_bad_edits(name: str, edits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        native.sample(np.zeros((1, 4), np.float32), _spoiled(edits={0: LogitEdits(**edits)}))


def test_refuses_bad_arguments() -> None:
    entries = logit_rows([])
    with pytest.raises(ValueError, match="logits"):
        native.sample(np.zeros((1, 0), np.float32), entries)
    with pytest.raises(ValueError, match="logits"):
        native.sample(np.zeros((0, native.max_vocabulary + 1), np.float32), entries)
    with pytest.raises(ValueError, match="softcap"):
        native.sample(np.zeros((1, 4), np.float32), entries, softcap=-1.0)
    with pytest.raises(ValueError, match="isa|instruction"):
        native.sample(np.zeros((1, 4), np.float32), entries, isa="sse")
    with pytest.raises(TypeError):
        native.sample(np.zeros((1, 4)), entries)
