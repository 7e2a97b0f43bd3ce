"""Sequences that wait for their adapters, and the order in which these are fetched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from tokenloom.engine.adapter_pool import AdapterPool
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.prefix_cache import PrefixCache
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.waiting import WaitingQueue

_IDLE_SLICES: Final = 16
"""Slices that are copied at a time while nobody runs."""

_MOST_PREFETCHED: Final = 8
"""Adapters behind the first that are fetched ahead."""


class AdapterQueue:
    """Parks sequences whose adapter is not in the pool, until it has been fetched.

    Others pass them meanwhile. But where there is no room for the adapter of the first one, `blocked` is that
    sequence, and nobody behind it may start: so room comes about, and nobody starves.
    """

    def __init__(self, adapters: AdapterPool, cache: PrefixCache, order: QueueOrder) -> None:
        self.adapters = adapters
        self.blocked: Sequence | None = None
        self._cache = cache
        self._order = order
        self._parked = WaitingQueue(order)
        self._wanted: dict[str, dict[Sequence, None]] = {}
        self._begun: dict[str, None] = {}
        """Adapters that have pages, some of which are still to be copied."""

    def __len__(self) -> int:
        return len(self._parked)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._parked)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._parked

    def park(self, seq: Sequence) -> None:
        """Have `seq` wait for its adapter."""
        self._parked.push(seq)
        self._wanted.setdefault(seq.request.adapter, {})[seq] = None

    def remove(self, seq: Sequence) -> None:
        """`seq` waits no longer; if nobody else wants its adapter, it is not fetched."""
        adapter = seq.request.adapter
        self._parked.remove(seq)
        del self._wanted[adapter][seq]
        if not self._wanted[adapter]:
            del self._wanted[adapter]
            if adapter in self._begun:
                del self._begun[adapter]
                self.adapters.abandon(adapter)

    def fetch(
        self, now: float, num_running: int, promised_pages: int, next_one: Sequence | None
    ) -> list[Sequence]:
        """Bring adapters, a slice while others run: that of the first sequence, for which room is made, those that
        were begun, then others for which there is room to spare. Returns who can be admitted from now on.

        What was begun is finished also where there is no room for the first one: it cannot be evicted before, and the
        first one may wait for its pages. `promised_pages` are KV pages that running prompts will need, `next_one` is
        who is to be admitted next.
        """
        self.blocked = None
        head = self._parked.head(now)
        if head is None:
            return []
        first = head.request.adapter
        if first not in self._begun and not self._begin_first(head, now, promised_pages, next_one):
            self.blocked = head
        ready: list[Sequence] = []
        left = self.adapters.slice_pages * (1 if num_running else _IDLE_SLICES)
        begun = [adapter for adapter in self._begun if adapter != first]
        behind = islice((a for a in self._wanted if a != first and a not in self._begun), _MOST_PREFETCHED)
        for adapter in [*([] if self.blocked else [first]), *begun, *behind]:
            if left <= 0:
                break
            if adapter not in self._begun:
                # What is free and not needed for the growth of those that run.
                spare = self._free_pages() - promised_pages - 2 * num_running
                if self.blocked or not self._begin(adapter, spare, over_waiters=False):
                    break
            left -= self.adapters.copy(adapter, left)
            if self.adapters.is_ready(adapter):
                del self._begun[adapter]
                ready += self._wanted.pop(adapter)
        for seq in ready:
            self._parked.remove(seq)
        return ready

    def _begin_first(
        self, head: Sequence, now: float, promised_pages: int, next_one: Sequence | None
    ) -> bool:
        """Give the adapter of the first sequence pages; whether it got them."""
        over_waiters = next_one is None or self._order.key(head, now) < self._order.key(next_one, now)
        # All that running prompts can do without.
        spare = self._cache.num_available - promised_pages
        if over_waiters:
            frames = self.adapters.num_unleased_frames - self.adapters.num_cold_frames
            spare += frames * self._cache.pages.pages_per_frame
        return self._begin(head.request.adapter, spare, over_waiters=over_waiters)

    def _begin(self, adapter: str, spare: int, *, over_waiters: bool) -> bool:
        """Give an adapter pages where they take at most `spare` pages of KV; whether it got them."""
        if self._kv_pages(adapter) > spare or not self.adapters.reserve(
            adapter, self._cache.yield_frame, over_waiters=over_waiters
        ):
            return False
        self._begun[adapter] = None
        return True

    def _kv_pages(self, adapter: str) -> int:
        """KV pages that lie in as many frames as the adapter takes."""
        frames = -(-self.adapters.source.num_pages(adapter) // self.adapters.pages.pages_per_frame)
        return frames * self._cache.pages.pages_per_frame

    def _free_pages(self) -> int:
        pages = self._cache.pages
        return pages.pool.num_free * pages.pages_per_frame

    def check(self) -> None:
        """Raise AssertionError unless parked sequences and wanted adapters agree."""
        wanted = {seq for seqs in self._wanted.values() for seq in seqs}
        if wanted != set(self._parked) or not all(self._wanted.values()):
            raise AssertionError("parked sequences and wanted adapters disagree")
        resident = self.adapters.resident
        if set(self._begun) != {adapter for adapter, found in resident.items() if found.slot < 0}:
            raise AssertionError(f"adapters {sorted(self._begun)} were begun, and others are not bound")
