"""Verification by rejection through the whole engine: the law of thousands of texts, and what it may not change."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engine.helpers import simulated_engine
from tests.kernels.harness import (
    NATIVE,
    REFERENCE,
    Numerics,
    each_numerics,
    make_executor,
    random_weights,
    small_config,
)
from tests.speculation.draft_oracle import fresh_logits
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.frames import FramePool, PageClass
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.proposer import Proposal, Proposer, Wanted
from tokenloom.engine.request import Exactness, Request, TokenLogprobs
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.engine.token_tree import Draws, Regime
from tokenloom.errors import UnsupportedFeature
from tokenloom.models.llama import build
from tokenloom.speculation.draft_model import DraftModel
from tokenloom.speculation.multi_step_sampling import draft_seed
from tokenloom.speculation.rejection_judge import RejectionJudge, sampled_law

VOCAB = 5
CONFIG = small_config(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    max_context=64,
)  # fmt: skip
PROMPT = (1, 4, 2)
LAWS = np.random.default_rng(3).dirichlet(np.full(VOCAB, 0.7), VOCAB)
"""What the made-up drafts of these tests think follows each token."""

Float64 = NDArray[np.float64]
Counts = Counter[tuple[int, ...]]


class Drafter:
    """Proposes two levels behind each text, as `children` says: what is below a token, in which regime, and with
    which law."""

    def __init__(self, children: Callable[[int], tuple[list[int], Regime]], name: str = "drafter") -> None:
        self.name = name
        self.children = children
        self.asked: list[Wanted] = []
        self.obeys = True

    def propose(self, wanted: Seq[Wanted]) -> list[Proposal]:
        self.asked += wanted
        return [self._tree(want) for want in wanted]

    def _tree(self, want: Wanted) -> Proposal:
        proposal = Proposal()
        level = [(-1, want.seq.tokens[-1])]
        for _ in range(min(want.max_depth, 2)):
            if self.obeys and len(proposal.tokens) + 2 * len(level) > want.max_nodes:
                break
            below: list[tuple[int, int]] = []
            for parent, token in level:
                drawn, regime = self.children(token)
                nodes: dict[int, int] = {}
                for child in drawn:
                    if child not in nodes:
                        nodes[child] = len(proposal.tokens)
                        proposal.tokens.append(child)
                        proposal.parents.append(parent)
                        proposal.ranks.append(len(nodes) - 1)
                        proposal.confidences.append(0.3)
                if regime != "chosen":
                    proposal.draws[parent] = Draws(regime, [nodes[child] for child in drawn], LAWS[token])
                below += [(node, child) for child, node in nodes.items()]
            level = below
        return proposal

    def forget(self, seq: Sequence) -> None: ...

    def close(self) -> None: ...


def independent() -> Drafter:
    rng = np.random.default_rng(8)
    return Drafter(lambda token: (rng.choice(VOCAB, 2, p=LAWS[token]).tolist(), "independent"), "independent")


def distinct() -> Drafter:
    rng = np.random.default_rng(9)
    return Drafter(lambda token: (rng.choice(VOCAB, 2, False, LAWS[token]).tolist(), "distinct"), "distinct")


def best(regime: Regime) -> Drafter:
    return Drafter(lambda token: (np.argsort(-LAWS[token])[:2].tolist(), regime), "best")


class Coupled(DraftModel):
    """A draft model that ranks its candidates with the noise of plain decoding, as for exact requests."""

    def propose(self, wanted: Seq[Wanted]) -> list[Proposal]:
        return super().propose([want._replace(draws=False) for want in wanted])


def draft_model(
    kind: type[DraftModel] = DraftModel, *, vocab_size: int = VOCAB, name: str = "draft"
) -> DraftModel:
    config = replace(CONFIG, vocab_size=vocab_size)
    executor = make_executor(config, weights=random_weights(build(config), seed=1))
    return kind(
        executor, PageClass("draft_kv", FramePool(32), 3), name=name, identity=("draft",), vocab_size=vocab_size,
        target_vocab_size=VOCAB, max_context=64, debug=True,
    )  # fmt: skip


def make_engine(
    *proposers: Proposer, numerics: Numerics | None = None, judge: bool = True, pages: int = 96, **limits: Any
) -> Engine:
    numerics = numerics or Numerics()
    engine = Engine(
        make_executor(CONFIG, numerics),
        EngineLimits(
            vocab_size=VOCAB, max_context=64, num_pages=pages, pages_per_frame=3, max_running=32, max_waiting=10**6,
            debug=True,
        ),
        budget=ChunkedPrefill(max_batch_tokens=2048),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "max_depth": 2,
        "max_nodes": 24,
        "width": 2,
        "max_rows": 1500,
        "pace": "fixed",
        **limits,
    }
    kernels: Any = numerics.kernels
    engine.speculate(
        Speculator(proposers, SpeculationLimits(**fields), None, RejectionJudge(kernels) if judge else None)
    )
    return engine


def add(
    engine: Engine, seed: int, exactness: Exactness = "distribution", prompt: Seq[int] = PROMPT, **params: Any
) -> None:
    fields: dict[str, Any] = {"max_tokens": 4, "seed": seed, "temperature": 0.8, **params}
    engine.add_request(
        Request(
            request_id=str(seed),
            prompt_token_ids=prompt,
            params=SamplingParams(**fields),
            exactness=exactness,
        )
    )


Texts = dict[tuple[int, int], list[int]]


def drained(engine: Engine, logprobs: dict[int, list[TokenLogprobs]] | None = None) -> Texts:
    texts: Texts = {}
    while engine.has_work:
        for delta in engine.step():
            texts.setdefault((int(delta.request_id), delta.sample), []).extend(delta.token_ids)
            if logprobs is not None:
                logprobs.setdefault(int(delta.request_id), []).extend(delta.logprobs)
    return texts


def texts_of(engine: Engine, count: int, **params: Any) -> Texts:
    for seed in range(count):
        add(engine, seed, **params)
    texts = drained(engine)
    assert not any(source.failed for source in engine.speculator.sources)
    engine.close()
    return texts


LOGITS = fresh_logits(make_executor(CONFIG))


def plain_law(path: Seq[int], params: SamplingParams) -> Float64:
    """The law of the next token, after the definitions of the parameters that these tests use."""
    logits = LOGITS((*PROMPT, *path)).astype(np.float64)
    for token in range(VOCAB):
        logits[token] -= params.frequency_penalty * list(path).count(token)
        if token in (*PROMPT, *path) and params.repetition_penalty != 1:
            logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
        logits[token] += params.logit_bias.get(token, 0.0)
    shares = np.exp((logits - logits.max()) / params.temperature)
    order = np.argsort(-shares, kind="stable")
    if params.top_k > 0:
        shares[order[params.top_k :]] = 0
    before = np.cumsum(shares[order]) - shares[order]
    shares[order[before >= params.top_p * shares.sum()]] = 0
    law: Float64 = shares / shares.sum()
    return law


def law_of_texts(length: int, params: SamplingParams) -> dict[tuple[int, ...], float]:
    step = cache(lambda path: plain_law(path, params))
    law = {}
    for text in product(range(VOCAB), repeat=length):
        chances = [float(step(text[:i])[token]) for i, token in enumerate(text)]
        if all(chances):
            law[text] = float(np.prod(chances))
    return law


def excess(texts: Texts, **params: Any) -> float:
    """How many standard deviations the chi-square statistic of the first three tokens lies above what chance gives
    (Wilson and Hilferty's approximation); inf for a text that cannot be."""
    law = law_of_texts(3, SamplingParams(**{"temperature": 0.8, **params}))
    counts: Counts = Counter(tuple(text[:3]) for text in texts.values())
    if counts.keys() - law.keys():
        return float("inf")
    total = sum(counts.values())
    rare = [text for text, chance in law.items() if total * chance < 5]
    cells = [(counts[text], total * chance) for text, chance in law.items() if total * chance >= 5]
    cells.append((sum(counts[text] for text in rare), max(total * sum(law[text] for text in rare), 1e-9)))
    assert len(cells) > 20
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells)
    freedom = len(cells) - 1
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


