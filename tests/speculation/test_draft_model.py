"""The draft proposer: its KV follows the committed tokens, its pages come and go, and it never hurts anybody."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

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
    small_config,
    step,
)
from tests.speculation.draft_oracle import Sampling, fresh_logits, tree
from tests.speculation.shadow_backend import VOCAB, ShadowExecutor, text_logits
from tokenloom.engine.frames import FramePool, PageClass
from tokenloom.engine.proposer import Proposal, Wanted
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.sequence import Sequence
from tokenloom.kernels.failure import StepFailed
from tokenloom.speculation import draft_model
from tokenloom.speculation.draft_batch import DraftAdapter
from tokenloom.speculation.draft_model import MAX_FAILURES, DraftModel

CONFIG = small_config()
NOTHING = Proposal()


def sequence(tokens: Seq[int], *, index: int = 0, tenant: str = "", **params: Any) -> Sequence:
    params = {"temperature": 0.0, "seed": 5, **params}
    request = Request(
        request_id="r", prompt_token_ids=list(tokens), params=SamplingParams(**params), tenant=tenant
    )
    return Sequence(request, index, root=b"", max_length=1000, stop_ids=frozenset(), checker=None)


def shadow_model(num_frames: int = 16, pages_per_frame: int = 3, **options: Any) -> DraftModel:
    """A model over 48 pages whose KV is checked by every row that reads it."""
    pool = FramePool(num_frames)
    executor = ShadowExecutor(num_frames * pages_per_frame)
    fields = {
        "identity": ("shadow",),
        "vocab_size": VOCAB,
        "target_vocab_size": VOCAB,
        "max_context": 600,
        "debug": True,
        **options,
    }
    return DraftModel(executor, PageClass("draft_kv", pool, pages_per_frame), **fields)  # type: ignore[arg-type]


def expected(seq: Sequence, depth: int, width: int, adapter: int = -1) -> Proposal:
    params = seq.request.params
    sampling = Sampling(
        params.temperature, params.top_k, params.top_p, params.min_p, params.seed or 0, seq.index
    )
    return tree(lambda tokens: text_logits(tokens, adapter), seq.tokens, sampling, depth, width)


def same(found: Proposal, wanted: Proposal) -> bool:
    return (found.tokens, found.parents, found.ranks) == (wanted.tokens, wanted.parents, wanted.ranks)


def ask(model: DraftModel, *sequences: Sequence, depth: int = 3, width: int = 2) -> list[Proposal]:
    return model.propose([Wanted(seq, depth, depth * width, width) for seq in sequences])


def commit(seq: Sequence, proposal: Proposal, rng: random.Random) -> None:
    """What a verification may commit: some of a path of the tree, then a token of the target's own."""
    node, count = -1, rng.randrange(4)
    while count and (children := [i for i, parent in enumerate(proposal.parents) if parent == node]):
        node = rng.choice(children)
        seq.append(proposal.tokens[node])
        count -= 1
    seq.append(rng.randrange(VOCAB))


