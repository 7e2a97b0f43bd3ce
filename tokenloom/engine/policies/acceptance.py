"""How likely the target is to take a proposed token, learned from what it took before.

Under greedy or coupled verification a node is taken iff its token is the one that the target samples, and how often
that happens is not what the proposer's softmax says. So acceptance is counted by rank among siblings and by
confidence, for every proposer and adapter.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

EDGES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
"""Confidences at which a new bin begins: closer together near 0 and 1, where a small difference is worth most."""

_BINS: Final = len(EDGES) + 1
_STEPS: Final = 1024
_BIN_OF: Final = tuple(bisect_right(EDGES, i / _STEPS) for i in range(_STEPS + 1))


class AcceptanceTable:
    """Calibrated chances by (proposer, adapter, rank, confidence).

    A cell holds how often its nodes were taken; the cell of an adapter is pulled towards that of the proposer over
    all adapters, as if by `pull` further observations, and that one towards the confidence itself. A cell remembers
    about its last `window` observations, so that it follows a text that becomes harder. Ranks from `ranks` - 1 on
    share a cell. At most `max_adapters` pairs of proposer and adapter are kept, the last observed ones.

    With a depth in place of the rank and one constant confidence as the prior it counts how often whole levels of a
    proposer's trees are taken (`pace.expected_gains`).
    """

    def __init__(
        self, ranks: int = 8, window: float = 2000.0, pull: float = 16.0, max_adapters: int = 256
    ) -> None:
        self._ranks = ranks
        self._keep = 1 - 1 / window
        self._pull = pull
        self._max_adapters = max_adapters
        # A table is hits and counts in turn, cell by cell: two numbers of one list are read in a fifth of the time
        # that an array takes.
        self._shared: dict[int, list[float]] = {}
        self._own: dict[tuple[int, str], list[float]] = {}

    @property
    def num_adapters(self) -> int:
        """Pairs of proposer and adapter that have a table of their own."""
        return len(self._own)

    def _cell(self, rank: int, confidence: float) -> int:
        return 2 * (min(max(rank, 0), self._ranks - 1) * _BINS + _BIN_OF[int(confidence * _STEPS)])

    def chance(self, proposer: int, adapter: str, rank: int, confidence: float) -> float:
        """Probability that the target takes a node where it takes the node's parent, in [0, 1].

        `rank` counts from 0 among the siblings of this proposer; a `confidence` out of [0, 1] is read as the nearest
        end, NaN as 0. A proposer or adapter that was never observed has its prior.
        """
        # The constant stands first: comparisons with NaN are false, and then max() returns its first argument.
        estimate = min(max(0.0, confidence), 1.0)
        shared = self._shared.get(proposer)
        if shared is None:
            return estimate
        cell = self._cell(rank, estimate)
        estimate = (shared[cell] + self._pull * estimate) / (shared[cell + 1] + self._pull)
        own = self._own.get((proposer, adapter))
        if own is None:
            return estimate
        return (own[cell] + self._pull * estimate) / (own[cell + 1] + self._pull)

    def chances(
        self, proposer: int, adapter: str, ranks: Sequence[int], confidences: Sequence[float]
    ) -> list[float]:
        """`chance` of each node of one proposal."""
        chance = self.chance
        return [chance(proposer, adapter, *node) for node in zip(ranks, confidences, strict=True)]

    def fade(self, proposer: int, most: float) -> None:
        """What is known of `proposer` is old: no cell counts for more than `most` observations from now on."""
        tables = [self._shared.get(proposer), *(own for key, own in self._own.items() if key[0] == proposer)]
        for table in tables:
            for cell in range(0, len(table or ()), 2):
                if table and table[cell + 1] > most:
                    table[cell] *= most / table[cell + 1]
                    table[cell + 1] = most

    def observe(self, proposer: int, adapter: str, rank: int, confidence: float, accepted: bool) -> None:
        """A node that was verified and whose parent was taken (or is the root) was taken itself, or was not.

        Nodes below one that was not taken say nothing, and must not be reported.
        """
        cell = self._cell(rank, min(max(0.0, confidence), 1.0))
        shared = self._shared.get(proposer)
        if shared is None:
            shared = self._shared[proposer] = [0.0] * (2 * self._ranks * _BINS)
        key = (proposer, adapter)
        own = self._own.pop(key, None)
        if own is None:
            own = [0.0] * (2 * self._ranks * _BINS)
            if len(self._own) >= self._max_adapters:
                del self._own[next(iter(self._own))]
        self._own[key] = own
        hit, keep = float(accepted), self._keep
        for table in (shared, own):
            table[cell] = table[cell] * keep + hit
            table[cell + 1] = table[cell + 1] * keep + 1.0
