"""Reference-counted KV pages found again by the hash chain of their tokens.

A page's digest covers its tokens and everything that its K and V depend on: the parent's digest and, at the
root, the identity (model, numerics, formats, adapter content, tenant salt, exactness). Pages with no user stay
as *idle* until the least recently used of them is needed for something else.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.engine.frames import PageClass
from tokenloom.errors import OutOfMemory

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


class PrefixCache:
    """Owns the reference counts of one page class and the map from digests to resident pages.

    `enabled` False keeps the reference counts but never finds or keeps a page after its last user.
    """

    def __init__(self, pages: PageClass, enabled: bool = True) -> None:
        self.pages = pages
        self.enabled = enabled
        self.references: dict[int, int] = {}
        self._resident: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.num_evictions = 0

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free ones and idle ones."""
        return self.pages.num_free + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def allocate(self) -> int | None:
        """A page with one reference and no content, evicting the least recently used idle page if needed."""
        try:
            page = self.pages.allocate()
        except OutOfMemory:
            if not self._idle:
                return None
            self._evict()
            page = self.pages.allocate()
        self.references[page] = 1
        return page

    def _evict(self) -> None:
        page, _ = self._idle.popitem(last=False)
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
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self.pages.free(page)

    def clear(self) -> int:
        """Forget every idle page; returns how many."""
        count = len(self._idle)
        while self._idle:
            self._evict()
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
