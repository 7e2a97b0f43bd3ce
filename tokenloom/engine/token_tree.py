"""Token trees: speculated continuations of one sequence, verified in one pass.

The root is the last committed token, whose KV is still to be computed; it is no node. After Miao et al.,
"SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and Verification"
(ASPLOS 2024), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from numpy.typing import NDArray

MAX_NODES = 64
"""Nodes of one tree at most: attention gathers up to 64 ancestors of a row."""

ROOT = -1

Regime = Literal["independent", "distinct", "chosen"]
"""independent: draws from one law, each as if it were the only one; a token may come several times. distinct: draws
without replacement; each has the law of the first without the tokens before it. chosen: no draws, but children that a
rule picked, each a point mass; then sampling from the target's law and looking whether it is a child is all there is
to do, and trying them one by one does just that."""


class Draws(NamedTuple):
    """What one draft drew below one node: `nodes` are children of it in the order of the draws. `law` are the
    probabilities [V] that the first came from (of any positive sum), None if they were chosen."""

    regime: Regime
    nodes: Sequence[int]
    law: NDArray[Any] | None = None


@dataclass(slots=True)
class TokenTree:
    """Node i has token `tokens[i]` and hangs below node `parents[i]` < i (`ROOT`: the root).

    `reaches[i]` is the estimated probability that the target takes the whole path to the node: in [0, 1], and at most
    that of its parent.
    `features[i]` is what each proposer that suggested it said about it: (number of the proposer, rank among the
    siblings that it suggested, from 0, its own confidence in [0, 1]).
    No two children of a node have one token. `draws[node]` says which children of a node (or of `ROOT`) are draws,
    and from which laws; all others were chosen.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reaches: list[float] = field(default_factory=list)
    features: list[tuple[tuple[int, int, float], ...]] = field(default_factory=list)
    draws: dict[int, list[Draws]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def depths(self) -> list[int]:
        """Of each node: 1 below the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def children(self) -> dict[tuple[int, int], int]:
        """(parent, token) → node."""
        return {pair: node for node, pair in enumerate(zip(self.parents, self.tokens, strict=True))}

    def paths(self) -> list[list[int]]:
        """Of each node: the tokens from below the root down to it."""
        paths: list[list[int]] = []
        for parent, token in zip(self.parents, self.tokens, strict=True):
            paths.append([token] if parent < 0 else [*paths[parent], token])
        return paths

    def keep(self, nodes: Sequence[int]) -> TokenTree:
        """The tree of `nodes` alone, in their order: parents before children, every parent among them. It has no
        `draws`: what was kept of them was chosen."""
        number = {ROOT: ROOT} | {node: i for i, node in enumerate(nodes)}
        return TokenTree(
            [self.tokens[node] for node in nodes],
            [number[self.parents[node]] for node in nodes],
            [self.reaches[node] for node in nodes],
            [self.features[node] for node in nodes],
        )

    def check(self) -> None:
        """Raise ValueError unless the tree is legal."""
        count = len(self.tokens)
        if count > MAX_NODES:
            raise ValueError(f"a tree of {count} nodes, more than {MAX_NODES}")
        if not len(self.parents) == len(self.reaches) == len(self.features) == count:
            raise ValueError("the columns of a tree have different lengths")
        for node, (parent, reach) in enumerate(zip(self.parents, self.reaches, strict=True)):
            if not ROOT <= parent < node:
                raise ValueError(f"node {node} has parent {parent}")
            most = 1.0 if parent == ROOT else self.reaches[parent]
            if not 0 <= reach <= most:
                raise ValueError(f"node {node} is reached with probability {reach}, its parent with {most}")
        if len(self.children()) != count:
            raise ValueError("two children of one node have the same token")


def merge(trees: Sequence[TokenTree]) -> TokenTree:
    """The union of the trees' token sequences (section 3.2 of the paper): nodes are one iff the tokens from the
    root to them are equal. A node that several trees have keeps what each of them said, and is reached as the most
    confident of them says. One tree alone is given back itself.
    """
    if len(trees) == 1:
        return trees[0]
    merged = TokenTree()
    known: dict[tuple[int, int], int] = {}
    for tree in trees:
        number = {ROOT: ROOT}
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            key = (number[parent], token)
            found = known.get(key)
            if found is None:
                found = known[key] = len(merged.tokens)
                merged.tokens.append(token)
                merged.parents.append(key[0])
                merged.reaches.append(tree.reaches[node])
                merged.features.append(tree.features[node])
            else:
                merged.reaches[found] = max(merged.reaches[found], tree.reaches[node])
                merged.features[found] += tree.features[node]
            number[node] = found
        for parent, drawn in tree.draws.items():
            merged.draws.setdefault(number[parent], []).extend(
                draws._replace(nodes=[number[node] for node in draws.nodes]) for draws in drawn
            )
    return merged
