"""Which nodes of the proposed trees are verified, under one budget of rows for all requests of a step.

After Li et al., "AdaServe: Accelerating Multi-SLO LLM Serving with SLO-Customized Speculative Decoding" (EuroSys
2026): first every request gets the nodes that keep it on its pace, then the rest of the budget goes to the nodes
most likely to be taken, whosever they are. With exact chances the result is optimal: most expected tokens under the
budget among all choices that meet the needs. A node never reaches further than its parent, and parents come first
among equals, so what is taken from the top of a ranked tree is a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.token_tree import TokenTree

Order = Literal["ascending", "descending"]
"""Whom the first phase serves first: those who need least (most requests on pace when rows are short) or those who
need most (the furthest behind first, as in the paper's text; its released code sorts the other way)."""


@dataclass(frozen=True, slots=True)
class SelectionPolicy:
    """The two phases of the paper, what they become where rows are dear, and the paper's ablations.

    `boost` is what a node that a need asks for is worth against one that nobody needs: the first phase passes over
    nodes that are less than 1 / `boost` times as likely to be taken as the last one that the budget could hold
    without needs. Infinite is the paper: needs first, whatever their nodes are worth. A finite one keeps a request
    that is far behind from spending rows that hardly help it and would help others.
    `serve_needs` off leaves out the first phase. `rest` "equal" splits what the first phase leaves evenly instead of
    giving it to the best nodes, and "none" leaves it unused. In the first phase a request gets at most
    `cap` x budget / requests nodes (0: no cap), so that nobody who is far behind takes everything.
    """

    order: Order = "ascending"
    serve_needs: bool = True
    rest: Literal["best", "equal", "none"] = "best"
    cap: float = 1.2
    boost: float = inf


FULL: Final = SelectionPolicy(boost=2.0)
"""What serves: a token that keeps a pace is worth two that do not."""


class RankedTrees:
    """The nodes of the trees of one step, ranked within each tree by the chance to reach them.

    `reaches` [most nodes, trees] float64: column i falls from the best node of tree i, then is 0. `nodes` is the
    number of each; `sizes` [trees] says how many are real.
    """

    __slots__ = ("nodes", "reaches", "sizes")

    def __init__(self, trees: Sequence[TokenTree]) -> None:
        count = len(trees)
        self.sizes: NDArray[np.int64] = np.fromiter((len(tree.tokens) for tree in trees), np.int64, count)
        height = int(self.sizes.max(initial=0))
        total = int(self.sizes.sum())
        there = np.arange(height) < self.sizes[:, None]
        chances = np.zeros((count, height))
        chances[there] = list(chain.from_iterable(tree.chances for tree in trees)) if total else 0.0
        parents = np.full((count, height), -1)
        parents[there] = list(chain.from_iterable(tree.parents for tree in trees)) if total else -1
        # One row for the roots, then one per node, node by node: a node's parent is done before it.
        reaches = np.ones((height + 1, count))
        places = (parents.T + 1) * count + np.arange(count)
        flat, columns = reaches.ravel(), np.ascontiguousarray(chances.T)
        for node in range(height):
            np.multiply(flat.take(places[node]), columns[node], out=reaches[node + 1])
        by_tree = np.ascontiguousarray(reaches[1:].T)
        order = np.argsort(-by_tree, axis=1, kind="stable")
        self.nodes: NDArray[np.int64] = order
        self.reaches: NDArray[np.float64] = np.ascontiguousarray(np.take_along_axis(by_tree, order, 1).T)

    def __len__(self) -> int:
        return len(self.sizes)

    def counts_for(self, needs: NDArray[np.float64]) -> NDArray[np.int64]:
        """Nodes that bring the expected tokens of each tree to its need: needs [..., trees] → [..., trees].

        The token after the last accepted one is always produced, so a need of 1 takes no node; where all nodes do
        not suffice it is all of them.
        """
        before = np.cumsum(self.reaches, 0) - self.reaches
        wanted: NDArray[np.int64] = (1 + before < needs[..., None, :]).sum(-2)
        return np.minimum(wanted, self.sizes)

    def worth(self, needs: NDArray[np.float64], boost: float) -> NDArray[np.float64]:
        """`reaches`, times `boost` where the need of the tree is not met before: [most nodes, trees].

        Falls along a column as `reaches` does.
        """
        before = 1 + np.cumsum(self.reaches, 0) - self.reaches
        found: NDArray[np.float64] = self.reaches * np.where(before < needs, boost, 1.0)
        return found

    def select(
        self,
        budget: int,
        needs: NDArray[np.float64] | Sequence[float] | None = None,
        policy: SelectionPolicy = FULL,
    ) -> list[list[int]]:
        """The chosen nodes of each tree, ascending, so that parents come first.

        `budget` counts verified rows: the roots, which every request keeps, and the nodes. `needs` are the tokens
        that each request should make in this step (`pace.Pace`); nothing above 1 asks for nothing.
        """
        left = budget - len(self)
        if left <= 0 or not self.reaches.size:
            return [[] for _ in range(len(self))]
        counts = np.zeros(len(self), np.int64)
        if policy.serve_needs and needs is not None:
            counts = self._serve(left, budget, np.asarray(needs, float), policy)
            left -= int(counts.sum())
        if left > 0 and policy.rest == "best":
            counts = counts + self._best(left, counts)
        elif left > 0 and policy.rest == "equal":
            counts = counts + self._equal(left, counts)
        return [
            sorted(nodes[:take]) if take else []
            for nodes, take in zip(self.nodes.tolist(), counts.tolist(), strict=True)
        ]

    def _serve(
        self, left: int, budget: int, needs: NDArray[np.float64], policy: SelectionPolicy
    ) -> NDArray[np.int64]:
        """First phase: nodes by need, in order, until `left` rows are given away."""
        wanted = self.counts_for(needs)
        if policy.cap:
            wanted = np.minimum(wanted, int(policy.cap * budget / len(self)))
        if policy.boost < inf:
            last = max(0, self.reaches.size - left)
            floor = np.partition(self.reaches, last, axis=None)[last] / policy.boost
            wanted = np.minimum(wanted, (self.reaches >= floor).sum(0))
        order = np.argsort(needs if policy.order == "ascending" else -needs, kind="stable")
        before = np.cumsum(wanted[order]) - wanted[order]
        counts = np.zeros(len(self), np.int64)
        counts[order] = np.clip(left - before, 0, wanted[order])
        return counts

    def _best(self, left: int, taken: NDArray[np.int64]) -> NDArray[np.int64]:
        """Second phase: how many of each tree are among the best `left` that are not yet taken."""
        rank = np.arange(len(self.reaches))[:, None]
        open_nodes = np.where((rank >= taken) & (rank < self.sizes), self.reaches, -1.0)
        free = self.sizes - taken
        if left >= int(free.sum()):
            return free
        # All above the last one that fits, then its equals in the order of the trees: a parent that equals its
        # child stands before it in its own tree, so taking fewer of a tree drops the child first.
        limit = np.partition(open_nodes, open_nodes.size - left, axis=None)[open_nodes.size - left]
        counts: NDArray[np.int64] = (open_nodes > limit).sum(0)
        equal = (open_nodes == limit).sum(0)
        before = np.cumsum(equal) - equal
        counts += np.clip(left - int(counts.sum()) - before, 0, equal)
        return counts

    def _equal(self, left: int, taken: NDArray[np.int64]) -> NDArray[np.int64]:
        """An even split of `left`, the first trees having one more; what a small tree cannot use is not used."""
        share = np.full(len(self), left // len(self))
        share[: left % len(self)] += 1
        counts: NDArray[np.int64] = np.minimum(share, self.sizes - taken)
        return counts


def select(
    trees: Sequence[TokenTree],
    budget: int,
    needs: NDArray[np.float64] | Sequence[float] | None = None,
    policy: SelectionPolicy = FULL,
) -> list[list[int]]:
    """`RankedTrees.select` for trees that are ranked for this alone."""
    return RankedTrees(trees).select(budget, needs, policy)
