"""Continuous batching: who runs in the next step, on which pages, and what its result means.

There are no phases. A sequence has committed tokens and computed tokens; a step lets the computed ones catch up,
decodes (one pending token) first and prompt chunks in the rest of the budget, as in Sarathi-Serve (OSDI 2024).
When pages run out, the sequence that comes last in the queue order is preempted by recompute. The first in the
order is never preempted, so it finishes, and by induction everybody does.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenloom.engine.adapter_pool import AdapterPool
from tokenloom.engine.adapter_queue import AdapterQueue
from tokenloom.engine.batch import PAGE_SIZE, StepResult
from tokenloom.engine.batch_builder import SequenceTable
from tokenloom.engine.plan import LogitEntry, Plan, Run
from tokenloom.engine.policies.admission import AdmissionPolicy, Demand, peak_pages
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.prefix_cache import PrefixCache, extend_chain
from tokenloom.engine.request import RequestTimings, SequenceDelta, TokenLogprobs
from tokenloom.engine.sampling_rules import finish_if_done
from tokenloom.engine.sequence import Sequence, State
from tokenloom.engine.token_tree import ROOT, TokenTree
from tokenloom.engine.waiting import WaitingQueue


class Scheduler:
    """Plans steps and commits their results. The one owner of queues, rows and page references.

    `cache` owns the pages and `adapters` those of adapters, `table` the rows (its size bounds the running
    sequences); `budget`, `order` and `admission` are the policies. A sequence whose adapter is not in the pool is
    parked until it has been fetched.
    """

    def __init__(
        self,
        cache: PrefixCache,
        adapters: AdapterPool,
        table: SequenceTable,
        budget: ChunkedPrefill,
        order: QueueOrder,
        admission: AdmissionPolicy = "optimistic",
    ) -> None:
        self.cache = cache
        self.adapters = adapters
        self.admission = admission
        self.table = table
        self.budget = budget
        self.order = order
        self.waiting = WaitingQueue(order)
        self.parked = AdapterQueue(adapters, cache, order)
        self.running: dict[Sequence, None] = {}
        self.live: dict[str, list[Sequence]] = {}
        self.num_steps = 0
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.moves: list[tuple[int, int]] = []
        """Slots (source, destination) whose K and V the executor must move before anything else, in this order."""
        self.accepted: dict[Sequence, list[int]] = {}
        """Of the last step: the nodes of each tree that became tokens, in order of depth."""
        self.on_stop: Callable[[Sequence], None] = lambda seq: None
        """Told of each sequence that stops running."""
        self._copies: list[tuple[Sequence, int, int]] = []
        self.rows_promised = 0
        self._ended: list[str] = []
        """Adapters of requests that this commit ended."""

    # --- arrivals and departures -------------------------------------------------------------------------

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of one request: the first leads, the others fork from it after the prompt."""
        leader, *siblings = sequences
        leader.siblings = siblings
        self.live[leader.request.request_id] = sequences
        self.adapters.enter(leader.request.adapter)
        self._enqueue(leader)

    def cancel(self, request_id: str) -> bool:
        """Free everything of a request; False if it is not live."""
        sequences = self.live.pop(request_id, None)
        if sequences is None:
            return False
        for seq in sequences:
            if seq.state is not State.FINISHED:
                seq.finish_reason = "cancelled"
                self._retire(seq)
        self.adapters.leave(sequences[0].request.adapter)
        return True

    def _retire(self, seq: Sequence) -> None:
        if seq.state is State.RUNNING:
            self._stop_running(seq)
        elif seq in self.waiting:
            self._dequeue(seq)
        elif seq in self.parked:
            self.parked.remove(seq)
        seq.state = State.FINISHED

    def _enqueue(self, seq: Sequence) -> None:
        """Have `seq` wait for pages, or first for its adapter."""
        adapter = seq.request.adapter
        if self.adapters.is_ready(adapter):
            self.waiting.push(seq)
            self.adapters.wait(adapter, 1)
        else:
            self.parked.park(seq)

    def _dequeue(self, seq: Sequence) -> None:
        self.waiting.remove(seq)
        self.adapters.wait(seq.request.adapter, -1)

    def _start_running(self, seq: Sequence, now: float) -> None:
        self.adapters.lease(seq.request.adapter, now)
        self.table.assign(seq, self.adapters.slot_of(seq.request.adapter))
        seq.state = State.RUNNING
        self.running[seq] = None

    def _stop_running(self, seq: Sequence) -> None:
        """Give back the pages and the row of a running sequence."""
        del self.running[seq]
        self.on_stop(seq)
        self.rows_promised -= len(seq.siblings)
        self.table.free(seq)
        self.cache.release(seq.truncate(0))
        self.adapters.release(seq.request.adapter)

    def _preempt(self, seq: Sequence) -> None:
        self._stop_running(seq)
        seq.state = State.WAITING
        self._enqueue(seq)
        self.num_preemptions += 1

    def fetch_adapters(self, now: float) -> None:
        """Bring adapters that sequences wait for, as much as may be before a step."""
        self.parked.blocked = None
        if not len(self.parked):
            return
        promised = self._promised_pages()
        if self.admission == "reserve":
            promised = max(self._peak_pages() - len(self.cache.references), 0)
        for seq in self.parked.fetch(now, len(self.running), promised, self.waiting.head(now)):
            self._enqueue(seq)
        self._park_lost()

    def _park_lost(self) -> None:
        """Park who waited with an adapter that had to go."""
        for lost in self.adapters.preyed_on:
            for seq in [seq for seq in self.waiting if seq.request.adapter == lost]:
                self.waiting.remove(seq)
                self._enqueue(seq)
        self.adapters.preyed_on.clear()

    # --- planning ----------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """Choose the runs of the next step and give them pages."""
        plan = Plan(now)
        if len(self.waiting) and self.running:
            self._preempt_for_urgent(now)
        prefills = [seq for seq in self.running if len(seq.tokens) - seq.num_computed > 1]
        turns = self.budget.turns(
            self.num_steps, len(self.running) > len(prefills), bool(prefills or len(self.waiting))
        )
        self.num_steps += 1
        preemptions = self.num_preemptions
        if turns.decode:
            self._plan_decodes(plan)
        if turns.prefill:
            if len(prefills) > 1:
                prefills.sort(key=lambda seq: self.order.key(seq, now))
            for seq in prefills:
                if seq.state is State.RUNNING:
                    self._plan_chunk(plan, seq)
            if self.num_preemptions == preemptions:
                self._admit(plan, now)
        if not plan.runs and not turns.decode:
            self._plan_decodes(plan)
        if plan.runs:
            plan.page_copies = [(s, d) for seq, s, d in self._copies if seq.state is State.RUNNING]
            self._copies.clear()
        return plan

    def _plan_decodes(self, plan: Plan) -> None:
        runs = plan.runs
        for seq in list(self.running):
            start = seq.num_computed
            end = len(seq.tokens)
            if end - start != 1 or seq.row < 0:
                continue
            if end > len(seq.pages) * PAGE_SIZE and not self._grow(plan, seq, end, decodes_too=True):
                continue
            runs.append(Run(seq, start, end))
        plan.num_rows = len(runs)

    def _plan_chunk(self, plan: Plan, seq: Sequence) -> None:
        """Give a prompt as many rows as budget and pages allow."""
        for start, end in seq.pending_runs():
            rows = self.budget.chunk(end - start, self.budget.max_batch_tokens - plan.num_rows)
            if rows <= 0:
                return
            self._grow(plan, seq, start + rows, decodes_too=False)
            rows = min(rows, len(seq.pages) * PAGE_SIZE - start)
            if rows > 0:
                plan.runs.append(Run(seq, start, start + rows))
                plan.num_rows += rows
                # Who is planned after this may share these pages in the very same step: each layer stores
                # the K and V of all rows before it attends. Nobody planned here is dropped any more.
                self._register(seq, start + rows)

    def _grow(self, plan: Plan, seq: Sequence, length: int, *, decodes_too: bool) -> bool:
        """Give `seq` pages for `length` tokens, preempting who comes after it; False if it got too few.

        A prompt chunk takes pages from later prompts only: later decodes drain by themselves, and nobody is
        admitted meanwhile.
        """
        while seq.num_pages_missing(length) > 0:
            page = self.cache.allocate()
            if page is not None:
                self.table.pages[seq.row, len(seq.pages)] = page
                seq.pages.append(page)
                continue
            victims = [s for s in self.running if decodes_too or s.num_pending > 1]
            victim = max(victims, key=lambda s: self.order.key(s, plan.now), default=seq)
            if victim is seq and not decodes_too:
                return False
            self._preempt(victim)
            plan.drop(victim)
            if victim is seq:
                return False
        return True

    def _preempt_for_urgent(self, now: float) -> None:
        """Make room for a waiting sequence of a more urgent class, if all less urgent ones together have it."""
        head = self.waiting.head(now)
        if head is None:
            return
        urgent = self.order.priority_class(head, now)
        if urgent == 0 and self.order.policy == "fcfs":
            return
        less_urgent = [seq for seq in self.running if self.order.priority_class(seq, now) > urgent]
        rows = self.table.num_free + len(less_urgent)
        pages = self.cache.num_available + sum(
            self.cache.references[page] == 1 for seq in less_urgent for page in seq.pages
        )
        if rows < 1 + len(head.siblings) or pages < head.num_pages_missing(len(head.tokens)):
            return
        less_urgent.sort(key=lambda seq: self.order.key(seq, now))
        while less_urgent and not self._fits(head, self._promised_pages()):
            self._preempt(less_urgent.pop())

    def _promised_pages(self) -> int:
        """Pages that running prompts will still need."""
        return sum(
            max(seq.num_pages_missing(len(seq.tokens)), 0) for seq in self.running if seq.num_pending > 1
        )

    def _fits(self, seq: Sequence, promised_pages: int, *, with_peak: bool = True) -> bool:
        """Whether rows and pages for all tokens of a waiting `seq` are there, beside what is promised; under
        "reserve" and `with_peak` also those for its longest output."""
        if self.table.num_free - self.rows_promised < 1 + len(seq.siblings):
            return False
        hits = self._cached_pages(seq)
        needed = seq.num_pages_missing(len(seq.tokens)) - len(hits)
        available = self.cache.num_available - self.cache.num_idle_among(hits) - promised_pages
        reserving = with_peak and self.admission == "reserve"
        return needed <= available and (not reserving or self._peak_fits(seq))

    def _peak_fits(self, candidate: Sequence) -> bool:
        """Whether the longest outputs of all that run and of `candidate` fit beside the adapters that stay."""
        pages = self.cache.pages
        frames = pages.pool.num_frames - self.adapters.num_hot_frames
        return self._peak_pages(candidate) <= min(pages.max_pages, frames * pages.pages_per_frame)

    def _peak_pages(self, *more: Sequence) -> int:
        leaders = (*self.running, *more)
        everybody = (*leaders, *(sibling for seq in leaders for sibling in seq.siblings))
        return peak_pages(Demand(len(seq.tokens), seq.max_length - len(seq.tokens)) for seq in everybody)

    def _cached_pages(self, seq: Sequence) -> list[int]:
        """Resident pages of the longest known prefix. Prompt logprobs and means need every row computed: no
        hits then."""
        if not self.cache.enabled or seq.needs_all_rows:
            return []
        extend_chain(seq.chain, seq.root, seq.tokens, len(seq.tokens))
        return self.cache.find(seq.chain)

    def _admit(self, plan: Plan, now: float) -> None:
        """Admit from the head of the queue while rows, pages and budget last; never past who does not fit."""
        if not len(self.waiting):
            return
        promised = self._promised_pages()
        while plan.num_rows < self.budget.max_batch_tokens:
            seq = self.waiting.head(now)
            if seq is None:
                return
            if not self._fits(seq, promised):
                if self.running:
                    return
                # Nobody will give pages back but adapters of those behind.
                if self.adapters.evict_one(over_waiters=True, keep=seq.request.adapter):
                    self._park_lost()
                    continue
                # Samples of one request that never fit together preempt each other.
                if not self._fits(seq, promised, with_peak=False):
                    return
            blocked = self.parked.blocked
            if blocked is not None and self.order.key(seq, now) > self.order.key(blocked, now):
                return
            self._take_hits(seq)
            self._start_running(seq, now)
            self._dequeue(seq)
            self.rows_promised += len(seq.siblings)
            if seq.scheduled_time < 0:
                seq.scheduled_time = now
            self._plan_chunk(plan, seq)
            promised += max(seq.num_pages_missing(len(seq.tokens)), 0)

    def _take_hits(self, seq: Sequence) -> None:
        """Share the cached prefix. A full hit still computes its last row, for the logits, and stores nothing."""
        hits = self._cached_pages(seq)
        for page in hits:
            self.cache.acquire(page)
        seq.pages = hits
        seq.num_stored = len(hits) * PAGE_SIZE
        seq.num_registered = len(hits)
        seq.num_computed = min(seq.num_stored, len(seq.tokens) - 1)
        if seq.num_cached < 0:
            seq.num_cached = seq.num_computed
            self.prefix_queries += seq.num_prompt
            self.prefix_hits += seq.num_computed

    # --- committing --------------------------------------------------------------------------------------

    def commit(self, plan: Plan, result: StepResult, now: float) -> list[SequenceDelta]:
        """Append what was sampled, register full pages, end what is done; returns what to stream.

        `moves` are for the executor to do before the next step, and before any page is given to somebody else.
        """
        self.moves.clear()
        self.accepted.clear()
        for seq, _, end in plan.runs:
            seq.num_computed = end
            seq.num_stored = max(seq.num_stored, end)
            if end // PAGE_SIZE > seq.num_registered:
                self._register(seq, end)
        deltas: list[SequenceDelta] = []
        tokens = result.token_ids.tolist()
        for i, entry in enumerate(plan.entries):
            if entry.target >= 0:
                self._commit_score(entry, i, result)
            elif not entry.path:
                self._commit_tokens(entry.seq, plan.trees.get(entry.seq), tokens, i, result, now, deltas)
        first = 0
        for seq, num_rows in plan.pooled:
            seq.pool(result.hidden[first : first + num_rows])
            first += num_rows
        for run in plan.runs:
            if run.seq.max_length <= run.seq.num_prompt and run.end == len(run.seq.tokens):
                self._finish_unsampled(run.seq, now, deltas)
        for adapter in self._ended:
            self.adapters.leave(adapter)
        self._ended.clear()
        return deltas

    def _register(self, seq: Sequence, length: int) -> None:
        """Make the full pages of tokens[:length] findable."""
        if self.cache.enabled:
            full = length // PAGE_SIZE
            extend_chain(seq.chain, seq.root, seq.tokens, length)
            for index in range(seq.num_registered, full):
                self.cache.register(seq.pages[index], seq.chain[index])
            seq.num_registered = max(full, seq.num_registered)

    def _commit_score(self, entry: LogitEntry, i: int, result: StepResult) -> None:
        seq = entry.seq
        assert seq.prompt_logprobs is not None
        seq.prompt_logprobs.append(result.top[i].of(entry.target, float(result.logprobs[i])))
        seq.num_scored += 1

    def _commit_tokens(
        self,
        seq: Sequence,
        tree: TokenTree | None,
        tokens: list[int],
        i: int,
        result: StepResult,
        now: float,
        deltas: list[SequenceDelta],
    ) -> None:
        """Commit the token of logit row i, and those of the nodes of `tree` (rows i + 1 + node) that it leads to.

        Each row has sampled the token that follows its own path, as plain decoding would have; it counts if the
        path is what was committed before it.
        """
        if seq.siblings:
            self._fork(seq, now)
        first = seq.num_prompt == len(seq.tokens)
        if first:
            seq.first_token_time = now
        taken: list[int] = []
        logprobs: list[TokenLogprobs] = []
        nodes: list[int] = []
        children = tree.children() if tree is not None else {}
        node: int | None = ROOT
        done = False
        while node is not None and not done:
            row = i + 1 + node
            token = tokens[row]
            seq.append(token)
            taken.append(token)
            done = finish_if_done(seq, token)
            if seq.wants_logprobs:
                logprobs.append(result.top[row].of(token, float(result.logprobs[row])))
            node = children.get((node, token))
            if node is not None and not done:
                nodes.append(node)
        if tree is not None:
            self._settle(seq, tree, nodes)
        deltas.append(self._delta(seq, taken, logprobs, first, done, now))
        if done:
            self._retire(seq)
        elif not seq.pages and seq.state is State.RUNNING:
            self._preempt(seq)

    def _settle(self, seq: Sequence, tree: TokenTree, nodes: list[int]) -> None:
        """Keep the KV of the committed `nodes` of a tree where their tokens belong, and give the rest back."""
        start = seq.num_computed
        for place, node in enumerate(nodes, start):
            if node + start != place:
                self.moves.append((seq.slot(start + node), seq.slot(place)))
        seq.num_drafted += len(tree)
        seq.num_accepted += len(nodes)
        seq.num_computed = seq.num_stored = start + len(nodes)
        if seq.num_computed // PAGE_SIZE > seq.num_registered:
            self._register(seq, seq.num_computed)
        self.cache.release(seq.truncate(seq.num_computed))
        self.accepted[seq] = nodes

    def _finish_unsampled(self, seq: Sequence, now: float, deltas: list[SequenceDelta]) -> None:
        """End a request of `max_tokens` 0 once its prompt is computed. For an embedding that is all there is."""
        siblings, seq.siblings = seq.siblings, []
        self.rows_promised -= len(siblings)
        for ended in (seq, *siblings):
            ended.finish_reason = "length" if ended.request.pooling is None else "stop"
            deltas.append(self._delta(ended, [], [], True, True, now))
            self._retire(ended)

    def _delta(
        self,
        seq: Sequence,
        tokens: list[int],
        logprobs: list[TokenLogprobs],
        first: bool,
        done: bool,
        now: float,
    ) -> SequenceDelta:
        request = seq.request
        last = False
        timings = None
        if done:
            last = all(s.finish_reason is not None for s in self.live[request.request_id])
            if last:
                del self.live[request.request_id]
                self._ended.append(request.adapter)
            timings = RequestTimings(request.arrival, seq.scheduled_time, seq.first_token_time, now)
        return SequenceDelta(
            request.request_id,
            seq.index,
            tokens,
            logprobs,
            seq.finish_reason,
            seq.stop,
            seq.prompt_logprobs if first and seq.index == 0 else None,
            max(seq.num_cached, 0),
            last,
            timings,
            seq.embedding() if done else None,
            seq.num_drafted,
            seq.num_accepted,
        )

    def _fork(self, leader: Sequence, now: float) -> None:
        """Start the other samples of a request on the leader's prompt pages, without copying full ones."""
        siblings, leader.siblings = leader.siblings, []
        self.rows_promised -= len(siblings)
        for seq in siblings:
            for page in leader.fork(seq):
                self.cache.acquire(page)
            if leader.num_computed % PAGE_SIZE:
                own_page = self.cache.allocate()
                if own_page is None:
                    # No room for its own copy of the last page: it waits and recomputes, like a preempted one.
                    self.cache.release(seq.truncate(0))
                else:
                    self._copies.append((seq, leader.pages[len(seq.pages)], own_page))
                    seq.pages.append(own_page)
            self._start_running(seq, now)
