"""Which adapters are in the frame pool, and which come and go (unified paging, S-LoRA, Sheng et al. 2023).

Adapters are pages of a class of their own, cut from the same frames as KV pages. All that are known lie outside;
one is fetched when somebody who waits needs it, a slice before each step, and is bound to a slot once it is there.
A lease keeps it: one for each running sequence. Without leases it stays until its frames are needed, and the
one whose fetching costs least for what it holds goes first (GreedyDual-Size, Cao and Irani 1997).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.frames import PageClass
from tokenloom.engine.policies.fetch_slice import FetchSlice
from tokenloom.errors import InvalidParameter

_FETCH_COST = 1 << 20
"""What fetching an adapter costs beside its bytes, in bytes."""


class AdapterSource(Protocol):
    """Where adapters are fetched from, and what computes with them."""

    def num_pages(self, adapter: str) -> int:
        """Pages of a known adapter; KeyError for an unknown one."""

    def copy(self, adapter: str, first: int, pages: NDArray[np.int32]) -> None:
        """Copy pages first, first + 1, ... of the adapter to these pages of the pool."""

    def bind(self, adapter: str, slot: int, pages: NDArray[np.int32]) -> None:
        """Rows of `slot` have the adapter, which lies in `pages`, from now on."""

    def unbind(self, slot: int, pages: NDArray[np.int32]) -> None:
        """Nobody has `slot` any more (-1: nobody ever had one); the pages, some of them filled, go back."""

    def forget(self, adapter: str) -> None:
        """Nobody will ask for the adapter again; it may be unknown."""


@dataclass(slots=True)
class Residency:
    """An adapter in the pool: all its pages, of which `num_copied` are filled; `slot` -1: not bound yet."""

    pages: NDArray[np.int32]
    num_copied: int = 0
    slot: int = -1
    leases: int = 0
    waiters: int = 0
    worth: float = 0.0
    last_used: float = -1.0
    frames: tuple[int, ...] = ()

    @property
    def is_cold(self) -> bool:
        """Whether nobody runs or waits with it."""
        return self.leases == 0 and self.waiters == 0


class AdapterUse(NamedTuple):
    """How an adapter is used now: its bytes in the pool, live requests, running sequences, and the seconds since one
    started (-1: none since it came)."""

    adapter: str
    num_bytes: int
    num_live: int
    num_running: int
    idle_seconds: float
    pinned: bool


@dataclass(slots=True)
class AdapterStats:
    """Counts since the start: fetched and evicted adapters, bytes copied, and admissions that found theirs."""

    num_fetched: int = 0
    num_evicted: int = 0
    num_hits: int = 0
    num_misses: int = 0
    bytes_copied: int = 0
    requests: dict[str, int] = field(default_factory=dict)


class AdapterPool:
    """Residency of adapters in pages of class `pages`, each `page_bytes` long.

    At most `fetch_slice` is copied before a step while others run. "" is the base model, which is always there.
    """

    def __init__(
        self,
        pages: PageClass,
        source: AdapterSource,
        *,
        page_bytes: int,
        fetch_slice: FetchSlice | None = None,
    ) -> None:
        self.pages = pages
        self.source = source
        self.page_bytes = page_bytes
        self.fetch_slice = fetch_slice or FetchSlice()
        self.stats = AdapterStats()
        self.resident: dict[str, Residency] = {}
        self.pinned: set[str] = set()
        self.users: dict[str, int] = {}
        """Live requests by adapter, wherever they are."""
        self.preyed_on: list[str] = []
        """Adapters that went though somebody waits with them, until the scheduler has seen to it."""
        self._retired: set[str] = set()
        self._slots: list[int] = []
        self._num_slots = 0
        self._hot: dict[int, int] = {}
        """Frame → how many adapters in it are not cold."""
        self._inflation = 0.0

    @property
    def slice_pages(self) -> int:
        """Pages of the next slice, at least one."""
        return max(self.fetch_slice.num_bytes // self.page_bytes, 1)

    # --- who may run -------------------------------------------------------------------------------------

    def check(self, adapter: str) -> int:
        """Frames that the adapter ("": none) and the pinned ones take. Raises `InvalidParameter` for one that is
        unknown, or too large for the pool beside the pinned ones."""
        pinned = [self.source.num_pages(other) for other in self.pinned if other != adapter]
        per_frame = self.pages.pages_per_frame
        frames = sum(-(-count // per_frame) for count in pinned)
        if not adapter:
            return frames
        try:
            count = self.source.num_pages(adapter)
        except KeyError:
            raise InvalidParameter("adapter", adapter, "an adapter that is loaded") from None
        limit = self.pages.max_pages - sum(pinned)
        limit = min(limit, (self.pages.pool.num_frames - frames - 1) * per_frame)
        if count > limit:
            found, most = (f"{size * self.page_bytes >> 10} KiB" for size in (count, max(limit, 0)))
            raise InvalidParameter(
                "adapter", found, f"at most {most}, what memory for KV pages and pins leave"
            )
        return frames + -(-count // per_frame)

    def is_ready(self, adapter: str) -> bool:
        """Whether sequences with the adapter can be admitted now."""
        found = self.resident.get(adapter)
        return not adapter or (found is not None and found.slot >= 0)

    def slot_of(self, adapter: str) -> int:
        """The slot that its rows name; -1 for the base."""
        return self.resident[adapter].slot if adapter else -1

    def enter(self, adapter: str) -> None:
        """A request with the adapter is live."""
        if adapter:
            self.users[adapter] = self.users.get(adapter, 0) + 1
            self.stats.requests[adapter] = self.stats.requests.get(adapter, 0) + 1

    def leave(self, adapter: str) -> None:
        """It has ended."""
        if adapter:
            self.users[adapter] -= 1
            if not self.users[adapter]:
                del self.users[adapter]
            self._drop_retired(adapter)

    def lease(self, adapter: str, now: float) -> None:
        """A sequence with the adapter starts to run."""
        if adapter:
            self._count(adapter, leases=1)
            found = self.resident[adapter]
            found.last_used = now
            found.worth = self._inflation + self._value(found)

    def release(self, adapter: str) -> None:
        """It no longer runs."""
        if adapter:
            self._count(adapter, leases=-1)

    def wait(self, adapter: str, count: int) -> None:
        """`count` more sequences (or fewer) wait for pages though the adapter is there."""
        if adapter:
            self._count(adapter, waiters=count)

    def pin(self, adapter: str, on: bool) -> None:
        """Keep the adapter once it is there, whether it is used or not."""
        if on == (adapter in self.pinned):
            return
        if on:
            self.pinned.add(adapter)
        else:
            self.pinned.remove(adapter)
        if adapter in self.resident:
            self._count(adapter, leases=1 if on else -1)

    def retire(self, adapter: str) -> None:
        """No new request will have it: it goes as soon as the last one has ended."""
        self.pin(adapter, on=False)
        self._retired.add(adapter)
        self._drop_retired(adapter)

    def revive(self, adapter: str) -> None:
        """The adapter is offered again."""
        self._retired.discard(adapter)

    def uses(self, now: float) -> list[AdapterUse]:
        """Every adapter that is resident, pinned, or has been asked for."""
        names = {*self.resident, *self.pinned, *self.stats.requests}
        return [self._use(name, now) for name in sorted(names)]

    def _use(self, adapter: str, now: float) -> AdapterUse:
        found = self.resident.get(adapter)
        live, pinned = self.users.get(adapter, 0), adapter in self.pinned
        if found is None:
            return AdapterUse(adapter, 0, live, 0, -1.0, pinned)
        idle = now - found.last_used if found.last_used >= 0 else -1.0
        running = found.leases - pinned - (found.slot < 0)
        return AdapterUse(adapter, len(found.pages) * self.page_bytes, live, running, idle, pinned)

    # --- coming ------------------------------------------------------------------------------------------

    def reserve(self, adapter: str, free_frame: Callable[[], bool], *, over_waiters: bool) -> bool:
        """Take pages for an adapter that is not there; False if there are too few.

        Cold adapters make room first, then `free_frame()`, which returns whether it freed one. `over_waiters`:
        adapters that others only wait with may go too.
        """
        count = self.source.num_pages(adapter)
        while self.pages.num_free < count:
            if self.evict_one(over_waiters=over_waiters):
                continue
            # Frames do not help where adapters have all they may have.
            if self.pages.max_pages - self.pages.num_used < count or not free_frame():
                return False
        pages = np.array([self.pages.allocate() for _ in range(count)], np.int32)
        frames = tuple(np.unique(pages // self.pages.pages_per_frame).tolist())
        self.resident[adapter] = Residency(pages, frames=frames)
        # Until it is bound it must stay: somebody waits for it.
        self._count(adapter, leases=1 + (adapter in self.pinned))
        self.stats.num_misses += 1
        return True

    def copy(self, adapter: str, most: int) -> int:
        """Copy up to `most` more pages of a reserved adapter; binds it after the last. Returns how many."""
        found = self.resident[adapter]
        count = min(most, len(found.pages) - found.num_copied)
        if count:
            part = found.pages[found.num_copied : found.num_copied + count]
            self.source.copy(adapter, found.num_copied, part)
            found.num_copied += count
            self.stats.bytes_copied += count * self.page_bytes
        if found.num_copied == len(found.pages):
            slot = self._slots.pop() if self._slots else self._num_slots
            self.source.bind(adapter, slot, found.pages)
            self._num_slots = max(self._num_slots, slot + 1)
            found.slot = slot
            found.worth = self._inflation + self._value(found)
            self._count(adapter, leases=-1)
            self.stats.num_fetched += 1
        return count

    def abandon(self, adapter: str) -> None:
        """Give back the pages of an adapter that is not bound yet: nobody waits for it any more."""
        found = self.resident[adapter]
        self._count(adapter, leases=-found.leases)
        self._remove(adapter, found)

    # --- going -------------------------------------------------------------------------------------------

    @property
    def num_cold_frames(self) -> int:
        """Frames that evicting cold adapters would give back."""
        return len(self.pages.frames) - len(self._hot)

    @property
    def num_hot_frames(self) -> int:
        """Frames with an adapter that somebody runs or waits with."""
        return len(self._hot)

    @property
    def num_unleased_frames(self) -> int:
        """Frames that evicting all adapters that nobody runs with would give back."""
        leased = {frame for found in self.resident.values() if found.leases for frame in found.frames}
        return len(self.pages.frames) - len(leased)

    def evict_for_frame(self) -> bool:
        """Evict cold adapters until a frame comes back; False if none does."""
        while self.num_cold_frames:
            before = self.pages.pool.num_free
            if not self.evict_one(over_waiters=False):
                return False
            if self.pages.pool.num_free > before:
                return True
        return False

    def clear(self) -> None:
        """Evict every adapter; nobody runs or waits with one (after a failed step)."""
        for adapter, found in list(self.resident.items()):
            self._count(adapter, leases=-found.leases, waiters=-found.waiters)
            self._remove(adapter, found)

    def evict_one(self, *, over_waiters: bool, keep: str = "") -> bool:
        """Evict the adapter that is worth least of those that nobody runs with, and unless `over_waiters` nobody
        waits with; never `keep`. False if there is none."""
        candidates = [
            (found.waiters > 0, found.worth, adapter)
            for adapter, found in self.resident.items()
            if found.leases == 0 and (over_waiters or found.waiters == 0) and adapter != keep
        ]
        if not candidates:
            return False
        _, worth, adapter = min(candidates)
        found = self.resident[adapter]
        if found.waiters:
            self.preyed_on.append(adapter)
        self._inflation = max(self._inflation, worth)
        self._count(adapter, waiters=-found.waiters)
        self._remove(adapter, found)
        self.stats.num_evicted += 1
        return True

    def _drop_retired(self, adapter: str) -> None:
        if adapter not in self._retired or adapter in self.users:
            return
        found = self.resident.get(adapter)
        if found is not None:
            self._count(adapter, leases=-found.leases, waiters=-found.waiters)
            self._remove(adapter, found)
        self._retired.remove(adapter)
        self.stats.requests.pop(adapter, None)
        self.source.forget(adapter)

    def _remove(self, adapter: str, found: Residency) -> None:
        if found.num_copied or found.slot >= 0:
            self.source.unbind(found.slot, found.pages)
        if found.slot >= 0:
            self._slots.append(found.slot)
        for page in found.pages.tolist():
            self.pages.free(page)
        del self.resident[adapter]

    def _value(self, found: Residency) -> float:
        """What a byte of it costs to fetch."""
        size = max(len(found.pages) * self.page_bytes, 1)
        return (_FETCH_COST + size) / size

    def _count(self, adapter: str, leases: int = 0, waiters: int = 0) -> None:
        """Change its counts, and those of its frames if it turns cold or is cold no longer."""
        found = self.resident[adapter]
        was_cold = found.is_cold
        found.leases += leases
        found.waiters += waiters
        if found.is_cold == was_cold:
            return
        for frame in found.frames:
            count = self._hot.get(frame, 0) + (1 if was_cold else -1)
            if count:
                self._hot[frame] = count
            else:
                del self._hot[frame]

    def check_books(self, leases: Iterator[str]) -> None:
        """Raise AssertionError unless pages are conserved and the leases are those of the running `leases`."""
        self.pages.check()
        owned = [page for found in self.resident.values() for page in found.pages.tolist()]
        if len(set(owned)) != len(owned) or len(owned) != self.pages.num_used:
            raise AssertionError(f"{self.pages.num_used} adapter pages in use, {len(set(owned))} owned")
        wanted: dict[str, int] = {}
        for adapter in leases:
            wanted[adapter] = wanted.get(adapter, 0) + 1
        hot: dict[int, int] = {}
        for adapter, found in self.resident.items():
            held = (found.slot < 0) + (adapter in self.pinned) + wanted.pop(adapter, 0)
            if held != found.leases or found.waiters < 0:
                raise AssertionError(f"adapter {adapter}: {found.leases} leases instead of {held}")
            if (found.slot < 0) == (found.num_copied == len(found.pages)):
                raise AssertionError(f"adapter {adapter}: slot {found.slot} after {found.num_copied} pages")
            for frame in found.frames if not found.is_cold else ():
                hot[frame] = hot.get(frame, 0) + 1
        if wanted:
            raise AssertionError(f"running adapters {sorted(wanted)} are not in the pool")
        if hot != self._hot:
            raise AssertionError(f"hot frames {self._hot} do not add up to {hot}")
        slots = [found.slot for found in self.resident.values() if found.slot >= 0]
        if sorted(slots + self._slots) != list(range(self._num_slots)):
            raise AssertionError(f"slots {sorted(slots)} and free {sorted(self._slots)} do not add up")


class NoAdapters:
    """The source of an engine that has none."""

    def num_pages(self, adapter: str) -> int:
        raise KeyError(adapter)

    def copy(self, adapter: str, first: int, pages: NDArray[np.int32]) -> None:
        raise KeyError(adapter)

    def bind(self, adapter: str, slot: int, pages: NDArray[np.int32]) -> None:
        raise KeyError(adapter)

    def unbind(self, slot: int, pages: NDArray[np.int32]) -> None:
        raise KeyError(slot)

    def forget(self, adapter: str) -> None:
        """Nothing."""
