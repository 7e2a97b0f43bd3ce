"""Selection against brute force, a plain two-phase heap, and the theorem of the paper (AdaServe, EuroSys 2026)."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from math import inf
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.engine.policies.tree_selection import RankedTrees, SelectionPolicy, select
from tokenloom.engine.token_tree import TokenTree

NO_CAP = SelectionPolicy(cap=0)


def grow(tree: TokenTree, parent: int, token: int, chance: float) -> int:
    tree.tokens.append(token)
    tree.parents.append(parent)
    tree.reaches.append(chance * (1.0 if parent < 0 else tree.reaches[parent]))
    tree.features.append(())
    return len(tree) - 1


def full_tree(rng: random.Random, vocabulary: int, depth: int) -> TokenTree:
    """Every path of up to `depth` tokens; the chances of siblings sum to 1."""
    tree = TokenTree()
    level = [-1]
    for _ in range(depth):
        below = []
        for parent in level:
            parts = [rng.random() ** 3 + 1e-3 for _ in range(vocabulary)]
            for token, part in enumerate(parts):
                below.append(grow(tree, parent, token, part / sum(parts)))
        level = below
    return tree


def random_tree(rng: random.Random, nodes: int) -> TokenTree:
    tree = TokenTree()
    for token in range(nodes):
        grow(tree, rng.randrange(-1, token), token, rng.random())
    return tree


def beam(tree: TokenTree, width: int, depth: int) -> set[int]:
    """Level by level the best `width` nodes below those kept."""
    depths, reaches = tree.depths(), tree.reaches
    kept: set[int] = {-1}
    for level in range(1, depth + 1):
        below = [i for i, parent in enumerate(tree.parents) if depths[i] == level and parent in kept]
        kept.update(sorted(below, key=lambda node: -reaches[node])[:width])
    return kept - {-1}


def subtrees(tree: TokenTree, most: int) -> Iterator[tuple[int, ...]]:
    """Every set of at most `most` nodes that holds the parents of its nodes, each once."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        children.setdefault(parent, []).append(node)

    def extend(chosen: tuple[int, ...], border: list[int]) -> Iterator[tuple[int, ...]]:
        yield chosen
        if len(chosen) < most:
            for i, node in enumerate(border):
                yield from extend((*chosen, node), border[i + 1 :] + children.get(node, []))

    return extend((), children.get(-1, []))


def best_by_size(tree: TokenTree, most: int) -> list[float]:
    """The most expected tokens (the produced one included) with each number of nodes."""
    reaches = tree.reaches
    best = [-1.0] * (most + 1)
    for nodes in subtrees(tree, most):
        best[len(nodes)] = max(best[len(nodes)], 1 + sum(reaches[node] for node in nodes))
    return best


def brute_force(bests: Sequence[list[float]], nodes: int, needs: Sequence[float]) -> float | None:
    """The most expected tokens in all with at most `nodes` nodes such that every need is met; None: impossible."""
    found = None
    for sizes in itertools.product(range(nodes + 1), repeat=len(bests)):
        if sum(sizes) > nodes:
            continue
        values = [best[size] for best, size in zip(bests, sizes, strict=True)]
        if all(value > -1 and value >= need for value, need in zip(values, needs, strict=True)):
            found = max(found or 0.0, sum(values))
    return found


def expected(tree: TokenTree, nodes: list[int]) -> float:
    reaches = tree.reaches
    return 1 + sum(reaches[node] for node in nodes)


