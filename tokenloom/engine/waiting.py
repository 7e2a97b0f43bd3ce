"""The waiting queue: by key, with ageing, in O(log n)."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.sequence import Sequence

Entry = tuple[int, float, float, str, int, int, Sequence]

_SPARE_ENTRIES = 64


class WaitingQueue:
    """Sequences that wait for admission.

    Two heaps hold every entry, one by rank and arrival, one by arrival alone; the oldest goes first once it is
    past the age bound. Removed entries stay in a heap until they reach its top or are the larger part of it.
    """

    def __init__(self, order: QueueOrder) -> None:
        self.order = order
        self._members: set[Sequence] = set()
        self._num_pushed = 0
        self._by_rank: list[Entry] = []
        self._by_arrival: list[Entry] = []

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._members

    def push(self, seq: Sequence) -> None:
        request = seq.request
        self._num_pushed += 1
        tail = (request.arrival, request.request_id, seq.index, self._num_pushed, seq)
        self._members.add(seq)
        heapq.heappush(self._by_rank, (*self.order.rank(request), *tail))
        heapq.heappush(self._by_arrival, (0, 0.0, *tail))

    def remove(self, seq: Sequence) -> None:
        """Take `seq` out; KeyError if it does not wait."""
        self._members.remove(seq)
        if len(self._by_arrival) > 2 * len(self._members) + _SPARE_ENTRIES:
            for heap in (self._by_rank, self._by_arrival):
                heap[:] = {entry[-1]: entry for entry in heap if entry[-1] in self._members}.values()
                heapq.heapify(heap)

    def head(self, now: float) -> Sequence | None:
        """Who is next, or None."""
        oldest = self._top(self._by_arrival)
        if oldest is None:
            return None
        if self.order.has_aged(oldest, now):
            return oldest
        return self._top(self._by_rank)

    def _top(self, heap: list[Entry]) -> Sequence | None:
        while heap and heap[0][-1] not in self._members:
            heapq.heappop(heap)
        return heap[0][-1] if heap else None
