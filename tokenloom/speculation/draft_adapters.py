"""Adapters of a draft model: which goes with which adapter of the target, and which are in the pool.

A draft that was trained beside a base model guesses worse what an adapter makes of it; with a small adapter of its own
it follows. What it guesses never changes an output, so nobody waits for such an adapter: it is fetched, a slice in
each call, when a sequence would be drafted with it, lies in frames that the target may have back between two calls,
and where there is no room the draft goes on as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from tokenloom.engine.adapter_pool import AdapterPool
from tokenloom.engine.frames import PageClass
from tokenloom.engine.sequence import Sequence
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.kernels.adapter_image import image_dtype, page_bytes_for
from tokenloom.kernels.program import Program
from tokenloom.runtime.adapter_host import AdapterFile, AdapterFormat, AdapterHost
from tokenloom.speculation.draft_batch import DraftAdapter
from tokenloom.speculation.draft_model import DraftModel

_RETRY_CALLS: Final = 64
"""Calls after which room is looked for again: each change of adapter costs the draft its KV of a sequence."""

_WITHOUT: Final = DraftAdapter()


def draft_adapter_format(program: Program, dtype: str) -> AdapterFormat:
    """What adapters of a draft must be packed for, whose layers are those of `program`, computed in `dtype`."""
    return AdapterFormat(image_dtype(dtype), page_bytes_for(program, dtype))


class DraftAdapters:
    """The `adapter_of` of `draft`, the `Companions` of the target's adapters, and a `FrameLender`.

    Images have the format `form`. They take at most `max_bytes` (0: as much as they get) of the frames of the draft's
    own pool, and `free_frame` may make somebody else give a frame to it. An adapter that was asked for in this call or
    the one before is leased, so that those that come do not drive out those that are used.
    """

    def __init__(
        self,
        draft: DraftModel,
        form: AdapterFormat,
        *,
        max_bytes: int = 0,
        free_frame: Callable[[], bool],
        debug: bool = False,
    ) -> None:
        self.host = AdapterHost(draft.executor.backend, form)
        self._draft = draft
        self._free_frame = free_frame
        self._debug = debug
        self._frame_bytes = draft.executor.frames[2]
        per_frame = max(self._frame_bytes // form.page_bytes, 1)
        most = max_bytes // form.page_bytes if max_bytes else None
        pages = PageClass(f"{draft.name}_adapters", draft.cache.pages.pool, per_frame, most)
        self.pool = AdapterPool(pages, self.host, page_bytes=form.page_bytes)
        self._companions: dict[str, str] = {}
        """Content id of an adapter of the target → that of the draft's."""
        self._known: set[str] = set()
        self._asked: dict[str, int] = {}
        """Leased ones, and those that are being fetched → the call that asked for them last."""
        self._no_room: dict[str, int] = {}
        """Those there was no room for, or no longer → the call in which it was looked for, or lost."""
        self._call = -1
        self._left = 0

    # --- the protocol of companions ----------------------------------------------------------------------

    def know(self, file: AdapterFile) -> None:
        if self.host.format.page_bytes > self._frame_bytes:
            raise ModelError(
                f"an adapter of the draft model {self._draft.name} in pages of {self.host.format.page_bytes} bytes",
                f"at most {self._frame_bytes} bytes, a frame of its target",
            )
        is_new = self.host.add(file.content_id, Path(file.path))
        try:
            self.pool.check(file.content_id)
        except InvalidParameter as error:
            if is_new:
                self.host.forget(file.content_id)
            message = f"the adapter of the draft model {self._draft.name}: {error}"
            raise InvalidParameter(error.param, error.value, error.limit, message=message) from None
        self._known.add(file.content_id)

    def go_with(self, adapter: str, companion: str) -> None:
        before = self._companions.pop(adapter, "")
        if companion:
            self._companions[adapter] = companion
        if before and before != companion:
            self.forget_unused()

    def forget_unused(self) -> None:
        for content in self._known - set(self._companions.values()):
            self._known.remove(content)
            self._no_room.pop(content, None)
            self._let_go(content)
            self.pool.retire(content)

    # --- one call of the draft ---------------------------------------------------------------------------

    def __call__(self, seq: Sequence) -> DraftAdapter | None:
        """With what the draft computes `seq` in this call; None: its adapter is on the way, and what would be
        computed without it would be in vain."""
        if self._call != self._draft.stats.num_calls:
            self._begin()
        content = self._companions.get(seq.request.adapter)
        if content is None:
            return _WITHOUT
        if not self.pool.is_ready(content):
            if not self._fetch(content):
                return _WITHOUT
            if not self.pool.is_ready(content):
                return None
        if content not in self._asked:
            self.pool.lease(content, 0.0)
        self._asked[content] = self._call
        return DraftAdapter(content, self.pool.slot_of(content))

    def _begin(self) -> None:
        """Let go of what nobody asked for in the last call."""
        if self._debug:
            self.check()
        last = self._draft.stats.num_calls - 1
        for content in [content for content, call in self._asked.items() if call < last]:
            self._let_go(content)
        self._call = last + 1
        self._left = self.pool.slice_pages

    def _fetch(self, content: str) -> bool:
        """Copy what this call may still copy of an adapter; False if there is no room for it."""
        pool = self.pool
        if content not in pool.resident:
            looked = self._no_room.get(content)
            if looked is not None and self._call < looked + _RETRY_CALLS:
                return False
            if self._left <= 0:
                return True
            if not pool.reserve(content, self._free_frame, over_waiters=False):
                self._no_room[content] = self._call
                return False
            self._no_room.pop(content, None)
        self._asked[content] = self._call
        if self._left > 0:
            try:
                self._left -= pool.copy(content, self._left)
            except BaseException:
                self._let_go(content)
                raise
            if pool.is_ready(content):
                # The lease of one that is being fetched has ended with its last page.
                del self._asked[content]
        return True

    def _let_go(self, content: str) -> None:
        """Hold an adapter no longer; one that is half there goes."""
        if self._asked.pop(content, None) is not None:
            if self.pool.is_ready(content):
                self.pool.release(content)
            else:
                self.pool.abandon(content)

    # --- the protocol of frame lenders -------------------------------------------------------------------

    @property
    def num_cold_frames(self) -> int:
        """All of them between two calls; in a call those that it does not use."""
        return self.pool.num_cold_frames if self._draft.is_calling else len(self.pool.pages.frames)

    def evict_for_frame(self) -> bool:
        if self.pool.evict_for_frame():
            return True
        if self._draft.is_calling or not self._asked:
            return False
        before = self.pool.pages.pool.num_free
        for content in list(self._asked):
            self._let_go(content)
            self._no_room[content] = self._draft.stats.num_calls
        return self.pool.pages.pool.num_free > before or self.pool.evict_for_frame()

    # --- invariants --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError unless pages are conserved and leases are those of what was asked for."""
        resident = self.pool.resident
        if not set(resident) <= self._known or not self._asked.keys() <= resident.keys():
            raise AssertionError(f"draft adapters {sorted(resident)}, asked for {sorted(self._asked)}")
        if not set(self._companions.values()) <= self._known:
            raise AssertionError("an adapter goes with one of the draft that is not known")
        self.pool.check_books(content for content in self._asked if self.pool.is_ready(content))