LAWFUL: dict[str, Callable[[], list[Proposer]]] = {
    "independent": lambda: [independent()],
    "distinct": lambda: [distinct()],
    "chosen": lambda: [best("chosen")],
    "draft": lambda: [draft_model()],
    "coupled draft": lambda: [draft_model(Coupled)],
    "all": lambda: [draft_model(), independent(), best("chosen"), draft_model(Coupled, name="coupled")],
}


@pytest.mark.parametrize("name", LAWFUL)
def test_the_law_of_texts_is_that_of_plain_sampling(name: str) -> None:
    engine = make_engine(*LAWFUL[name]())
    texts = texts_of(engine, 1500)
    assert engine.speculator.stats.num_accepted > 500
    assert excess(texts) < 3.7


def test_the_test_sees_the_law_of_plain_decoding() -> None:
    assert excess(texts_of(make_engine(), 1500)) < 3.7


@pytest.mark.parametrize("regime", ["distinct", "independent"])
def test_the_best_of_a_draft_claimed_as_draws_are_found_out(regime: Regime) -> None:
    assert excess(texts_of(make_engine(best(regime)), 1500)) > 10


def test_pruned_draws_are_found_out() -> None:
    """Why a budget must not choose among draws: the likelier one of two is no draw from their law."""
    rng = np.random.default_rng(9)

    def likelier(token: int) -> tuple[list[int], Regime]:
        drawn = rng.choice(VOCAB, 2, p=LAWS[token]).tolist()
        return [max(drawn, key=lambda child: float(LAWS[token][child]))], "independent"

    assert excess(texts_of(make_engine(Drafter(likelier)), 1500)) > 5


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 4, "frequency_penalty": 0.7, "logit_bias": {2: 0.5}},
        {"top_p": 0.9, "repetition_penalty": 1.3, "temperature": 1.2},
    ],
)
def test_edits_and_truncation_apply_at_every_node(params: dict[str, Any]) -> None:
    engine = make_engine(draft_model(), best("chosen"))
    assert excess(texts_of(engine, 1500, **params), **params) < 3.7


