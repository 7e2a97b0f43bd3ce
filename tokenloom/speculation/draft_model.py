"""A small model that proposes how the sequences of a large one go on (Leviathan et al. 2023; trees as in SpecInfer,
Miao et al. 2024).

The draft's KV of a sequence only ever holds committed tokens: what a step speculates lies in scratch pages that are
gone when it is over, so a rejection needs no rollback. Everything here is a cache that may go at any time; the
draft catches up with ordinary rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final

from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.engine.frames import PageClass
from tokenloom.engine.prefix_cache import PrefixCache, extend_chain, root_digest
from tokenloom.engine.proposer import Proposal, Wanted
from tokenloom.engine.sequence import Sequence
from tokenloom.kernels.draft_work import MAX_CANDIDATES, scratch_pages
from tokenloom.runtime.local import LocalExecutor
from tokenloom.speculation.draft_batch import DraftAdapter, DraftState, Job, draft_work
from tokenloom.speculation.draft_loop import draft

log = logging.getLogger(__name__)

MAX_FAILURES: Final = 3
"""Failed calls in a row after which a draft model is not asked again."""


def no_adapter(seq: Sequence) -> DraftAdapter | None:
    """The draft as it is, whatever adapter the target has."""
    return DraftAdapter()


def no_frame() -> bool:
    """Nobody gives a frame."""
    return False


@dataclass(slots=True)
class DraftStats:
    """Counts since the start. `num_rows` are committed tokens that the draft computed, `num_shared` those found in
    pages of others, `num_short` proposals that a lack of pages prevented or cut, `num_dropped` sequences whose KV had
    to go, `seconds` the time of all calls."""

    num_calls: int = 0
    num_rows: int = 0
    num_shared: int = 0
    num_nodes: int = 0
    num_short: int = 0
    num_dropped: int = 0
    num_failures: int = 0
    seconds: float = 0.0


class DraftModel:
    """A `Proposer`, and the `FrameLender` of its frames: the target may have every one of them back between two
    calls, and nobody is ever preempted for a draft.

    `executor` computes the draft, whose KV pages are those of `pages`. `identity` names everything that its K and V
    depend on (model, numerics). `vocab_size` bounds the tokens that the draft knows, `target_vocab_size` those that
    may be proposed. At most `max_rows` committed tokens are computed per call; sequences that lack more get no
    proposal until they have caught up. `adapter_of` says with which adapter of the draft a sequence is computed (None:
    not in this call), and `free_frame` may make somebody else give a frame to the pool (returns whether one did).
    """

    def __init__(
        self,
        executor: LocalExecutor,
        pages: PageClass,
        *,
        name: str = "draft",
        identity: Seq[str],
        vocab_size: int,
        target_vocab_size: int,
        max_context: int,
        max_rows: int = 512,
        adapter_of: Callable[[Sequence], DraftAdapter | None] = no_adapter,
        free_frame: Callable[[], bool] = no_frame,
        prefix_cache: bool = True,
        debug: bool = False,
    ) -> None:
        self.name = name
        self.cache = PrefixCache(pages, prefix_cache)
        self.stats = DraftStats()
        self.max_context = max_context
        self.max_rows = max_rows
        self.adapter_of = adapter_of
        self.free_frame = free_frame
        self._executor = executor
        self._identity = tuple(identity)
        self._vocab_size = vocab_size
        self._target_vocab_size = target_vocab_size
        self._debug = debug
        self._states: dict[Sequence, DraftState] = {}
        """In the order of their last proposal, the latest at the end."""
        self._scratch: list[int] = []
        """Pages of trees, kept for the next call, which needs about as many."""
        self._num_scratch = 0
        """How many of them this call has given out."""
        self._is_calling = False
        self._failures = 0

    # --- the protocol of proposers -----------------------------------------------------------------------

    @property
    def is_off(self) -> bool:
        """Whether the draft failed so often that it is not asked any more."""
        return self._failures >= MAX_FAILURES

    @property
    def is_calling(self) -> bool:
        """Whether a call goes on."""
        return self._is_calling

    @property
    def executor(self) -> LocalExecutor:
        """What computes the draft."""
        return self._executor

    def propose(self, wanted: Seq[Wanted]) -> list[Proposal]:
        """Never raises: an error of the draft costs its state, and the proposals of this call."""
        proposals = [Proposal() for _ in wanted]
        if self.is_off or not wanted:
            return proposals
        begun = time.perf_counter()
        self.stats.num_calls += 1
        self._is_calling = True
        try:
            self._propose(wanted, proposals)
            self._failures = 0
        except Exception as error:
            self._fail(error)
            proposals = [Proposal() for _ in wanted]
        finally:
            self._is_calling = False
            self._keep_scratch(self._num_scratch)
            self._num_scratch = 0
        if self._debug:
            self.check()
        self.stats.seconds += time.perf_counter() - begun
        return proposals

    def forget(self, seq: Sequence) -> None:
        state = self._states.pop(seq, None)
        if state is not None:
            self.cache.release(state.pages)
        if not self._states:
            self._keep_scratch(0)

    def close(self) -> None:
        self._clear()
        self._executor.close()

    # --- the protocol of frame lenders -------------------------------------------------------------------

    @property
    def num_cold_frames(self) -> int:
        """All of them between two calls, when nothing is in use; none while a call looks for frames itself."""
        return 0 if self._is_calling else len(self.cache.pages.frames)

    def evict_for_frame(self) -> bool:
        """Give a frame back: of idle pages, then of trees that are gone, then of whom a proposal was asked for least
        recently."""
        if self._is_calling:
            return False
        if self.cache.free_frame():
            return True
        pool = self.cache.pages.pool
        before = pool.num_free
        self._keep_scratch(0)
        if pool.num_free > before or self.cache.free_frame():
            return True
        while self._states:
            self._drop(next(iter(self._states)))
            if pool.num_free > before or self.cache.free_frame():
                return True
        return False

    # --- one call ----------------------------------------------------------------------------------------

    def _propose(self, wanted: Seq[Wanted], proposals: list[Proposal]) -> None:
        jobs = self._plan(wanted)
        if not jobs:
            return
        work = draft_work(jobs, self.name, self._target_vocab_size)
        if self._debug:
            work.batch.check()
            work.check()
        found = draft(self._executor.backend, work)
        for job, proposal in zip(jobs, found, strict=True):
            job.state.computed = max(job.end, job.state.computed)
            self.stats.num_rows += job.end - job.start
            if job.depth:
                if not job.draws:
                    proposal = self._cut(proposal, wanted[job.place].max_nodes)
                self.stats.num_nodes += len(proposal.tokens)
                proposals[job.place] = proposal

    def _plan(self, wanted: Seq[Wanted]) -> list[Job]:
        """Whose rows are computed, with pages for them. Who lacks least comes first, so that those who decode do not
        wait for a long prompt."""
        call = self.stats.num_calls
        states = [self._state(request.seq, call) for request in wanted]
        missing = [
            0 if state is None else len(request.seq.tokens) - state.computed
            for request, state in zip(wanted, states, strict=True)
        ]
        rows = self.max_rows
        jobs: list[Job] = []
        for index in sorted(range(len(wanted)), key=missing.__getitem__):
            state = states[index]
            if state is None or state.is_lost or not rows:
                continue
            job = self._job(index, wanted[index], state, rows)
            if job is not None:
                jobs.append(job)
                rows -= job.end - job.start
        return jobs

    def _state(self, seq: Sequence, call: int) -> DraftState | None:
        """The state of a sequence, now the latest; None where the draft cannot follow it, and nothing is kept, or
        waits for its adapter."""
        if len(seq.tokens) > self.max_context:
            self.forget(seq)
            return None
        adapter = self.adapter_of(seq)
        if adapter is None:
            return None
        state = self._states.pop(seq, None)
        if state is not None and state.adapter.content != adapter.content:
            self.cache.release(state.pages)
            state = None
        if state is None:
            state = DraftState(adapter, root_digest((*self._identity, adapter.content, seq.request.tenant)))
        state.adapter = adapter
        state.call = call
        self._states[seq] = state
        return state

    def _job(self, place: int, request: Wanted, state: DraftState, rows: int) -> Job | None:
        """Give `state` pages for as many of its missing tokens as `rows` and pages allow, and for a tree if that is
        all of them."""
        seq = request.seq
        tokens = seq.tokens
        if len(tokens) - state.computed > PAGE_SIZE:
            self._share(state, tokens)
        # The root is computed again where its KV is there already: its logits are what is wanted.
        start = min(state.computed, len(tokens) - 1)
        end = self._grow(state, min(len(tokens), start + rows))
        if end <= start:
            self.stats.num_short += 1
            return None
        if self._vocab_size < self._target_vocab_size and max(tokens[start:end]) >= self._vocab_size:
            self._lose(state)
            return None
        self._register(state, tokens, end)
        depth = width = 0
        scratch: list[int] = []
        if end == len(tokens):
            depth, width, scratch = self._shape(request)
        draws = request.draws and depth > 0
        return Job(place, seq, state, start, end, depth, max(width, 1), scratch, draws)

    def _shape(self, request: Wanted) -> tuple[int, int, list[int]]:
        """Levels, nodes of a level, and scratch pages of a tree: a chain where there are not enough for beams, one
        level where there are none."""
        length = len(request.seq.tokens)
        most = min(request.width, request.max_nodes, MAX_CANDIDATES)
        for width in dict.fromkeys((most, 1)):
            # Rows of nodes stand behind the root, at positions that the draft has.
            levels = request.max_nodes // width if request.draws else request.max_nodes
            depth = min(request.max_depth, levels, self.max_context - length + 1)
            scratch = self._take(width * scratch_pages(length, depth))
            if scratch is not None:
                self.stats.num_short += width < most
                return depth, width, scratch
        self.stats.num_short += 1
        return 1, most, []

    def _cut(self, proposal: Proposal, most: int) -> Proposal:
        """The `most` most probable nodes; a node never comes before its parent, which is at least as probable."""
        limit = self._target_vocab_size
        if len(proposal.tokens) <= most and max(proposal.tokens, default=-1) < limit:
            return proposal
        reaches: list[float] = []
        for token, parent, confidence in zip(
            proposal.tokens, proposal.parents, proposal.confidences, strict=True
        ):
            reach = confidence if parent < 0 else reaches[parent] * confidence
            # Below a token that the target does not have nothing can be right.
            reaches.append(reach if token < limit and (parent < 0 or reaches[parent] >= 0) else -1.0)
        likely = sorted(range(len(reaches)), key=lambda node: -reaches[node])[:most]
        kept = sorted(node for node in likely if reaches[node] >= 0)
        number = {-1: -1} | {node: i for i, node in enumerate(kept)}
        return Proposal(
            [proposal.tokens[node] for node in kept],
            [number[proposal.parents[node]] for node in kept],
            [proposal.ranks[node] for node in kept],
            [proposal.confidences[node] for node in kept],
        )

    # --- pages -------------------------------------------------------------------------------------------

    def _share(self, state: DraftState, tokens: Seq[int]) -> None:
        """Take the pages of others with the same prefix, where they reach further."""
        if not self.cache.enabled:
            return
        found: list[int] = []
        while len(found) < len(tokens) // PAGE_SIZE:
            # Page by page: digests of a long text that nobody else has are not worth their time now.
            extend_chain(state.chain, state.root, tokens, (len(found) + 1) * PAGE_SIZE)
            page = self.cache.find(state.chain[len(found) : len(found) + 1])
            if not page:
                break
            found += page
        shared = len(found) * PAGE_SIZE
        if shared <= state.computed:
            return
        for page_id in found:
            self.cache.acquire(page_id)
        self.cache.release(state.pages)
        self.stats.num_shared += shared - state.computed
        state.pages = found
        state.computed = shared
        state.registered = len(found)

    def _grow(self, state: DraftState, length: int) -> int:
        """Give `state` pages for `length` tokens; how many have room."""
        while len(state.pages) * PAGE_SIZE < length:
            page = self._page()
            if page is None:
                return len(state.pages) * PAGE_SIZE
            state.pages.append(page)
        return length

    def _register(self, state: DraftState, tokens: Seq[int], length: int) -> None:
        """Make full pages findable, those of this call too: each layer stores the K and V of all rows of a batch
        before it attends."""
        full = length // PAGE_SIZE
        if self.cache.enabled and full > state.registered:
            extend_chain(state.chain, state.root, tokens, length)
            for index in range(state.registered, full):
                self.cache.register(state.pages[index], state.chain[index])
            state.registered = full

    def _take(self, count: int) -> list[int] | None:
        """`count` pages until this call is over, or None where there are not so many."""
        begin = self._num_scratch
        while len(self._scratch) < begin + count:
            page = self._new_page()
            if page is None:
                return None
            self._scratch.append(page)
        self._num_scratch += count
        return self._scratch[begin : begin + count]

    def _keep_scratch(self, count: int) -> None:
        self.cache.release(self._scratch[count:])
        del self._scratch[count:]

    def _page(self) -> int | None:
        """A page for KV: a new one, else one that no tree needs."""
        page = self._new_page()
        if page is None and len(self._scratch) > self._num_scratch:
            page = self._scratch.pop()
        return page

    def _new_page(self) -> int | None:
        """A page: a free or an idle one, else of a frame that somebody gives, else of whom a proposal was asked for
        least recently, but not in this call."""
        page = self.cache.allocate()
        if page is None and self.cache.pages.num_used < self.cache.pages.max_pages and self.free_frame():
            page = self.cache.allocate()
        while page is None:
            seq, state = next(iter(self._states.items()), (None, None))
            if seq is None or state is None or state.call == self.stats.num_calls:
                return None
            self._drop(seq)
            page = self.cache.allocate()
        return page

    def _lose(self, state: DraftState) -> None:
        """Give up on a sequence for as long as it runs."""
        self.cache.release(state.pages)
        state.pages = []
        state.computed = state.registered = 0
        state.is_lost = True

    def _drop(self, seq: Sequence) -> None:
        self.forget(seq)
        self.stats.num_dropped += 1

    def _clear(self) -> None:
        for seq in list(self._states):
            self.forget(seq)
        self._keep_scratch(0)
        self.cache.clear()

    def _fail(self, error: Exception) -> None:
        """What an error leaves in the pages is not known, so nothing of it stays."""
        self._clear()
        self._failures += 1
        self.stats.num_failures += 1
        if self.stats.num_failures == 1:
            log.error("the draft model %s failed; requests go on without it", self.name, exc_info=error)
        if self.is_off:
            log.error("the draft model %s failed %d times in a row and is off", self.name, self._failures)

    # --- invariants --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError unless pages are conserved, and the KV of each sequence lies in them."""
        self.cache.check((self._scratch, *(state.pages for state in self._states.values())))
        for seq, state in self._states.items():
            if not 0 <= state.computed <= min(len(state.pages) * PAGE_SIZE, len(seq.tokens)):
                raise AssertionError(
                    f"{state.computed} of {len(seq.tokens)} tokens in {len(state.pages)} draft pages"
                )
            if state.registered > len(state.pages):
                raise AssertionError(f"{state.registered} of {len(state.pages)} draft pages are registered")
