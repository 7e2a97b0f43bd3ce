"""Frames and pages: the pool of equal byte frames, and the classes that cut a frame into their own pages.

```
frames   | 0        | 1        | 2        | 3        |
owner    | target KV| free     | adapters | target KV|
pages     0 1 2 3 .            0 1         12 13 14 .        page id = frame * pages_per_frame + index
```
A frame belongs to one class while any of its pages is in use; an empty frame goes back to the pool.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenloom.errors import OutOfMemory


class FramePool:
    """`num_frames` equal frames; hands out frame numbers, holds no memory."""

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames
        self._free = list(range(num_frames - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A free frame, or None."""
        return self._free.pop() if self._free else None

    def give_back(self, frame: int) -> None:
        self._free.append(frame)

    def check(self) -> None:
        """Raise AssertionError unless every free frame is listed once."""
        if len(set(self._free)) != len(self._free):
            raise AssertionError("a frame is free twice")


class PageClass:
    """Pages of one kind (target KV, draft KV, adapter ...), cut from frames of the pool.

    `pages_per_frame` is how many pages one frame holds; `max_pages` bounds the class (None: the whole pool).
    `on_frame` is called with each frame that the class gets, and with each one before it goes back.
    """

    def __init__(
        self,
        name: str,
        pool: FramePool,
        pages_per_frame: int,
        max_pages: int | None = None,
        on_frame: Callable[[int], None] | None = None,
    ) -> None:
        self.name = name
        self.pool = pool
        self.pages_per_frame = pages_per_frame
        self.max_pages = pool.num_frames * pages_per_frame if max_pages is None else max_pages
        self.on_frame = on_frame
        self.num_used = 0
        self._partial: dict[int, list[int]] = {}
        self.frames: set[int] = set()
        """Frames that have a page in use."""

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could still give."""
        unused = len(self.frames) * self.pages_per_frame - self.num_used
        return min(unused + self.pool.num_free * self.pages_per_frame, self.max_pages - self.num_used)

    @property
    def num_ids(self) -> int:
        """Page ids lie in [0, num_ids)."""
        return self.pool.num_frames * self.pages_per_frame

    def allocate(self) -> int:
        """One page id; raises OutOfMemory when the class or the pool is exhausted."""
        if self.num_used >= self.max_pages:
            raise OutOfMemory(f"all {self.max_pages} pages of class {self.name!r} are in use")
        if not self._partial:
            frame = self.pool.take()
            if frame is None:
                raise OutOfMemory(f"no frame is left for class {self.name!r}")
            self.frames.add(frame)
            if self.on_frame is not None:
                self.on_frame(frame)
            first = frame * self.pages_per_frame
            self._partial[frame] = list(range(first + self.pages_per_frame - 1, first - 1, -1))
        frame, pages = next(iter(self._partial.items()))
        page = pages.pop()
        if not pages:
            del self._partial[frame]
        self.num_used += 1
        return page

    def free(self, page: int) -> None:
        """Give a page back; an empty frame returns to the pool."""
        frame = page // self.pages_per_frame
        pages = self._partial.setdefault(frame, [])
        pages.append(page)
        self.num_used -= 1
        if len(pages) == self.pages_per_frame:
            del self._partial[frame]
            if self.on_frame is not None:
                self.on_frame(frame)
            self.frames.remove(frame)
            self.pool.give_back(frame)

    def check(self) -> None:
        """Raise AssertionError unless pages and frames are conserved."""
        free = 0
        for frame, pages in self._partial.items():
            if frame not in self.frames or len(set(pages)) != len(pages) or not pages:
                raise AssertionError(f"frame {frame} of {self.name!r} has a broken free list")
            if any(page // self.pages_per_frame != frame for page in pages):
                raise AssertionError(f"frame {frame} of {self.name!r} lists a page of another frame")
            free += len(pages)
        if len(self.frames) * self.pages_per_frame - free != self.num_used:
            raise AssertionError(f"class {self.name!r}: {self.num_used} pages in use do not add up")
        if self.frames & set(self.pool._free):
            raise AssertionError(f"class {self.name!r} owns a free frame")