@each_numerics(Numerics(), NATIVE[0], NATIVE[1], NATIVE[-1])
def test_kv_behind_rejections_is_that_of_a_fresh_sequence(numerics: Numerics) -> None:
    """Thirty steps of trees of which some of a path, nothing, or all is taken: the very logits, and the very K and V
    for whoever reads them later."""
    rng = random.Random(1)
    executor = make_executor(CONFIG, numerics)
    model = DraftModel(
        executor, PageClass("draft_kv", FramePool(32), 3), identity=("x",), vocab_size=CONFIG.vocab_size,
        target_vocab_size=CONFIG.vocab_size, max_context=CONFIG.max_context, debug=True,
    )  # fmt: skip
    other = make_executor(CONFIG, numerics)
    logits = fresh_logits(other)
    seq = sequence([rng.randrange(VOCAB) for _ in range(13)], temperature=0.9)
    for _ in range(30):
        proposal = ask(model, seq)[0]
        assert same(proposal, tree(logits, seq.tokens, Sampling(0.9, seed=5), 3, 2))
        state = model._states[seq]
        assert state.computed == len(seq.tokens)
        whole = [*seq.tokens, 1]
        length = len(whole)
        ends = [Entry(0, num_logprobs=5)], [Entry(length - 1, num_logprobs=5)]
        # The pages may end where the last token does; the next row has to go somewhere.
        spare = 95 if 95 not in state.pages else 94
        one = step(executor, make_batch([Run(whole, length - 1, length, [*state.pages, spare])], ends[0]))
        fresh = step(other, make_batch([Run(whole, 0, length, range(96))], ends[1]))
        assert one.top[0].token_ids.tobytes() == fresh.top[0].token_ids.tobytes()
        assert one.top[0].logprobs.tobytes() == fresh.top[0].logprobs.tobytes()
        commit(seq, proposal, rng)
    model.close()


def test_many_sequences_keep_apart() -> None:
    """Sequences that come, go on at their own pace, stop and come back; every tree is that of its own text."""
    rng = random.Random(3)
    model = shadow_model(num_frames=40)
    live: list[Sequence] = []
    for _ in range(150):
        if len(live) < 6 and rng.random() < 0.5:
            params = rng.choice([{}, {"temperature": 0.8, "top_k": 9}, {"temperature": 1.0, "top_p": 0.8}])
            live.append(sequence([rng.randrange(4) for _ in range(rng.randrange(1, 60))], **params))
        if live and rng.random() < 0.1:
            model.forget(live.pop(rng.randrange(len(live))))
        asked = [seq for seq in live if rng.random() < 0.7]
        depth, width = rng.randrange(1, 6), rng.randrange(1, 4)
        for seq, found in zip(asked, ask(model, *asked, depth=depth, width=width), strict=True):
            assert same(found, expected(seq, depth, width))
            commit(seq, found, rng)
    for seq in live:
        model.forget(seq)
    assert not model.cache.references


def test_asked_twice_it_says_the_same() -> None:
    model = shadow_model()
    for length in (1, 15, 16, 17, 32):
        seq = sequence([7] * length)
        assert same(ask(model, seq)[0], expected(seq, 3, 2))
        assert same(ask(model, seq)[0], expected(seq, 3, 2))
        model.forget(seq)


def test_long_prompts_catch_up_in_chunks_beside_those_who_decode() -> None:
    model = shadow_model(max_rows=32)
    ready, late = sequence([1, 2, 3]), sequence(range(1, 48))
    late.tokens += list(late.tokens)
    assert len(ask(model, ready)[0].tokens) == 6
    proposals = []
    for _ in range(4):
        ready.append(4)
        found = ask(model, late, ready)
        assert same(found[1], expected(ready, 3, 2))
        proposals.append(found[0])
    # 94 tokens in chunks of 31, beside one row of the other.
    assert proposals[:3] == [NOTHING, NOTHING, NOTHING]
    assert same(proposals[3], expected(late, 3, 2))
    assert max(model._executor.backend.num_rows) <= 32  # type: ignore[attr-defined]


def test_prefixes_are_shared_within_a_tenant_and_an_adapter() -> None:
    adapters = {"": DraftAdapter(), "a": DraftAdapter("a", 0), "b": DraftAdapter("b", 1)}
    model = shadow_model(adapter_of=lambda seq: adapters[seq.request.adapter])
    prompt = list(range(40))
    first, sibling = sequence(prompt), sequence(prompt, index=1)
    # Both in one call: the second reads what the first writes in the very same batch.
    found = ask(model, first, sibling)
    assert same(found[0], expected(first, 3, 2))
    assert same(found[1], expected(sibling, 3, 2))
    assert model.stats.num_shared == 32
    stranger, other = sequence(prompt, tenant="x"), sequence(prompt)
    other.request = replace(other.request, adapter="a")
    assert same(ask(model, stranger)[0], expected(stranger, 3, 2))
    assert same(ask(model, other)[0], expected(other, 3, 2, adapter=0))
    assert model.stats.num_shared == 32
    model.forget(first)
    model.forget(sibling)
    again = sequence([*prompt, 9, 9])
    assert same(ask(model, again)[0], expected(again, 3, 2))
    assert model.stats.num_shared == 64


