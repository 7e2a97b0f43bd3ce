"""Which nodes of the proposed trees are verified, under one budget of rows for all requests of a step.

After Li et al., "AdaServe: Accelerating Multi-SLO LLM Serving with SLO-Customized Speculative Decoding" (EuroSys
2026): first every request gets the nodes that keep it on its pace, then the rest of the budget goes to the nodes
most likely to be taken, whosever they are. With exact chances the result is optimal: most expected tokens under the
budget among all choices that meet the needs. A node never reaches further than its parent, and parents come first
among equals, so what is taken from the top of a ranked tree is a tree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
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

    `boost` (at least 1) is what a node that a need asks for is worth against one that nobody needs: the first phase
    passes over nodes that are less than 1 / `boost` times as likely to be taken as the last one that the budget could
    hold without needs. Infinite is the paper: needs first, whatever their nodes are worth. A finite one keeps a
    request that is far behind from spending rows that hardly help it and would help others.
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
    """The nodes of the trees of one step, ranked by the chance to reach them.

    `sizes` [trees] int64 and, over all trees, `reaches` [nodes] float64, which falls; equals stand in the order of
    the trees, and parents before their children. Within each tree: `columns` and `nodes`, for who asks for them.
    """

    __slots__ = ("_by_tree", "_flat", "_order", "reaches", "sizes")

    def __init__(self, trees: Sequence[TokenTree]) -> None:
        self.sizes: NDArray[np.int64] = np.array([len(tree.tokens) for tree in trees], np.int64)
        self._flat = np.array([reach for tree in trees for reach in tree.reaches], np.float64)
        self._order = np.argsort(-self._flat, kind="stable")
        self.reaches: NDArray[np.float64] = self._flat[self._order]
        self._by_tree: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def columns(self) -> NDArray[np.float64]:
        """[most nodes, trees] float64: column i falls from the best node of tree i, then is 0."""
        return self._ranked_by_tree()[0]

    @property
    def nodes(self) -> NDArray[np.int64]:
        """[trees, most nodes]: the numbers of the nodes of `columns`."""
        return self._ranked_by_tree()[1]

    def _ranked_by_tree(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        if self._by_tree is None:
            height = int(self.sizes.max(initial=0))
            found = np.zeros((len(self), height))
            found[np.arange(height) < self.sizes[:, None]] = self._flat
            order = np.argsort(-found, axis=1, kind="stable")
            self._by_tree = np.ascontiguousarray(np.take_along_axis(found, order, 1).T), order
        return self._by_tree

    def counts_for(self, needs: NDArray[np.float64]) -> NDArray[np.int64]:
        """Nodes that bring the expected tokens of each tree to its need: needs [..., trees] → [..., trees].

        The token after the last accepted one is always produced, so a need of 1 takes no node; where all nodes do
        not suffice it is all of them.
        """
        before = np.cumsum(self.columns, 0) - self.columns
        wanted: NDArray[np.int64] = (1 + before < needs[..., None, :]).sum(-2)
        return np.minimum(wanted, self.sizes)

    def worth(self, needs: NDArray[np.float64], boost: float) -> NDArray[np.float64]:
        """`columns`, times `boost` where the need of the tree is not met before: [most nodes, trees].

        Falls along a column as `columns` does.
        """
        before = 1 + np.cumsum(self.columns, 0) - self.columns
        found: NDArray[np.float64] = self.columns * np.where(before < needs, boost, 1.0)
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
        if (needs is None or not policy.serve_needs) and policy.rest == "best":
            return self._top(left)
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

    def _top(self, count: int) -> list[list[int]]:
        """The best `count` nodes over all trees."""
        if count >= len(self._order):
            return [list(range(size)) for size in self.sizes.tolist()]
        chosen = np.sort(self._order[:count]).tolist()
        if len(self) == 1:
            return [chosen]
        found: list[list[int]] = []
        first = place = 0
        for size in self.sizes.tolist():
            end = bisect_left(chosen, first + size, place)
            found.append([node - first for node in chosen[place:end]])
            first, place = first + size, end
        return found

    def _serve(
        self, left: int, budget: int, needs: NDArray[np.float64], policy: SelectionPolicy
    ) -> NDArray[np.int64]:
        """First phase: nodes by need, in order, until `left` rows are given away."""
        wanted = self.counts_for(needs)
        if policy.cap:
            wanted = np.minimum(wanted, int(policy.cap * budget / len(self)))
        if policy.boost < inf:
            floor = self.reaches[min(left, len(self.reaches)) - 1] / policy.boost
            wanted = np.minimum(wanted, (self.columns >= floor).sum(0))
        order = np.argsort(needs if policy.order == "ascending" else -needs, kind="stable")
        before = np.cumsum(wanted[order]) - wanted[order]
        counts = np.zeros(len(self), np.int64)
        counts[order] = np.clip(left - before, 0, wanted[order])
        return counts

    def _best(self, left: int, taken: NDArray[np.int64]) -> NDArray[np.int64]:
        """Second phase: how many of each tree are among the best `left` that are not yet taken."""
        rank = np.arange(len(self.columns))[:, None]
        open_nodes = np.where((rank >= taken) & (rank < self.sizes), self.columns, -1.0)
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