def test_samples_of_one_request_have_the_law_too() -> None:
    assert excess(texts_of(make_engine(draft_model()), 400, n=4)) < 3.7


@pytest.mark.parametrize(
    "limits", [{"max_rows": 40}, {"max_nodes": 1}, {"width": 3, "max_depth": 3}, {"pace": "adaptive"}]
)
def test_budgets_do_not_bend_the_law(limits: dict[str, Any]) -> None:
    """Rows for some of what is wanted, and what is left goes to trees that are chosen."""
    texts = texts_of(make_engine(draft_model(), best("chosen"), **limits), 1500)
    assert excess(texts) < 3.7


def test_neither_does_a_pool_that_is_too_small() -> None:
    engine = make_engine(distinct(), pages=24)
    texts = texts_of(engine, 800, max_tokens=20)
    assert engine.scheduler.num_preemptions > 20
    assert excess(texts) < 3.7
    assert engine.scheduler.cache.pages.num_used == engine.scheduler.cache.num_idle


def test_a_draft_of_another_vocabulary() -> None:
    for size in (VOCAB - 1, VOCAB + 3):
        model = draft_model(vocab_size=size)
        texts = texts_of(make_engine(model), 1000)
        assert model.stats.num_failures == 0
        assert excess(texts) < 3.7


def test_a_budget_of_rows_drops_no_draws() -> None:
    rows: list[int] = []
    proposer = distinct()
    proposer.obeys = False
    engine = make_engine(proposer, max_rows=9)
    engine.on_step = lambda record: rows.append(record.verify_rows)
    for seed in range(3):
        add(engine, seed, max_tokens=30)
    drained(engine)
    # Three nodes each for three texts: the drafter ignores that and is not asked again.
    assert proposer.asked[0].draws and proposer.asked[0].max_nodes == 3
    assert engine.speculator.sources[0].failed
    model = draft_model()
    engine = make_engine(model, max_rows=9)
    engine.on_step = lambda record: rows.append(record.verify_rows)
    for seed in range(3):
        add(engine, seed, max_tokens=30)
    drained(engine)
    assert 0 < max(rows) <= 9


@each_numerics(REFERENCE[0], NATIVE[0], NATIVE[1])
def test_logprobs_are_those_of_plain_decoding(numerics: Numerics) -> None:
    engine = make_engine(draft_model(), best("chosen"), numerics=numerics)
    for seed in range(40):
        add(engine, seed, max_tokens=12, logprobs=2, temperature=1.5)
    logprobs: dict[int, list[TokenLogprobs]] = {}
    texts = drained(engine, logprobs)
    assert engine.speculator.stats.num_accepted > 50
    engine.close()
    scorer = make_engine(numerics=numerics)
    for seed in range(40):
        add(scorer, seed, "exact", (*PROMPT, *texts[seed, 0]), max_tokens=0, prompt_logprobs=2)
    while scorer.has_work:
        for delta in scorer.step():
            assert delta.prompt_logprobs is not None
            found = delta.prompt_logprobs[len(PROMPT) - 1 :]
            assert [one.token_id for one in found] == texts[int(delta.request_id), 0]
            assert found == logprobs[int(delta.request_id)]
    assert len({one.rank for found in logprobs.values() for one in found}) == VOCAB


def test_a_text_follows_from_its_seed_and_the_schedule() -> None:
    def once(count: int) -> Texts:
        return texts_of(make_engine(draft_model(), best("chosen")), count, max_tokens=30)

    first = once(60)
    assert first == once(60)
    plain = texts_of(make_engine(), 60, max_tokens=30)
    assert first != plain


def test_greedy_and_exact_requests_beside_it_are_untouched() -> None:
    plain = make_engine()
    mixed = make_engine(draft_model(), best("chosen"), independent())
    for engine in (plain, mixed):
        for seed in range(30):
            kind: Exactness = "distribution" if seed % 3 == 0 else "exact"
            add(engine, seed, kind, temperature=0.0 if seed % 3 == 0 else 0.9, max_tokens=20)
    for seed in range(100, 110):
        add(mixed, seed, max_tokens=20)
    expected, found = drained(plain), drained(mixed)
    assert {key: found[key] for key in expected} == expected
    assert len(found) == 40
    assert mixed.speculator.stats.num_accepted > 50