def test_a_full_hit_computes_the_root_alone() -> None:
    model = shadow_model()
    first = sequence(range(32))
    ask(model, first)
    model.forget(first)
    again = sequence(range(32))
    model._executor.backend.num_rows.clear()  # type: ignore[attr-defined]
    assert same(ask(model, again)[0], expected(again, 3, 2))
    assert model._executor.backend.num_rows[0] == 1  # type: ignore[attr-defined]


def test_another_adapter_means_another_kv() -> None:
    current = [DraftAdapter("a", 0)]
    model = shadow_model(adapter_of=lambda seq: current[0])
    seq = sequence([1, 2, 3])
    assert same(ask(model, seq)[0], expected(seq, 3, 2, adapter=0))
    # The same adapter in another slot is the same KV (which the shadow tells apart, so nothing is asked of it).
    current[0] = DraftAdapter("b", 1)
    assert same(ask(model, seq)[0], expected(seq, 3, 2, adapter=1))


def test_nodes_are_as_many_as_wanted_at_most() -> None:
    model = shadow_model()
    seq = sequence([3, 1, 4, 1, 5])
    for most in range(1, 20):
        found = model.propose([Wanted(seq, 5, most, 3)])[0]
        assert 1 <= len(found.tokens) <= most
        width = min(3, most)
        full = expected(seq, min(5, most), width)
        reaches: list[float] = []
        for parent, confidence in zip(full.parents, full.confidences, strict=True):
            reaches.append(confidence * (reaches[parent] if parent >= 0 else 1.0))
        assert sorted(found.tokens) == sorted(
            full.tokens[node]
            for node in sorted(range(len(reaches)), key=lambda node: (-reaches[node], node))[:most]
        )
        assert all(parent < node for node, parent in enumerate(found.parents))


def test_behind_its_context_the_draft_proposes_nothing() -> None:
    model = shadow_model(max_context=20)
    seq = sequence(range(17))
    depths = []
    for _ in range(5):
        depths.append(len(ask(model, seq, depth=8, width=1)[0].tokens))
        seq.append(1)
    # Rows of nodes stand behind 17 tokens at positions up to 19; the last level has none.
    assert depths == [4, 3, 2, 1, 0]
    assert not model.cache.references


def test_tokens_that_the_draft_does_not_know_end_its_proposals() -> None:
    model = shadow_model(target_vocab_size=VOCAB + 10)
    seq = sequence([1, 2, 3])
    assert ask(model, seq)[0].tokens
    seq.append(VOCAB + 3)
    for _ in range(3):
        assert ask(model, seq) == [NOTHING]
        seq.append(1)
    assert not model.cache.references
    assert model.stats.num_failures == 0


def test_tokens_that_the_target_does_not_have_are_not_proposed() -> None:
    model = shadow_model(target_vocab_size=24)
    seq = sequence([1, 2, 3])
    for _ in range(20):
        found = model.propose([Wanted(seq, 4, 12, 3)])[0]
        full = expected(seq, 4, 3)
        assert all(token < 24 for token in found.tokens)
        # Whatever hangs below one of them goes too, and nothing else.
        gone: set[int] = set()
        for node, parent in enumerate(full.parents):
            if full.tokens[node] >= 24 or parent in gone:
                gone.add(node)
        assert found.tokens == [token for node, token in enumerate(full.tokens) if node not in gone]
        seq.append(seq.tokens[-1] + 1)


