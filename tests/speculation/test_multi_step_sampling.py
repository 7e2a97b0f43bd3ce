"""The law of what is emitted, enumerated outcome by outcome: every draw, every coin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from tokenloom.engine.token_tree import ROOT, Draws, Regime, TokenTree
from tokenloom.kernels.noise import Purpose, token_bits
from tokenloom.speculation.multi_step_sampling import (
    Coins,
    Float64,
    PhiloxCoins,
    Verdict,
    draw,
    naive,
    rejection,
    trials,
    verify,
    walk,
)

EXACT = 4e-15
DRAWING: tuple[Regime, ...] = ("independent", "distinct")


class Branch:
    """Coins that take a given way through all outcomes, the first one beyond it, and multiply probabilities."""

    def __init__(self, way: list[int]) -> None:
        self.way = way
        self.taken: list[int] = []
        self.widths: list[int] = []
        self.weight = 1.0

    def choose(self, options: list[tuple[Any, float]]) -> Any:
        options = [option for option in options if option[1] > 0]
        number = self.way[len(self.taken)] if len(self.taken) < len(self.way) else 0
        self.taken.append(number)
        self.widths.append(len(options))
        value, probability = options[number]
        self.weight *= probability
        return value

    def flip(self, position: int, chance: float) -> bool:
        return bool(self.choose([(True, chance), (False, 1 - chance)]))

    def pick(self, position: int, law: Float64) -> int:
        return int(self.choose(list(enumerate(law.tolist()))))


def outcomes(run: Callable[[Branch], Any]) -> Iterator[tuple[float, Any]]:
    """Every outcome of `run` with its probability."""
    waiting: list[list[int]] = [[]]
    while waiting:
        way = waiting.pop()
        coins = Branch(way)
        result = run(coins)
        yield coins.weight, result
        for depth in range(len(way), len(coins.taken)):
            waiting.extend([*coins.taken[:depth], number] for number in range(1, coins.widths[depth]))


def law_of(run: Callable[[Branch], int], size: int) -> Float64:
    law = np.zeros(size)
    for weight, token in outcomes(run):
        law[token] += weight
    return law


def one_level(size: int) -> TokenTree:
    """A root whose child i has the token i."""
    return TokenTree(list(range(size)), [ROOT] * size, [0.5] * size, [()] * size)


def emitted(p: Float64, drafts: list[Draws], coins: Coins) -> int:
    """The first token after the root."""
    verdict = walk(one_level(len(p)), lambda node: p, {ROOT: drafts}, 0, coins)
    return verdict.nodes[0] if verdict.nodes else verdict.token


def pairs(size: int) -> list[tuple[Float64, Float64]]:
    """Laws of target and draft: random ones, and all kinds of edges."""
    rng = np.random.default_rng(size)
    found = [(rng.dirichlet(np.full(size, a)), rng.dirichlet(np.full(size, a))) for a in (0.3, 1, 1, 5)]
    one = np.eye(size)
    same = rng.dirichlet(np.ones(size))
    half = np.where(np.arange(size) < size // 2, 1.0, 0.0)
    flat = np.full(size, 1 / size)
    found += [(same, same), (one[0], flat), (flat, one[1]), (one[0], one[1]), (one[2], one[2])]
    found += [(half / half.sum(), flat), (flat, half / half.sum()), (half, 1 - half)]
    return [(p / p.sum(), q / q.sum()) for p, q in found]


PAIRS = [*pairs(4), *pairs(5)]
IDS = [f"{len(p)}-{i}" for i, (p, _) in enumerate(PAIRS)]


def drawn(q: Float64, count: int, regime: Regime, coins: Coins) -> Draws:
    return Draws(regime, draw(q, count, regime, 0, coins), q)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("regime", DRAWING)
@pytest.mark.parametrize(("p", "q"), PAIRS, ids=IDS)
def test_draws_keep_the_law(p: Float64, q: Float64, regime: Regime, count: int) -> None:
    law = law_of(lambda coins: emitted(p, [drawn(q, count, regime, coins)], coins), len(p))
    assert np.abs(law - p).max() < EXACT


@pytest.mark.parametrize(("p", "q"), PAIRS, ids=IDS)
def test_chosen_children_keep_the_law(p: Float64, q: Float64) -> None:
    for count in range(len(p) + 1):
        best = np.argsort(-q)[:count].tolist()
        law = law_of(lambda coins, best=best: emitted(p, [Draws("chosen", best)], coins), len(p))
        assert np.abs(law - p).max() < EXACT


@pytest.mark.parametrize("regimes", [(a, b) for a in DRAWING for b in DRAWING], ids="-".join)
@pytest.mark.parametrize("number", range(6))
def test_several_drafts_keep_the_law(number: int, regimes: tuple[Regime, Regime]) -> None:
    (p, first), (_, second) = PAIRS[number], PAIRS[number + 1]

    def run(coins: Branch) -> int:
        drafts = [
            drawn(first, 2, regimes[0], coins),
            Draws("chosen", [3, 1]),
            drawn(second, 2, regimes[1], coins),
        ]
        return emitted(p, drafts, coins)

    assert np.abs(law_of(run, len(p)) - p).max() < EXACT


P, Q = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.5, 0.3, 0.15, 0.05])


def bias(run: Callable[[Branch], int]) -> float:
    return float(np.abs(law_of(run, len(P)) - P).max())


def test_the_best_of_a_draft_tried_as_draws_are_biased() -> None:
    best = [0, 1]
    assert bias(lambda coins: emitted(P, [Draws("independent", best, Q)], coins)) > 0.1
    assert bias(lambda coins: emitted(P, [Draws("distinct", best, Q)], coins)) > 0.1
    assert bias(lambda coins: emitted(P, [Draws("chosen", best)], coins)) < EXACT


def test_distinct_draws_in_random_order_are_biased() -> None:
    def run(coins: Branch) -> int:
        tokens = draw(Q, 3, "distinct", 0, coins)
        orders = list(permutations(tokens))
        return emitted(P, [Draws("distinct", orders[coins.pick(0, np.full(6, 1 / 6))], Q)], coins)

    assert bias(run) > 1e-3


def test_distinct_draws_tried_as_independent_are_biased() -> None:
    assert bias(lambda c: emitted(P, [Draws("independent", draw(Q, 2, "distinct", 0, c), Q)], c)) > 1e-2


def test_draws_that_a_budget_dropped_by_their_probability_are_biased() -> None:
    def run(coins: Branch) -> int:
        tokens = draw(Q, 2, "independent", 0, coins)
        return emitted(P, [Draws("independent", [max(tokens, key=lambda token: float(Q[token]))], Q)], coins)

    assert bias(run) > 1e-2


def test_drafts_that_share_their_noise_are_biased() -> None:
    def run(coins: Branch) -> int:
        draws = drawn(Q, 1, "independent", coins)
        return emitted(P, [draws, draws], coins)

    assert bias(run) > 1e-2


def test_how_many_draws_there_are_may_follow_from_those_before() -> None:
    def run(coins: Branch) -> int:
        tokens = draw(Q, 1, "independent", 0, coins)
        if tokens[0] == 0:
            tokens += draw(Q, 2, "independent", 0, coins)
        return emitted(P, [Draws("independent", tokens, Q)], coins)

    assert bias(run) < EXACT


def test_naive_sampling_keeps_the_law_and_equals_chosen_children() -> None:
    for p, q in PAIRS:
        best = np.argsort(-q)[:2].tolist()
        run = lambda coins, p=p, best=best: naive(p, {t: t for t in best}, 0, coins)  # noqa: E731
        accepted = sum(weight for weight, (_, node) in outcomes(run) if node is not None)
        assert np.abs(law_of(lambda coins, run=run: run(coins)[0], len(p)) - p).max() < EXACT
        tried, _ = trials(p, [Draws("chosen", best)], range(len(p)))
        assert 1 - rejection(tried) == pytest.approx(accepted, abs=EXACT)


def test_it_rejects_no_more_than_naive_sampling() -> None:
    """Theorem 4.3, on average over the draws; and strictly less where draft and target have anything in common."""
    rng = np.random.default_rng(7)
    laws = [tuple(rng.dirichlet(np.full(4, a), 3)) for a in (0.2, 0.5, 1, 3) for _ in range(8)]
    laws += [(p, q, q) for p, q in PAIRS]
    gains = []
    for p, first, second in laws:
        for regime in DRAWING:
            ours = others = 0.0
            for weight, drafts in outcomes(
                lambda c, first=first, second=second, regime=regime: [  # type: ignore[misc]
                    drawn(first, 2, regime, c),
                    drawn(second, 1, "independent", c),
                ]
            ):
                tried, _ = trials(p, drafts, range(len(p)))
                ours += weight * rejection(tried)
                others += weight * (1 - p[list({node for draws in drafts for node in draws.nodes})].sum())
            assert ours <= others + EXACT
            gains.append(others - ours)
    assert np.mean(gains) > 0.05


def test_a_perfect_draft_is_always_accepted() -> None:
    for p, _ in PAIRS:
        for token in np.flatnonzero(p).tolist():
            tried, _ = trials(p, [Draws("independent", [token], p)], range(len(p)))
            assert tried[0].chance == pytest.approx(1, abs=EXACT)


def test_a_token_without_probability_is_never_emitted() -> None:
    """Not even through rounding, where draft and target are all but equal: it may be one that a grammar forbids."""
    p = np.array([0.1, 0.2, 0.7, 0.0])
    q = np.array([0.1, 0.2, 0.7, 1e-17])
    tried, left = trials(p, [Draws("independent", [3, 0, 3], q)], range(4))
    assert [chance for _, chance in tried][::2] == [0, 0]
    assert left[3] == 0
    assert left.sum() == pytest.approx(1)


TREE_SIZE = 3


def path_law(base: np.random.Generator, concentration: float) -> Mapping[tuple[int, ...], Float64]:
    """A law of the next token after each path of at most two tokens."""
    paths = [(), *((a,) for a in range(3)), *((a, b) for a in range(3) for b in range(3))]
    return {path: base.dirichlet(np.full(TREE_SIZE, concentration)) for path in paths}


def path_of(tree: TokenTree, node: int) -> tuple[int, ...]:
    return () if node == ROOT else tuple(tree.paths()[node])


def grown(
    q: Mapping[tuple[int, ...], Float64], counts: tuple[int, int], regime: Regime, coins: Coins
) -> tuple[TokenTree, dict[int, list[Draws]]]:
    """A tree of two levels as a draft grows it, repeats merged, with the draws below each node."""
    tree = TokenTree()
    drafts: dict[int, list[Draws]] = {}
    for node in range(-1, 100):
        if node >= len(tree):
            break
        path = path_of(tree, node)
        if len(path) == 2:
            continue
        known: dict[int, int] = {}
        if regime == "chosen":
            tokens = np.argsort(-q[path])[: counts[len(path)]].tolist()
        else:
            tokens = draw(q[path], counts[len(path)], regime, len(path), coins)
        for token in tokens:
            if token not in known:
                known[token] = len(tree)
                tree.tokens.append(token)
                tree.parents.append(node)
                tree.reaches.append(0.5 if node < 0 else tree.reaches[node] / 2)
                tree.features.append(())
        law = None if regime == "chosen" else q[path]
        drafts[node] = [Draws(regime, [known[token] for token in tokens], law)]
    tree.check()
    return tree, drafts


@pytest.mark.parametrize(
    ("regime", "counts"),
    [
        ("independent", (2, 1)),
        ("independent", (2, 2)),
        ("distinct", (2, 2)),
        ("distinct", (3, 1)),
        ("chosen", (2, 2)),
    ],
)
def test_texts_from_a_tree_of_two_levels(regime: Regime, counts: tuple[int, int]) -> None:
    """What a walk does not emit, plain sampling adds: the law of the first three tokens is the target's."""
    rng = np.random.default_rng(11)
    p, q = path_law(rng, 1.0), path_law(rng, 1.0)

    def run(coins: Branch) -> list[int]:
        tree, drafts = grown(q, counts, regime, coins)
        verdict = walk(tree, lambda node: p[path_of(tree, node)], drafts, 5, coins)
        return [*(tree.tokens[node] for node in verdict.nodes), verdict.token]

    law = np.zeros((3, 3, 3))
    lengths = set()
    for weight, text in outcomes(run):
        lengths.add(len(text))
        if len(text) == 1:
            law[text[0]] += weight * p[tuple(text)][:, None] * np.stack([p[text[0], b] for b in range(3)])
        elif len(text) == 2:
            law[text[0], text[1]] += weight * p[tuple(text)]
        else:
            law[tuple(text)] += weight
    exact = np.array(
        [[[p[()][a] * p[a,][b] * p[a, b][c] for c in range(3)] for b in range(3)] for a in range(3)]
    )
    assert lengths == ({2, 3} if counts[0] == 3 else {1, 2, 3})
    assert np.abs(law - exact).max() < 2 * EXACT