@pytest.mark.parametrize("requests", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("vocabulary", [1, 2, 3])
def test_it_equals_brute_force(vocabulary: int, depth: int, requests: int) -> None:
    rng = random.Random(100 * vocabulary + 10 * depth + requests)
    met = unmet = 0
    for _ in range(3):
        trees = [full_tree(rng, vocabulary, depth) for _ in range(requests)]
        bests = [best_by_size(tree, 8 - requests) for tree in trees]
        for budget in range(requests, 9):
            for needs in ([0.0] * requests, [rng.uniform(0.5, 1 + depth * 0.7) for _ in trees]):
                chosen = select(trees, budget, needs, NO_CAP)
                values = [expected(tree, nodes) for tree, nodes in zip(trees, chosen, strict=True)]
                best = brute_force(bests, budget - requests, needs)
                if all(value >= need for value, need in zip(values, needs, strict=True)):
                    assert best is not None and sum(values) == pytest.approx(best, abs=1e-12)
                    met += 1
                else:
                    assert best is None
                    unmet += 1
    assert met and unmet


def two_phases(
    trees: Sequence[TokenTree], budget: int, needs: Sequence[float], policy: SelectionPolicy
) -> list[list[int]]:
    """The paper's algorithm 2, node by node from a heap."""
    left = budget - len(trees)
    cap = int(policy.cap * budget / len(trees)) if policy.cap else 10**9
    heaps = [
        [(-reach, node) for node, reach in enumerate(tree.reaches) if tree.parents[node] < 0]
        for tree in trees
    ]
    chosen: list[list[int]] = [[] for _ in trees]

    def take(i: int) -> float:
        reach, node = heapq.heappop(heaps[i])
        chosen[i].append(node)
        for child, parent in enumerate(trees[i].parents):
            if parent == node:
                heapq.heappush(heaps[i], (-trees[i].reaches[child], child))
        return -reach

    for heap in heaps:
        heapq.heapify(heap)
    sign = 1 if policy.order == "ascending" else -1
    for i in sorted(range(len(trees)), key=lambda i: sign * needs[i]):
        total = 1.0
        while total < needs[i] and left > 0 and heaps[i] and len(chosen[i]) < cap:
            total += take(i)
            left -= 1
    while left > 0 and any(heaps):
        take(min((i for i in range(len(trees)) if heaps[i]), key=lambda i: heaps[i][0]))
        left -= 1
    return [sorted(nodes) for nodes in chosen]


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("cap", [0.0, 1.2])
def test_it_equals_the_plain_two_phases(order: str, cap: float) -> None:
    policy = SelectionPolicy(order=order, cap=cap)  # type: ignore[arg-type]
    rng = random.Random(5)
    for _ in range(200):
        trees = [random_tree(rng, rng.randrange(0, 20)) for _ in range(rng.randrange(1, 8))]
        budget = len(trees) + rng.randrange(0, 60)
        needs = [rng.choice([0.0, rng.uniform(0, 6)]) for _ in trees]
        assert select(trees, budget, needs, policy) == two_phases(trees, budget, needs, policy)


def tree_of(rows: list[tuple[float, float]]) -> TokenTree:
    """Node by node its place, from which its parent follows, and its chance."""
    tree = TokenTree()
    for node, (place, chance) in enumerate(rows):
        grow(tree, min(node - 1, int(place * node)) if place > 0 else -1, node, chance)
    return tree


trees_of_any_kind = st.lists(
    st.lists(st.tuples(st.floats(-1, 1), st.sampled_from([0.0, 1e-300, 0.3, 0.5, 1.0])), max_size=64).map(
        tree_of
    ),
    max_size=6,
)
policies = st.builds(
    SelectionPolicy,
    order=st.sampled_from(["ascending", "descending"]),
    serve_needs=st.booleans(),
    rest=st.sampled_from(["best", "equal", "none"]),
    cap=st.sampled_from([0.0, 1.2]),
    boost=st.sampled_from([1.0, 2.0, inf]),
)


@given(trees_of_any_kind, st.integers(0, 200), st.lists(st.floats(-5, 1e9), min_size=6), policies)
def test_the_choice_is_a_tree_within_the_budget(
    trees: list[TokenTree], budget: int, needs: list[float], policy: SelectionPolicy
) -> None:
    for tree in trees:
        tree.check()
    chosen = select(trees, budget, needs[: len(trees)], policy)
    assert len(chosen) == len(trees), "every request keeps its root"
    for tree, nodes in zip(trees, chosen, strict=True):
        assert nodes == sorted(set(nodes))
        assert all(tree.parents[node] < 0 or tree.parents[node] in nodes for node in nodes)
        tree.keep(nodes).check()
    spent = sum(len(nodes) for nodes in chosen)
    assert spent <= max(0, budget - len(trees))
    if policy.rest == "best":
        assert spent == min(max(0, budget - len(trees)), sum(len(tree) for tree in trees))


def test_a_budget_of_the_roots_takes_no_node() -> None:
    trees = [random_tree(random.Random(i), 10) for i in range(4)]
    assert select(trees, 4, [9.0] * 4) == [[]] * 4
    assert select(trees, 0, [9.0] * 4) == [[]] * 4
    assert select([], 10) == []


@pytest.mark.parametrize("seed", range(40))
def test_a_beam_as_wide_as_the_budget_contains_the_optimum(seed: int) -> None:
    """Theorem 4.1 of the paper, on one and on several trees."""
    rng = random.Random(seed)
    trees = [full_tree(rng, rng.randrange(1, 5), rng.randrange(1, 5)) for _ in range(rng.randrange(1, 4))]
    budget = len(trees) + rng.randrange(1, 24)
    for tree, nodes in zip(trees, select(trees, budget, policy=NO_CAP), strict=True):
        depth = max((tree.depths()[node] for node in nodes), default=0)
        assert set(nodes) <= beam(tree, budget, depth)


def test_orders_serve_the_many_or_the_furthest_behind() -> None:
    rng = random.Random(8)
    trees = [full_tree(rng, 2, 3) for _ in range(6)]
    needs = [1.2, 1.3, 1.4, 2.5, 2.6, 2.7]

    def served(order: str) -> list[bool]:
        chosen = select(trees, 6 + 6, needs, SelectionPolicy(order=order, cap=0, rest="none"))  # type: ignore[arg-type]
        return [
            expected(*pair) >= need for pair, need in zip(zip(trees, chosen, strict=True), needs, strict=True)
        ]

    assert sum(served("ascending")) > sum(served("descending"))
    assert served("descending")[5] or not served("ascending")[5]


def test_the_first_phase_keeps_the_paces() -> None:
    """Rows go to those who need them before they go where they gain most."""
    good, poor = TokenTree(), TokenTree()
    for depth in range(8):
        grow(good, depth - 1, 0, 0.95)
        grow(poor, depth - 1, 0, 0.5)
    chosen = select([good, poor], 2 + 8, [0.0, 1.7], SelectionPolicy())
    assert [len(nodes) for nodes in chosen] == [6, 2]
    # The second node would hardly help: 0.25, against 0.66 for the one that it would take the row from.
    assert [len(nodes) for nodes in select([good, poor], 2 + 8, [0.0, 1.7])] == [7, 1]
    assert [len(n) for n in select([good, poor], 2 + 8, [0.0, 1.7], SelectionPolicy(serve_needs=False))] == [
        8,
        0,
    ]
    assert [len(n) for n in select([good, poor], 2 + 8, None, SelectionPolicy(rest="equal"))] == [4, 4]


def test_counts_for_many_needs_at_once() -> None:
    rng = random.Random(2)
    trees = [random_tree(rng, size) for size in (0, 3, 17, 40)]
    ranked = RankedTrees(trees)
    needs = np.array([[rng.uniform(0, 9) for _ in trees] for _ in range(5)])
    many = ranked.counts_for(needs)
    assert many.tolist() == [ranked.counts_for(row).tolist() for row in needs]


def beams(requests: int, width: int = 3, depth: int = 8) -> list[TokenTree]:
    rng = random.Random(0)
    trees = []
    for _ in range(requests):
        tree = TokenTree()
        level = [-1]
        for _ in range(depth):
            level = [grow(tree, rng.choice(level), len(tree), rng.random()) for _ in range(width)]
        trees.append(tree)
    return trees


def test_256_requests_take_a_millisecond() -> None:
    trees = beams(256)
    needs = np.random.default_rng(0).uniform(0, 4, 256)

    def seconds() -> float:
        started = perf_counter()
        select(trees, 768, needs)
        return perf_counter() - started

    # A millisecond is wanted and measured by bench/slo_simulation.py; the factor is for a busy machine.
    assert min(seconds() for _ in range(30)) < 3e-3