def test_a_draft_without_candidates_proposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shadow_model(target_vocab_size=24)
    broken = np.full((1, VOCAB), np.nan, np.float32)
    monkeypatch.setattr(model._executor.backend, "logits", lambda rows: broken[[0] * len(rows)])
    assert ask(model, sequence([1, 2])) == [NOTHING]
    assert model.stats.num_failures == 0


def test_without_pages_it_proposes_less_then_nothing() -> None:
    """Three pages: 40 tokens fill them, so that a tree has to do without its second level."""
    model = shadow_model(num_frames=1)
    seq = sequence(range(40))
    found = ask(model, seq, depth=3, width=2)[0]
    assert same(found, expected(seq, 1, 2))
    assert model.stats.num_short == 1
    longer = sequence(range(45))
    longer.tokens += [1] * 20
    assert ask(model, longer) == [NOTHING]
    assert model.stats.num_failures == 0


def test_one_page_left_makes_a_chain() -> None:
    model = shadow_model(num_frames=1)
    seq = sequence(range(20))
    assert same(ask(model, seq, depth=3, width=2)[0], expected(seq, 3, 1))


def test_who_was_not_asked_for_longest_makes_room() -> None:
    model = shadow_model(num_frames=2)
    sequences = [sequence([i] * 20) for i in range(4)]
    for seq in sequences:
        assert len(ask(model, seq, depth=1)[0].tokens) == 2
    assert model.stats.num_dropped == 1
    assert list(model._states) == sequences[1:]
    # Nobody of one call goes for another of it: who comes last gets nothing.
    found = ask(model, *sequences, depth=1)
    assert [len(proposal.tokens) for proposal in found] == [0, 2, 2, 2]


def test_a_frame_of_somebody_else_is_asked_for_first() -> None:
    pool = FramePool(4)
    held = [pool.take(), pool.take()]
    assert pool.take() is not None
    asked: list[int] = []

    def free_frame() -> bool:
        asked.append(len(held))
        if held:
            frame = held.pop()
            assert frame is not None
            pool.give_back(frame)
            return True
        return False

    model = DraftModel(
        ShadowExecutor(12), PageClass("draft_kv", pool, 3), identity=("x",), vocab_size=VOCAB,  # type: ignore[arg-type]
        target_vocab_size=VOCAB, max_context=600, free_frame=free_frame, debug=True,
    )  # fmt: skip
    sequences = [sequence([i] * 40) for i in range(4)]
    for seq in sequences:
        ask(model, seq, depth=1)
    assert asked == [2, 1, 0]
    assert model.stats.num_dropped == 1


def test_every_frame_can_be_had_back() -> None:
    model = shadow_model(num_frames=8)
    pool = model.cache.pages.pool
    sequences = [sequence([i] * 30) for i in range(5)]
    ask(model, *sequences)
    model.forget(sequences[0])
    while model.num_cold_frames:
        before = pool.num_free
        assert model.evict_for_frame()
        assert pool.num_free > before
        model.check()
    assert pool.num_free == 8
    assert not model.evict_for_frame()
    # And it starts anew.
    assert same(ask(model, sequences[1])[0], expected(sequences[1], 3, 2))


def test_a_call_takes_nothing_from_itself() -> None:
    """Whoever is asked for a frame may ask all lenders, the draft among them."""
    model = shadow_model(num_frames=1, free_frame=lambda: model.evict_for_frame())
    long, short = sequence(range(40)), sequence(range(10))
    found = ask(model, long, short, depth=1)
    assert same(found[1], expected(short, 1, 2))
    assert found[0] == NOTHING
    assert model.num_cold_frames == 1


def test_idle_pages_go_before_those_in_use() -> None:
    model = shadow_model(num_frames=8)
    kept, gone = sequence([1] * 48), sequence([2] * 48)
    ask(model, kept, depth=1)
    ask(model, gone, depth=1)
    model.forget(gone)
    assert model.evict_for_frame()
    assert kept in model._states
    assert not model.cache.num_idle