def chi_square(counts: Float64, law: Float64) -> float:
    expected = counts.sum() * law
    return float(((counts - expected) ** 2 / expected).sum())


def test_seeds_give_the_law() -> None:
    """The coins that are used in earnest. 23.5 is exceeded by chance once in ten thousand (4 degrees of freedom)."""
    p, q = np.array([0.05, 0.1, 0.15, 0.3, 0.4]), np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    first, wrong = np.zeros(5), np.zeros(5)
    tree = one_level(5)
    for seed in range(4000):
        coins = PhiloxCoins(seed, 0, 9, 1, 2, Purpose.DRAFT)
        draws = Draws("distinct", draw(q, 2, "distinct", 9, coins), q)
        for counts, drafts in ((first, draws), (wrong, Draws("independent", [0, 1], q))):
            verdict = verify(tree, lambda node: p, {ROOT: [drafts]}, seed=seed, position=9)
            counts[verdict.nodes[0] if verdict.nodes else verdict.token] += 1
    assert chi_square(first, p) < 23.5
    assert chi_square(wrong, p) > 500


def test_a_verdict_is_a_function_of_its_seed() -> None:
    p, q = path_law(np.random.default_rng(1), 1.0), path_law(np.random.default_rng(2), 1.0)
    asked: list[int] = []

    def once(seed: int, sample_index: int, position: int) -> Verdict:
        tree, drafts = grown(q, (2, 2), "distinct", PhiloxCoins(1, 0, 0, 2, 4, Purpose.DRAFT))

        def target(node: int) -> Float64:
            asked.append(node)
            return p[path_of(tree, node)]

        asked.clear()
        verdict = verify(tree, target, drafts, seed=seed, sample_index=sample_index, position=position)
        assert asked == [ROOT, *verdict.nodes]
        return verdict

    keys = [
        (seed, sample, position) for seed in range(30) for sample in (0, 1) for position in (0, 1, 1 << 40)
    ]
    found = {key: once(*key) for key in keys}
    assert found == {key: once(*key) for key in reversed(keys)}
    assert {len(verdict.nodes) for verdict in found.values()} == {1, 2}
    for other in ((1, 0), (0, 1), (0, 1 << 40)):
        assert any(found[seed, 0, 0] != found[seed, *other] for seed in range(30))


