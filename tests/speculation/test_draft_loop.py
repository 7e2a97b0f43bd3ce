"""The loop of a draft against the definition: every path recomputed from scratch, on both backends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.kernels.harness import (
    NATIVE,
    Entry,
    Numerics,
    Run,
    each_numerics,
    make_batch,
    make_executor,
    random_weights,
    small_config,
    step,
)
from tests.speculation.draft_oracle import Logits, Sampling, fresh_logits, tree
from tokenloom.engine.batch import PAGE_SIZE, LogitEdits
from tokenloom.engine.proposer import Proposal
from tokenloom.kernels.draft_work import DraftWork, scratch_pages
from tokenloom.models.llama import build
from tokenloom.runtime.local import LocalExecutor
from tokenloom.speculation.draft_loop import draft, draft_by_levels

CONFIG = small_config()
VOCAB = CONFIG.vocab_size
FORMATS = [Numerics(), *NATIVE[:2], NATIVE[-1]]

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, seed=3),
    Sampling(temperature=1.0, top_k=5, seed=1 << 63),
    Sampling(temperature=1.3, top_p=0.7, seed=5, sample_index=2),
    Sampling(temperature=0.7, min_p=0.05, seed=6),
    Sampling(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, seed=7),
    Sampling(temperature=1.0, top_k=1, seed=8),
]


@dataclass
class Case:
    """A text of which the draft has `stored` tokens, and the tree that is wanted behind it."""

    tokens: Sequence[int]
    stored: int
    depth: int
    width: int
    sampling: Sampling = SAMPLINGS[0]


def work_of(executor: LocalExecutor, cases: Sequence[Case]) -> DraftWork:
    """Store what the cases say is stored, on scattered pages, and lay out the rest."""
    pages = list(range(96))
    random.Random(5).shuffle(pages)
    runs, entries, scratch = [], [], []
    for case in cases:
        own = [pages.pop() for _ in range(-(-len(case.tokens) // PAGE_SIZE))]
        if case.stored:
            step(executor, make_batch([Run(case.tokens, 0, case.stored, own)]))
        runs.append(Run(case.tokens, case.stored, len(case.tokens), own))
        count = scratch_pages(len(case.tokens), case.depth)
        scratch.append([[pages.pop() for _ in range(count)] for _ in range(case.width)])
    row = -1
    for run, case in zip(runs, cases, strict=True):
        row += run.end - run.start
        s = case.sampling
        entries.append(
            Entry(
                row,
                temperature=s.temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                min_p=s.min_p,
                seed=s.seed,
                sample_index=s.sample_index,
                position=len(case.tokens),
                edits=s.edits,
            )
        )
    shape = (len(cases), max(c.width for c in cases), max(len(beams[0]) for beams in scratch))
    table = np.zeros(shape, np.int32)
    for s, beams in enumerate(scratch):
        for b, found in enumerate(beams):
            table[s, b, : len(found)] = found
    return DraftWork(
        make_batch(runs, entries),
        np.array([case.depth for case in cases], np.int32),
        np.array([case.width for case in cases], np.int32),
        table,
    )


def check(found: Sequence[Proposal], cases: Sequence[Case], logits: Logits) -> None:
    assert len(found) == len(cases)
    for proposal, case in zip(found, cases, strict=True):
        expected = tree(logits, case.tokens, case.sampling, case.depth, case.width)
        assert proposal.tokens == expected.tokens
        assert proposal.parents == expected.parents
        assert proposal.ranks == expected.ranks
        assert proposal.confidences == pytest.approx(expected.confidences, rel=1e-9)


def text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


@each_numerics(*FORMATS)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33])
def test_chains_and_trees_around_page_borders(numerics: Numerics, length: int) -> None:
    rng = random.Random(length)
    logits = fresh_logits(make_executor(CONFIG, numerics))
    for width, depth in ((1, 8), (2, 3), (3, 5), (4, 2)):
        tokens = text(rng, length)
        cases = [Case(tokens, max(length - 1 - width, 0), depth, width, SAMPLINGS[1])]
        executor = make_executor(CONFIG, numerics)
        check(draft(executor.backend, work_of(executor, cases)), cases, logits)


@each_numerics(*FORMATS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_way_of_sampling(numerics: Numerics, sampling: Sampling) -> None:
    rng = random.Random(11)
    logits = fresh_logits(make_executor(CONFIG, numerics))
    for width in (1, 2, 3, 4, 8):
        cases = [Case(text(rng, 20), 13, 4, width, sampling)]
        executor = make_executor(CONFIG, numerics)
        check(draft(executor.backend, work_of(executor, cases)), cases, logits)


@each_numerics(*FORMATS)
def test_many_sequences_in_one_call(numerics: Numerics) -> None:
    """Depths, widths, sampling and lengths all differ, and some only catch up; nobody notices the others."""
    logits = fresh_logits(make_executor(CONFIG, numerics))
    for seed in range(4):
        rng = random.Random(seed)
        cases = []
        for _ in range(rng.randrange(2, 9)):
            length = rng.choice([1, 3, 15, 16, 17, 30, 32, 40])
            stored = rng.randrange(length)
            shape = rng.randrange(0, 9), rng.randrange(1, 4)
            cases.append(Case(text(rng, length), stored, *shape, rng.choice(SAMPLINGS)))
        executor = make_executor(CONFIG, numerics)
        check(draft(executor.backend, work_of(executor, cases)), cases, logits)


@each_numerics(Numerics(), NATIVE[1])
def test_only_catching_up_stores_the_rows(numerics: Numerics) -> None:
    rng = random.Random(2)
    tokens = text(rng, 37)
    executor = make_executor(CONFIG, numerics)
    found = draft(executor.backend, work_of(executor, [Case(tokens, 5, 0, 1)]))
    assert found == [Proposal()]
    # The same pages again, as `work_of` gives them: what is stored there is the text.
    pages = list(range(96))
    random.Random(5).shuffle(pages)
    own = [pages.pop() for _ in range(3)]
    probe = make_batch([Run([*tokens, 1], 37, 38, own)], [Entry(0, num_logprobs=4)])
    fresh = make_executor(CONFIG, numerics)
    whole = make_batch([Run([*tokens, 1], 0, 38, own)], [Entry(37, num_logprobs=4)])
    one, other = step(executor, probe), step(fresh, whole)
    assert one.token_ids == other.token_ids
    assert one.logprobs.tobytes() == other.logprobs.tobytes()


@each_numerics(Numerics(), NATIVE[1])
def test_edits_hold_for_the_whole_tree(numerics: Numerics) -> None:
    """What an entry bans is proposed nowhere, and a bias counts below the root too."""
    rng = random.Random(4)
    tokens = text(rng, 19)
    logits = fresh_logits(make_executor(CONFIG, numerics))
    best = [token for token, _ in zip(np.argsort(-logits(tokens)).tolist(), range(40), strict=False)]
    edits = [
        LogitEdits(bias_ids=np.array(best, np.int32), bias=np.full(40, -np.inf, np.float32)),
        LogitEdits(allowed_ids=np.array([3, 5, 8], np.int32)),
        LogitEdits(allowed_ids=np.array([9], np.int32)),
        LogitEdits(
            seen_ids=np.array(sorted(set(tokens)), np.int32),
            output_counts=np.ones(len(set(tokens)), np.int32),
            repetition_penalty=1.7,
            presence_penalty=0.5,
            frequency_penalty=0.3,
        ),
    ]
    for edit in edits:
        for sampling in (SAMPLINGS[0], SAMPLINGS[1], SAMPLINGS[5]):
            cases = [Case(tokens, 18, 3, 3, replace(sampling, edits=edit))]
            executor = make_executor(CONFIG, numerics)
            found = draft(executor.backend, work_of(executor, cases))
            check(found, cases, logits)
            if edit.allowed_ids is not None:
                assert set(found[0].tokens) <= set(edit.allowed_ids.tolist())


@each_numerics(Numerics(), NATIVE[0])
def test_equal_logits_are_taken_by_the_lowest_id(numerics: Numerics) -> None:
    """A head of zeros: eight candidates of equal confidence at each node."""
    weights = random_weights(build(CONFIG))
    head = build(CONFIG).head.weight
    weights[head] = np.zeros_like(weights[head])
    executor = make_executor(CONFIG, numerics, weights=weights)
    found = draft(executor.backend, work_of(executor, [Case([4, 2], 1, 2, 3)]))[0]
    assert found.tokens == [0, 1, 2, 0, 1, 2]
    assert found.parents == [-1, -1, -1, 0, 0, 0]
    assert found.ranks == [0, 1, 2, 0, 1, 2]
    assert found.confidences == pytest.approx([1 / 8] * 6)


@each_numerics(Numerics(), NATIVE[0])
def test_a_broken_model_proposes_nothing(numerics: Numerics) -> None:
    """Logits that are all NaN have no candidates; the other sequences of the call do not suffer."""
    weights = random_weights(build(CONFIG))
    (embedding,) = (name for name in weights if "embed" in name)
    weights[embedding][7] = np.nan
    executor = make_executor(CONFIG, numerics, weights=weights)
    cases = [Case([7], 0, 3, 2), Case([4, 2], 1, 2, 2)]
    found = draft(executor.backend, work_of(executor, cases))
    assert found[0] == Proposal()
    assert len(found[1].tokens) == 4


def test_more_rows_than_a_tile_of_the_head() -> None:
    rng = random.Random(9)
    executor = make_executor(CONFIG)
    cases = [Case(text(rng, 2), 1, 2, 4, SAMPLINGS[i % 7]) for i in range(19)]
    work = work_of(executor, cases)
    check(draft_by_levels(executor.backend, work), cases, fresh_logits(make_executor(CONFIG)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depths": np.zeros(2, np.int32)}, "depths"),
        ({"depths": np.array([-1], np.int32)}, "below 0"),
        ({"widths": np.array([0], np.int32)}, "outside 1 to 8"),
        ({"widths": np.array([9], np.int32)}, "outside 1 to 8"),
        ({"scratch": np.zeros((1, 2), np.int32)}, "scratch has shape"),
        ({"scratch": np.zeros((1, 1, 0), np.int32)}, "1 beams of 1 pages"),
        ({"widths": np.array([2], np.int32)}, "2 beams of 1 pages"),
        ({"depths": np.array([40], np.int32)}, "1 beams of 3 pages"),
    ],
)
def test_work_that_is_not_legal_is_refused(change: dict[str, np.ndarray], said: str) -> None:
    executor = make_executor(CONFIG)
    work = replace(work_of(executor, [Case([4, 2], 1, 2, 1)]), **change)
    with pytest.raises(ValueError, match=said):
        draft(executor.backend, work)


def test_entries_must_be_draws_at_the_last_rows() -> None:
    executor = make_executor(CONFIG)
    work = work_of(executor, [Case([4, 2, 3], 1, 2, 1)])
    for column, value in (("rows", 0), ("targets", 3)):
        entries = replace(work.batch.logit_rows, **{column: np.array([value], np.int32)})
        with pytest.raises(ValueError, match="logit entries"):
            draft(executor.backend, replace(work, batch=replace(work.batch, logit_rows=entries)))