class Broken(RuntimeError):
    pass


def test_a_failure_costs_the_draft_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = shadow_model()
    backend = model._executor.backend
    seq = sequence(range(20))
    ask(model, seq)
    for error in (StepFailed(), Broken(), MemoryError()):
        for name in ("run", "logits"):

            def fail(*_: Any, error: Exception = error) -> Any:
                raise error

            with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
                patch.setattr(backend, name, fail)
                assert ask(model, seq, sequence([5])) == [NOTHING, NOTHING]
            assert not model.cache.references
            assert not model.cache.num_idle
            # It is whole again, and starts from nothing.
            assert same(ask(model, seq)[0], expected(seq, 3, 2))
    assert model.stats.num_failures == 6
    assert len(caplog.records) == 1


def test_a_draft_that_always_fails_is_asked_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def adapter_of(seq: Sequence) -> DraftAdapter:
        calls.append(1)
        raise Broken

    model = shadow_model(adapter_of=adapter_of)
    seq = sequence([1, 2])
    for _ in range(10):
        assert ask(model, seq) == [NOTHING]
    assert model.is_off
    assert len(calls) == MAX_FAILURES
    assert "is off" in caplog.records[-1].message
    assert len(caplog.records) == 2


def test_a_failure_after_scratch_was_taken_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shadow_model()

    def fail(*_: Any) -> Any:
        raise Broken

    monkeypatch.setattr(draft_model, "draft_work", fail)
    assert ask(model, sequence([1] * 10), sequence([2] * 10)) == [NOTHING, NOTHING]
    assert model.cache.pages.num_used == 0


def test_ten_thousand_proposals_leak_nothing() -> None:
    """Arrivals, ends, tiny pools, frames taken away and given back; all trees are right, and at the end all is free."""
    rng = random.Random(17)
    model = shadow_model(num_frames=12, max_rows=40, debug=False)
    pool = model.cache.pages.pool
    taken: list[int] = []
    live: list[Sequence] = []
    proposals = 0
    while proposals < 10_000:
        while len(live) < 5:
            prompt = [rng.randrange(3) for _ in range(rng.choice([1, 8, 16, 40, 70]))]
            live.append(sequence(prompt, temperature=rng.choice([0.0, 0.7]), seed=rng.randrange(3)))
        wanted = [Wanted(seq, rng.randrange(1, 5), rng.randrange(1, 9), rng.randrange(1, 4)) for seq in live]
        for want, found in zip(wanted, model.propose(wanted), strict=True):
            proposals += 1
            assert len(found.tokens) <= want.max_nodes
            if found.tokens and proposals % 50 == 0:
                # Under pressure a tree may have fewer levels or beams; its first node is always the best.
                assert found.tokens[0] == expected(want.seq, 1, 1).tokens[0]
            commit(want.seq, found, rng)
        for seq in [seq for seq in live if len(seq.tokens) > 110 or rng.random() < 0.02]:
            live.remove(seq)
            model.forget(seq)
        if rng.random() < 0.1 and (pool.num_free or model.evict_for_frame()) and len(taken) < 8:
            frame = pool.take()
            assert frame is not None
            taken.append(frame)
        if taken and rng.random() < 0.1:
            pool.give_back(taken.pop())
        if proposals % 20 == 0:
            model.check()
    assert model.stats.num_failures == 0
    assert model.stats.num_dropped
    assert model.stats.num_short
    assert model.stats.num_shared
    for seq in live:
        model.forget(seq)
    model.cache.clear()
    assert model.cache.pages.num_used == 0
    assert pool.num_free + len(taken) == 12


def test_closing_releases_everything() -> None:
    model = shadow_model()
    ask(model, sequence([1] * 40), sequence([2] * 3))
    model.close()
    assert model.cache.pages.num_used == 0
    assert model._executor.closed  # type: ignore[attr-defined]
