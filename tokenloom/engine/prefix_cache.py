"""Reference-counted KV pages found again by the hash chain of their tokens.

A page's digest covers its tokens and everything that its K and V depend on: the parent's digest and, at the
root, the identity (model, numerics, formats, adapter content, tenant salt, exactness). Pages with no user stay
as *idle* until the least recently used of them is needed for something else.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.engine.frames import PageClass

Digest = bytes


def root_digest(identity: Sequence[str]) -> Digest:
    """Digest of the identity at the root of a chain; fields are length-prefixed, so no two tuples collide."""
    state = hashlib.blake2b(b"tokenloom/kv/1", digest_size=16)
    for text in identity:
        data = text.encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()


def page_digest(parent: Digest, tokens: Sequence[int]) -> Digest:
    """Digest of the page that holds `tokens` (PAGE_SIZE ids) after `parent`."""
    return hashlib.blake2b(parent + np.array(tokens, np.int32).tobytes(), digest_size=16).digest()


class FrameLender(Protocol):
    """Another class of pages, which gives frames back that it can do without."""

    @property
    def num_cold_frames(self) -> int: ...

    def evict_for_frame(self) -> bool:
        """Give one back; False if there is none."""


class PrefixCache:
    """Owns the reference counts of one page class and the map from digests to resident pages.

    `enabled` False keeps the reference counts but never finds or keeps a page after its last user. Frames of
    `lenders`, in their order, are asked for before an idle page is evicted: what these hold is cheaper to have
    again.
    """

    def __init__(self, pages: PageClass, enabled: bool = True, lenders: Iterable[FrameLender] = ()) -> None:
        self.pages = pages
        self.enabled = enabled
        self.lenders = list(lenders)
        self._busy: dict[int, int] = {}
        """Frame → its pages with references."""
        self.references: dict[int, int] = {}
        self._resident: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.num_evictions = 0

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free ones, those of frames that are lent, and idle ones."""
        free = self.pages.num_free
        if self.lenders:
            lent = sum(lender.num_cold_frames for lender in self.lenders) * self.pages.pages_per_frame
            free = min(free + lent, self.pages.max_pages - self.pages.num_used)
        return free + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def allocate(self) -> int | None:
        """A page with one reference and no content, evicting the least recently used idle page if needed."""
        if not self.pages.num_free and not any(lender.evict_for_frame() for lender in self.lenders):
            if not self._idle:
                return None
            self._evict(next(iter(self._idle)))
        page = self.pages.allocate()
        self.references[page] = 1
        self._hold(page, 1)
        return page

    def yield_frame(self) -> bool:
        """Have a frame come back for another class, a lent one first, else of idle pages; False if there is none."""
        return any(lender.evict_for_frame() for lender in self.lenders) or self.free_frame()

    def free_frame(self) -> bool:
        """Evict the idle pages of a frame that has no others; False if there is no such frame. The frame of the
        least recently used page goes first."""
        per_frame = self.pages.pages_per_frame
        frame = next((page // per_frame for page in self._idle if page // per_frame not in self._busy), -1)
        if frame < 0:
            return False
        for page in range(frame * per_frame, (frame + 1) * per_frame):
            if page in self._idle:
                self._evict(page)
        return True

    def _hold(self, page: int, change: int) -> None:
        frame = page // self.pages.pages_per_frame
        count = self._busy.get(frame, 0) + change
        if count:
            self._busy[frame] = count
        else:
            del self._busy[frame]

    def _evict(self, page: int) -> None:
        del self._idle[page]
        del self._resident[self._digest_of.pop(page)]
        self.pages.free(page)
        self.num_evictions += 1

    def find(self, digests: Iterable[Digest]) -> list[int]:
        """Pages of the longest resident prefix of the chain. No reference is taken."""
        found: list[int] = []
        for digest in digests:
            page = self._resident.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def num_idle_among(self, pages: Iterable[int]) -> int:
        """How many of `pages` are idle (acquiring them makes that many fewer available)."""
        return sum(page in self._idle for page in pages)

    def acquire(self, page: int) -> None:
        """Take one more reference on a resident page."""
        count = self.references.get(page, 0)
        if count == 0:
            del self._idle[page]
            self._hold(page, 1)
        self.references[page] = count + 1

    def register(self, page: int, digest: Digest) -> None:
        """Make a full, computed page findable. If another page has this content already, that one stays."""
        if self.enabled and digest not in self._resident and page not in self._digest_of:
            self._resident[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference on each page. The tail goes idle first: a prefix is worth more than its end."""
        for page in reversed(pages):
            count = self.references[page] - 1
            if count:
                self.references[page] = count
                continue
            del self.references[page]
            self._hold(page, -1)
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self.pages.free(page)

    def clear(self) -> int:
        """Forget every idle page; returns how many."""
        count = len(self._idle)
        while self._idle:
            self._evict(next(iter(self._idle)))
        return count

    def check(self, users: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless pages are conserved and references equal the `users`' page lists."""
        self.pages.check()
        if len(self.references) + len(self._idle) != self.pages.num_used:
            raise AssertionError(
                f"{len(self.references)} used + {len(self._idle)} idle pages, but {self.pages.num_used} taken"
            )
        if self.references.keys() & self._idle.keys():
            raise AssertionError("a page is both in use and idle")
        if {self._resident[d]: d for d in self._resident} != self._digest_of:
            raise AssertionError("digests and pages disagree")
        if not self._idle.keys() <= self._digest_of.keys():
            raise AssertionError("an idle page cannot be found")
        busy: dict[int, int] = {}
        for page in self.references:
            frame = page // self.pages.pages_per_frame
            busy[frame] = busy.get(frame, 0) + 1
        if busy != self._busy:
            raise AssertionError(f"busy frames {self._busy} do not add up to {busy}")
        counts: dict[int, int] = {}
        for page_list in users:
            for page in page_list:
                counts[page] = counts.get(page, 0) + 1
        if counts != self.references:
            raise AssertionError(f"reference counts {self.references} do not match the users' {counts}")


def extend_chain(chain: list[Digest], root: Digest, tokens: Sequence[int], num_tokens: int) -> None:
    """Append to `chain` the digests of all full pages of `tokens[:num_tokens]` that it lacks."""
    for index in range(len(chain), num_tokens // PAGE_SIZE):
        parent = chain[index - 1] if index else root
        chain.append(page_digest(parent, tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]))