def test_coins_follow_from_seed_sample_position_purpose_and_number() -> None:
    def uniforms(*args: Any) -> list[float]:
        coins = PhiloxCoins(*args)
        return coins._uniforms[0].tolist()  # type: ignore[no-any-return]

    base = uniforms(5, 0, 7, 1, 8, Purpose.ACCEPT)
    assert PhiloxCoins(5, 0, 4, 9, 8, Purpose.ACCEPT)._uniforms[3].tolist() == base
    assert uniforms(5, 0, 7, 1, 20, Purpose.ACCEPT)[:8] == base
    others = [(6, 0, 7), (5, 1, 7), (5, 0, 8)]
    found = {*base, *uniforms(5, 0, 7, 1, 8, Purpose.DRAFT)}
    for other in others:
        found.update(uniforms(*other, 1, 8, Purpose.ACCEPT))
    assert len(found) == 8 * 5
    many = PhiloxCoins(3, 0, 0, 64, 64, Purpose.ACCEPT)._uniforms
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.02
    assert abs(many.var() - 1 / 12) < 0.005
    # 53 bits of two neighbouring words.
    words = [
        int(
            token_bits(
                np.array([5], np.uint64),
                np.array([0], np.uint32),
                np.array([7]),
                np.array([number]),
                Purpose.ACCEPT,
            )[0]
        )
        for number in (2, 3)
    ]
    assert base[1] == (words[0] // 32 * 2**26 + words[1] // 64) / 2**53


def test_no_coin_picks_a_token_without_probability() -> None:
    law = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    coins = PhiloxCoins(0, 0, 0, 1, 2, Purpose.ACCEPT)
    coins._uniforms = np.array([[0.0, 1 - 2.0**-53]])
    assert [coins.pick(0, law), coins.pick(0, law)] == [1, 3]


@pytest.mark.parametrize(
    ("p", "drafts", "words"),
    [
        ([0.5, np.nan], [], "no law"),
        ([0.5, -0.5], [], "no law"),
        ([0.0, 0.0], [], "no law"),
        ([np.inf, 1.0], [], "no law"),
        ([[0.5, 0.5]], [], "no law"),
        ([0.5, 0.5], [Draws("independent", [0])], "without a law"),
        ([0.5, 0.5], [Draws("chosen", [0], np.ones(2))], "with a law"),
        ([0.5, 0.5], [Draws("independent", [0], np.ones(3))], "2 and 3"),
        ([0.5, 0.5], [Draws("independent", [0], np.array([0.0, 1.0]))], "does not have it"),
        ([0.5, 0.5], [Draws("distinct", [0, 0], np.ones(2))], "does not have it"),
        ([0.5, 0.5], [Draws("distinct", [0, 1, 1], np.ones(2))], "does not have it"),
    ],
)
def test_what_is_no_law_or_no_draw_is_refused(p: Any, drafts: Seq[Draws], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trials(np.array(p), drafts, [0, 1])


def test_draws_below_another_node_are_refused() -> None:
    tree = TokenTree([4, 5], [ROOT, 0], [0.5] * 2, [()] * 2)
    for node in (1, 2, -1):
        with pytest.raises(ValueError, match="no child"):
            verify(tree, lambda _: np.ones(9), {ROOT: [Draws("chosen", [node])]}, seed=0, position=1)
    with pytest.raises(ValueError, match="not drawn"):
        draw(np.ones(4), 2, "chosen", 0, Branch([]))


def test_an_empty_tree_is_plain_sampling() -> None:
    law = np.array([0.0, 1.0, 0.0])
    assert verify(TokenTree(), lambda node: law, {}, seed=3, position=0) == Verdict([], 1)
