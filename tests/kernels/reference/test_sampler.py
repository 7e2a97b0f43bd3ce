"""The sampler against its oracle in plain loops, and against the laws that it should draw from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels.harness import Entry, logit_rows
from tokenloom.engine.batch import LogitEdits, StepResult
from tokenloom.kernels.reference.gemm import PackedLinear
from tokenloom.kernels.reference.sampler import Sampler
from tokenloom.kernels.spec import logprob
from tokenloom.kernels.spec_sampling import choose, edited, kept_tokens

Float32 = NDArray[np.float32]


def sample(logits: Any, entries: list[Entry]) -> StepResult:
    """Sample from given logits: the head is the identity, which passes fp32 through exactly."""
    rows = np.asarray(logits, np.float32)
    sampler = Sampler(PackedLinear(np.eye(rows.shape[1], dtype=np.float32)))
    with np.errstate(all="ignore"):
        return sampler.sample(rows, logit_rows(entries))


def random_edits(rng: np.random.Generator, vocab_size: int) -> LogitEdits:
    edits = LogitEdits()
    if rng.random() < 0.4:
        edits.allowed_ids = np.sort(rng.permutation(vocab_size)[: rng.integers(1, vocab_size)]).astype(
            np.int32
        )
    if rng.random() < 0.6:
        edits.seen_ids = rng.permutation(vocab_size)[: rng.integers(1, vocab_size)].astype(np.int32)
        edits.output_counts = rng.integers(0, 3, len(edits.seen_ids)).astype(np.int32)
        edits.repetition_penalty = float(rng.choice([1.0, 1.3, 0.7]))
        edits.frequency_penalty = float(rng.choice([0.0, 0.5]))
        edits.presence_penalty = float(rng.choice([0.0, -0.4]))
    if rng.random() < 0.6:
        edits.bias_ids = rng.permutation(vocab_size)[: rng.integers(1, 9)].astype(np.int32)
        edits.bias = rng.choice([2.5, -3.0, -np.inf], len(edits.bias_ids)).astype(np.float32)
    return edits


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), is_coarse=st.booleans(), vocab_size=st.sampled_from([9, 33, 70]))
def test_equals_the_oracle(seed: int, is_coarse: bool, vocab_size: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((6, vocab_size)) * rng.choice([0.5, 3, 12])).astype(np.float32)
    if is_coarse:  # many ties
        logits = np.round(logits)
    entries = [
        Entry(
            row=int(rng.integers(6)),
            temperature=float(np.float32(rng.choice([0, 0.2, 1, 1.7]))),
            top_k=int(rng.choice([0, 1, 5, vocab_size, 1000])),
            top_p=float(np.float32(rng.choice([1, 0.9, 0.3, 1e-6]))),
            min_p=float(np.float32(rng.choice([0, 0.02, 0.5, 1]))),
            seed=int(rng.integers(0, 2**63)),
            sample_index=int(rng.integers(4)),
            position=int(rng.integers(1000)),
            edits=random_edits(rng, vocab_size) if rng.random() < 0.5 else None,
        )
        for _ in range(12)
    ]
    found = sample(logits, entries)
    for entry, token in zip(entries, found.token_ids.tolist(), strict=True):
        with np.errstate(all="ignore"):
            expected = choose(
                logits[entry.row],
                entry.edits,
                temperature=entry.temperature,
                top_k=entry.top_k,
                top_p=entry.top_p,
                min_p=entry.min_p,
                seed=entry.seed,
                sample_index=entry.sample_index,
                position=entry.position,
            )
        assert token == expected, entry


def test_entries_do_not_depend_on_their_tile() -> None:
    """More entries and rows than a tile, against each entry alone."""
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((90, 50)) * 3).astype(np.float32)
    entries = [
        Entry(
            int(rng.integers(90)), temperature=0.9, top_k=int(rng.choice([0, 7])), top_p=float(rng.choice([1, 0.8])),
            seed=i, position=i, num_logprobs=int(rng.integers(-1, 4)),
        )
        for i in range(300)
    ]  # fmt: skip
    together = sample(logits, entries)
    for i, entry in enumerate(entries):
        alone = sample(logits[entry.row : entry.row + 1], [replace(entry, row=0)])
        assert together.token_ids[i] == alone.token_ids[0]
        assert together.logprobs[i].tobytes() == alone.logprobs[0].tobytes()
        assert (i in together.top) == (0 in alone.top)
        if i in together.top:
            assert together.top[i].token_ids.tolist() == alone.top[0].token_ids.tolist()
            assert together.top[i].logprobs.tolist() == alone.top[0].logprobs.tolist()
            assert together.top[i].rank == alone.top[0].rank


def test_many_samples_of_one_row() -> None:
    logits = np.zeros((1, 40), np.float32)
    found = sample(logits, [Entry(0, temperature=1.0, sample_index=i) for i in range(128)])
    assert len(set(found.token_ids.tolist())) > 20


@pytest.mark.parametrize("settings_", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_draws_follow_the_law(settings_: dict[str, Any]) -> None:
    logits = np.array([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0]], np.float32)
    temperature, count = 0.8, 4000
    entries = [Entry(0, temperature=temperature, seed=1, position=i, **settings_) for i in range(count)]
    found = np.bincount(sample(logits, entries).token_ids, minlength=8)
    scores = (logits[0] - logits[0].max()) / np.float32(temperature)
    rule = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings_
    law = np.zeros(8)
    for token in kept_tokens(scores, rule["top_k"], rule["top_p"], rule["min_p"]):
        law[token] = math.exp(scores[token])
    law /= law.sum()
    assert (found[law == 0] == 0).all()
    kept = law > 0
    statistic = ((found[kept] - count * law[kept]) ** 2 / (count * law[kept])).sum()
    # The 0.999 quantile of chi-square with 7 degrees of freedom; the seed is fixed.
    assert statistic < 24.4


def test_logprobs_are_of_the_raw_distribution() -> None:
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((1, 60)) * 4).astype(np.float32)
    edits = LogitEdits(bias_ids=np.array([5], np.int32), bias=np.array([100.0], np.float32))
    found = sample(logits, [Entry(0, num_logprobs=3, edits=edits), Entry(0, target=9, num_logprobs=0)])
    assert found.token_ids.tolist() == [5, 9]
    for i, token in enumerate((5, 9)):
        assert found.logprobs[i] == pytest.approx(logprob(logits[0], token), abs=2e-6)
    order = np.argsort(-logits[0], kind="stable")
    assert found.top[0].token_ids.tolist() == order[:3].tolist()
    assert found.top[0].rank == order.tolist().index(5) + 1
    assert found.top[1].rank == order.tolist().index(9) + 1
    assert len(found.top[1].token_ids) == 0
    assert (np.diff(found.top[0].logprobs) <= 0).all()


def test_no_logprob_unless_asked() -> None:
    found = sample(np.zeros((1, 5)), [Entry(0), Entry(0, target=2)])
    assert np.isnan(found.logprobs[0])
    assert found.logprobs[1] == pytest.approx(math.log(1 / 5))
    assert found.top == {}


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 3.0, 2.0]])
    found = sample(logits, [Entry(0, num_logprobs=4)])
    assert found.token_ids.tolist() == [1]
    assert found.top[0].token_ids.tolist() == [1, 2, 3, 4]
    drawn = sample(logits, [Entry(0, temperature=1.0, top_k=2, position=i) for i in range(200)])
    assert set(drawn.token_ids.tolist()) == {1, 2}


def test_a_row_that_excludes_everything() -> None:
    nothing = np.arange(6, dtype=np.int32)
    bias = np.full(6, -np.inf, np.float32)
    edits = LogitEdits(bias_ids=nothing, bias=bias)
    narrowed = LogitEdits(allowed_ids=np.array([3, 4], np.int32), bias_ids=nothing, bias=bias)
    entries = [
        Entry(0, temperature=t, edits=e, num_logprobs=1) for t in (0.0, 1.0) for e in (edits, narrowed)
    ]
    assert sample(np.ones((1, 6)), entries).token_ids.tolist() == [0, 3, 0, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_broken_model_does_not_crash(value: float) -> None:
    logits = np.zeros((2, 300), np.float32)
    logits[0] = value
    logits[1, 7] = value
    entries = [
        Entry(row, temperature=t, top_k=k, top_p=p, num_logprobs=2)
        for row in (0, 1)
        for t, k, p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.5, 3, 0.5), (1e-30, 0, 1.0))
    ]
    sampler = Sampler(PackedLinear(np.eye(300, dtype=np.float32)))
    limit = np.finfo(np.float32).max

    def clipped(hidden: NDArray[np.float32], rows: NDArray[Any]) -> NDArray[np.float32]:
        return np.fmin(np.fmax(hidden[rows], -np.inf), limit)

    sampler.logits = clipped  # type: ignore[method-assign]
    with np.errstate(all="ignore"):
        found = sampler.sample(logits, logit_rows(entries))
    assert ((found.token_ids >= 0) & (found.token_ids < 300)).all()


def test_edits_in_order() -> None:
    logits = np.array([[4.0, -2.0, 1.0, 0.5]], np.float32)
    edits = LogitEdits(
        allowed_ids=np.array([0, 1, 3], np.int32),
        seen_ids=np.array([0, 1, 2], np.int32),
        output_counts=np.array([2, 0, 1], np.int32),
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=1.0,
        bias_ids=np.array([1], np.int32),
        bias=np.array([3.0], np.float32),
    )
    # 4 / 2 - 2 * 0.25 - 1; -2 * 2 + 3; excluded; untouched.
    assert edited(logits[0], edits).tolist() == [0.5, -1.0, -np.inf, 0.5]
    assert sample(logits, [Entry(0, edits=edits)]).token_ids.tolist() == [0]


def test_softcap() -> None:
    rows = np.array([[50.0, -80.0, 3.0]], np.float32)
    sampler = Sampler(PackedLinear(np.eye(3, dtype=np.float32)), softcap=30.0)
    assert sampler.logits(rows, np.arange(len(rows))) == pytest.approx(30 * np.tanh(rows / 30), rel=1e-6)


def test_extreme_edits_cost_nobody_else() -> None:
    edits = LogitEdits(
        seen_ids=np.arange(4, dtype=np.int32), output_counts=np.ones(4, np.int32), repetition_penalty=1e-40
    )
    logits = np.array([[3.0, -2.0, 0.5, 1.0, 2.0]] * 2)
    result = sample(logits, [Entry(row=0, temperature=1.0, edits=edits), Entry(row=1, temperature=1.0)])
    assert result.token_ids[1] == sample(logits, [Entry(row=1, temperature=1.0)]).token_ids[0]
    assert result.token_ids[0] in (0, 2, 3)
