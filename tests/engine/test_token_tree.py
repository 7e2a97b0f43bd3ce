from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.engine.token_tree import MAX_NODES, ROOT, Draws, TokenTree, merge


@st.composite
def trees(draw: st.DrawFn, number: int = 0) -> TokenTree:
    tree = TokenTree()
    taken: set[tuple[int, int]] = set()
    for node in range(draw(st.integers(0, 12))):
        parent = draw(st.integers(ROOT, node - 1))
        token = draw(st.integers(0, 5))
        if (parent, token) in taken:
            break
        taken.add((parent, token))
        tree.tokens.append(token)
        tree.parents.append(parent)
        tree.reaches.append(draw(st.floats(0, 1)) * (1.0 if parent < 0 else tree.reaches[parent]))
        tree.features.append(((number, 0, 0.5),))
    return tree


def texts(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(path) for path in tree.paths()}


@given(st.tuples(trees(0), trees(1), trees(2)))
def test_a_merged_tree_has_the_token_sequences_of_all_and_no_other(parts: tuple[TokenTree, ...]) -> None:
    merged = merge(parts)
    merged.check()
    assert texts(merged) == set().union(*map(texts, parts))
    assert len(texts(merged)) == len(merged)
    for path, features, reach in zip(merged.paths(), merged.features, merged.reaches, strict=True):
        theirs = [
            (tree.features[node], tree.reaches[node])
            for tree in parts
            for node, found in enumerate(tree.paths())
            if found == path
        ]
        assert features == sum((feature for feature, _ in theirs), ())
        assert reach == max(reach for _, reach in theirs)


@given(trees(), st.integers(0, 12))
def test_what_is_kept_of_a_tree_is_a_tree(tree: TokenTree, count: int) -> None:
    reaches = tree.reaches
    best = sorted(range(len(tree)), key=lambda node: (-reaches[node], node))[:count]
    kept = tree.keep(sorted(best))
    kept.check()
    assert texts(kept) <= texts(tree)
    assert kept.reaches == [reaches[node] for node in sorted(best)]


def test_depths_paths_and_children() -> None:
    tree = TokenTree([7, 8, 9, 7], [-1, 0, 0, -1 + 3], [1.0] * 4, [()] * 4)
    assert tree.depths() == [1, 2, 2, 3]
    assert tree.paths() == [[7], [7, 8], [7, 9], [7, 9, 7]]
    assert tree.children() == {(-1, 7): 0, (0, 8): 1, (0, 9): 2, (2, 7): 3}


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (TokenTree([1, 1], [-1, -1], [0.5, 0.5], [(), ()]), "same token"),
        (TokenTree([1], [0], [0.5], [()]), "has parent 0"),
        (TokenTree([1], [-2], [0.5], [()]), "has parent -2"),
        (TokenTree([1], [-1], [1.5], [()]), "probability"),
        (TokenTree([1], [-1], [float("nan")], [()]), "probability"),
        (TokenTree([1, 2], [-1, 0], [0.5, 0.6], [(), ()]), "its parent with 0.5"),
        (TokenTree([1], [-1], [], [()]), "lengths"),
        (
            TokenTree(
                list(range(MAX_NODES + 1)),
                [-1] * (MAX_NODES + 1),
                [0.1] * (MAX_NODES + 1),
                [()] * (MAX_NODES + 1),
            ),
            "more than 64",
        ),
    ],
)
def test_what_is_no_tree_is_refused(tree: TokenTree, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tree.check()


def test_draws_follow_their_nodes_through_a_merge_and_not_through_a_choice() -> None:
    law = np.full(9, 1 / 9)
    one = TokenTree([5, 6, 7], [ROOT, ROOT, 1], [0.5] * 3, [()] * 3)
    one.draws = {ROOT: [Draws("distinct", [1, 0], law)], 1: [Draws("independent", [2, 2], law)]}
    two = TokenTree([6, 8, 7], [ROOT, 0, 0], [0.5] * 3, [()] * 3)
    two.draws = {0: [Draws("distinct", [2, 1], law)]}
    merged = merge([TokenTree([8], [ROOT], [0.5], [()]), one, two])
    assert (merged.tokens, merged.parents) == ([8, 5, 6, 7, 8], [ROOT, ROOT, ROOT, 2, 2])
    found = {node: [(d.regime, list(d.nodes)) for d in draws] for node, draws in merged.draws.items()}
    assert found == {ROOT: [("distinct", [2, 1])], 2: [("independent", [3, 3]), ("distinct", [3, 4])]}
    assert not merged.keep([0, 1, 2]).draws
