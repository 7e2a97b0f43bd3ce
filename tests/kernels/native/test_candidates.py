"""The candidates of a draft against their oracle, bit for bit on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.harness import Entry, logit_rows
from tests.kernels.native.test_sampler import Float32, random_entry, random_logits
from tokenloom.kernels.draft_work import MAX_CANDIDATES
from tokenloom.kernels.spec_sampling import candidates, choose, finished

native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native module is not built")


def check(logits: Float32, entries: list[Entry]) -> list[list[tuple[int, float]]]:
    """Native results, which are the oracle's on every instruction set."""
    assert native.max_candidates == MAX_CANDIDATES
    expected = []
    with np.errstate(all="ignore"):
        final = finished(logits)
        for e in entries:
            state = (e.temperature, e.top_k, e.top_p, e.min_p, e.seed, e.sample_index, e.position)
            names = ("temperature", "top_k", "top_p", "min_p", "seed", "sample_index", "position")
            asked = dict(zip(names, state, strict=True))
            expected.append(candidates(final[e.row], e.edits, **asked, count=MAX_CANDIDATES))
            if expected[-1]:
                assert expected[-1][0][0] == choose(final[e.row], e.edits, **asked)
    for isa in native.isas():
        found = native.candidates(logits, logit_rows(entries), isa)
        for (tokens, scores), wanted, entry in zip(found, expected, entries, strict=True):
            assert list(zip(tokens.tolist(), scores.tolist(), strict=True)) == wanted, (isa, entry)
    return expected


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vocab_size=st.sampled_from([1, 2, 7, 8, 9, 33, 64, 70, 127, 1025]))
def test_equal_the_oracle(seed: int, vocab_size: int) -> None:
    rng = np.random.default_rng(seed)
    entries = [random_entry(rng, 3, vocab_size) for _ in range(8)]
    for entry in entries:
        entry.target = -1
    check(random_logits(rng, (3, vocab_size)), entries)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 12.0, 200.0])
@pytest.mark.parametrize("vocab_size", [4096, 32001])
def test_large_vocabularies(vocab_size: int, spread: float) -> None:
    """Flat and peaked rows: those where the eighth best token is far below what could be drawn, too."""
    rng = np.random.default_rng(vocab_size)
    logits = (rng.standard_normal((1, vocab_size)) * spread).astype(np.float32)
    entries = [
        Entry(0),
        Entry(0, temperature=1.0, seed=1, position=77),
        Entry(0, temperature=0.1, seed=2, position=1 << 40),
        Entry(0, temperature=1.0, top_k=50, seed=3),
        Entry(0, temperature=2.0, top_k=3, seed=4),
        Entry(0, temperature=0.5, top_k=200, top_p=0.95, seed=5),
        Entry(0, temperature=1.0, top_p=0.9, seed=6),
        Entry(0, temperature=1.5, min_p=0.01, seed=7),
    ]
    found = check(logits, entries)
    assert [len(best) for best in found][:4] == [8] * 4
    assert len(found[4]) == 3


def test_ties_go_to_the_lowest_ids() -> None:
    logits = np.zeros((1, 200), np.float32)
    logits[0, [150, 40, 41]] = 1
    (best,) = check(logits, [Entry(0)])
    assert [token for token, _ in best] == [40, 41, 150, 0, 1, 2, 3, 4]


def test_a_row_that_excludes_everything_has_none() -> None:
    logits = np.full((1, 50), -np.inf, np.float32)
    assert check(logits, [Entry(0), Entry(0, temperature=1.0)]) == [[], []]
    logits[0, 30] = 2
    assert [[t for t, _ in best] for best in check(logits, [Entry(0), Entry(0, temperature=1.0)])] == [
        [30]
    ] * 2