def test_ends_and_masks_hold() -> None:
    engine = make_engine(draft_model(), best("chosen"))
    for seed in range(60):
        add(engine, seed, stop_token_ids=(3,), min_tokens=3, max_tokens=9, allowed_token_ids=(0, 2, 3))
    texts = drained(engine)
    for text in texts.values():
        assert set(text) <= {0, 2, 3}
        assert 3 not in text[:3]
        assert 3 not in text[:-1]
        assert text[-1] == 3 or len(text) == 9
    assert len({len(text) for text in texts.values()}) > 3


def test_a_mask_without_any_token_gives_what_the_sampler_gives() -> None:
    for allowed in (None, (4, 2)):
        texts = []
        kinds: list[Exactness] = ["exact", "distribution"]
        for kind in kinds:
            engine = make_engine(best("chosen"))
            add(engine, 1, kind, stop_token_ids=tuple(range(VOCAB)), min_tokens=3, allowed_token_ids=allowed)
            texts.append(drained(engine)[1, 0])
        assert texts == [[2 if allowed else 0]] * 2


def test_drafts_never_draw_from_numbers_twice() -> None:
    seeds = {
        draft_seed(seed, sample, position, drafter)
        for seed in (0, 1, (1 << 64) - 1)
        for sample in (0, 1)
        for position in (0, 1, 1 << 33)
        for drafter in (0, 1, (1 << 32) - 1)
    }
    assert len(seeds) == 3 * 2 * 3 * 3
    assert draft_seed(-1, 0, 0, 0) == draft_seed((1 << 64) - 1, 0, 0, 0)
    model = draft_model(name="one")
    other = draft_model(name="two")
    seq = Sequence(
        Request(request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams(seed=5), exactness="distribution"),
        0, root=b"", max_length=60, stop_ids=frozenset(), checker=None,
    )  # fmt: skip
    found: dict[DraftModel, list[Proposal]] = {model: [], other: []}
    for _ in range(20):
        for drafter, proposals in found.items():
            proposals += drafter.propose([Wanted(seq, 3, 9, 2, True)])
        seq.append(1)
    assert [p.tokens for p in found[model]] != [p.tokens for p in found[other]]
    for proposal in found[model]:
        assert len(proposal.tokens) == 6
        proposal.check_draws(9, VOCAB)
        assert {parent: len(draws.nodes) for parent, draws in proposal.draws.items()} == {
            -1: 2,
            0: 1,
            1: 1,
            2: 1,
            3: 1,
        }


def test_what_a_law_is_follows_the_sampler() -> None:
    logits = np.array([1.0, np.nan, np.inf, -2.0], np.float32)
    assert sampled_law(logits, 1.0, 0, 1.0, 0.0).tolist() == [0.0, 0.0, 1.0, 0.0]
    assert not sampled_law(np.full(4, -np.inf, np.float32), 1.0, 0, 1.0, 0.0).any()


@pytest.mark.parametrize(
    "draws",
    [
        Draws("distinct", [0], np.ones(VOCAB + 1)),
        Draws("distinct", [0], np.full(VOCAB, np.nan)),
        Draws("distinct", [0], -np.ones(VOCAB)),
        Draws("distinct", [0], np.zeros(VOCAB)),
        Draws("distinct", [0], np.array([1.0, 1, 0, 1, 1])),
        Draws("distinct", [0, 0], np.ones(VOCAB)),
        Draws("distinct", [1], np.ones(VOCAB)),
        Draws("independent", [7], np.ones(VOCAB)),
        Draws("independent", [0]),
        Draws("chosen", [0], np.ones(VOCAB)),
    ],
)
def test_draws_that_cannot_be_cost_the_proposer_only(draws: Draws, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Drafter):
        def _tree(self, want: Wanted) -> Proposal:
            return Proposal([2, 3], [-1, 0], [0, 0], [0.5, 0.5], {-1: draws})

    engine = make_engine(Wrong(lambda token: ([], "chosen")), best("chosen"))
    for seed in range(20):
        add(engine, seed)
    with caplog.at_level(logging.CRITICAL):
        texts = drained(engine)
    assert all(len(text) == 4 for text in texts.values())
    assert [source.failed for source in engine.speculator.sources] == [True, False]


def test_it_is_refused_where_nobody_judges() -> None:
    engine = make_engine(best("chosen"), judge=False)
    with pytest.raises(UnsupportedFeature, match="exactness"):
        add(engine, 1)
    add(engine, 2, temperature=0.0)
    assert len(drained(engine)[2, 0]) == 4
    simulated = simulated_engine()
    with pytest.raises(UnsupportedFeature, match="simulated"):
        simulated.executor.logits(np.zeros(1, np.int32))
