"""The step loop: plan, submit, collect, commit."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from tokenloom.clock import Clock, MonotonicClock
from tokenloom.engine.adapter_pool import AdapterPool, AdapterSource, NoAdapters
from tokenloom.engine.batch import PAGE_SIZE, Executor, Work
from tokenloom.engine.batch_builder import SequenceTable, build_batch
from tokenloom.engine.frames import FramePool, PageClass
from tokenloom.engine.plan import Plan, StepRecord
from tokenloom.engine.policies.admission import AdmissionPolicy
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.pooling import check_pooling
from tokenloom.engine.prefix_cache import PrefixCache, root_digest
from tokenloom.engine.request import Request, SequenceDelta, StopCheckerFactory, no_stop_strings
from tokenloom.engine.scheduler import Scheduler
from tokenloom.engine.scheduler_check import check_scheduler
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.speculator import Speculator
from tokenloom.errors import ContextLengthExceeded, InvalidParameter, QueueFull


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What the engine is built for.

    `identity` goes into the root of every prefix chain (model hash, numerics id, formats). `max_context` is in
    tokens, `num_pages` is the size of the KV pool, cut as `pages_per_frame`. `debug` runs every invariant after
    each step. Adapters lie in the same frames, cut as `adapter_pages_per_frame` pages of
    `adapter_page_bytes`; `max_adapter_bytes` bounds them (0: the whole pool).
    """

    vocab_size: int
    max_context: int
    num_pages: int
    pages_per_frame: int = 1
    max_running: int = 128
    max_waiting: int = 1024
    eos_token_ids: tuple[int, ...] = ()
    identity: tuple[str, ...] = ()
    adapter_pages_per_frame: int = 1
    adapter_page_bytes: int = 1
    max_adapter_bytes: int = 0
    admission: AdmissionPolicy = "optimistic"
    prefix_cache: bool = True
    debug: bool = False


class Engine:
    """Serves requests on one executor. Not thread safe: one thread adds, cancels and steps."""

    def __init__(
        self,
        executor: Executor,
        limits: EngineLimits,
        *,
        budget: ChunkedPrefill | None = None,
        order: QueueOrder | None = None,
        clock: Clock | None = None,
        stop_checkers: StopCheckerFactory = no_stop_strings,
        adapters: AdapterSource | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self.executor = executor
        self.limits = limits
        self.clock = clock or MonotonicClock()
        self.stop_checkers = stop_checkers
        self.on_step = on_step
        budget = budget or ChunkedPrefill()
        self.max_context = min(limits.max_context, limits.num_pages * PAGE_SIZE)
        self.max_running = min(limits.max_running, budget.max_running)
        self.frames = FramePool(-(-limits.num_pages // limits.pages_per_frame))
        pages = PageClass("target_kv", self.frames, limits.pages_per_frame, limits.num_pages)
        table = SequenceTable(self.max_running, -(-self.max_context // PAGE_SIZE))
        most = limits.max_adapter_bytes // limits.adapter_page_bytes if limits.max_adapter_bytes else None
        self.adapters = AdapterPool(
            PageClass("adapters", self.frames, limits.adapter_pages_per_frame, most),
            adapters or NoAdapters(),
            page_bytes=limits.adapter_page_bytes,
        )
        self.scheduler = Scheduler(
            PrefixCache(pages, limits.prefix_cache, [self.adapters]),
            self.adapters,
            table,
            budget,
            order or QueueOrder(),
            limits.admission,
        )
        self.speculate(Speculator())
        self._eos = frozenset(limits.eos_token_ids)
        self._num_steps = 0
        self._fetched_seen = self._evicted_seen = 0
        self._queries_seen = self._hits_seen = self._preemptions_seen = 0

    def speculate(self, speculator: Speculator) -> None:
        """Have `speculator` give decoding sequences their trees from now on."""
        speculator.vocab_size = self.limits.vocab_size
        self.speculator = speculator
        self.scheduler.on_stop = speculator.forget

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.live)

    @property
    def has_room(self) -> bool:
        """Whether `add_request` would not raise `QueueFull`."""
        return len(self.scheduler.live) < self.max_running + self.limits.max_waiting

    def check_request(self, request: Request) -> None:
        """Raise the error that the client should see if this request can never be served."""
        params = request.params
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise InvalidParameter("prompt", [], "at least one token")
        context = self._context_beside(request.adapter)
        longest = context if params.max_tokens == 0 else context - 1
        if num_prompt > longest:
            raise ContextLengthExceeded(num_prompt, context)
        for token in request.prompt_token_ids:
            if not 0 <= token < self.limits.vocab_size:
                raise InvalidParameter("prompt", token, f"token ids from 0 to {self.limits.vocab_size - 1}")
        if params.n > self.max_running:
            raise InvalidParameter(
                "n", params.n, f"at most {self.max_running}, the sequences that run at once"
            )
        params.check_vocabulary(self.limits.vocab_size)
        self.speculator.check_request(request)
        if request.pooling is not None:
            check_pooling(request)

    def _context_beside(self, adapter: str) -> int:
        """Tokens that one sequence can have where the adapter lies in the pool too. Raises `InvalidParameter`."""
        frames = self.adapters.check(adapter)
        pages = self.scheduler.cache.pages
        room = min(pages.max_pages, (pages.pool.num_frames - frames) * pages.pages_per_frame)
        return min(self.max_context, room * PAGE_SIZE)

    def pin_adapter(self, adapter: str, on: bool) -> None:
        """Keep the adapter in the pool from its next use on, or no longer.

        Raises `InvalidParameter` for an unknown one, and where the pinned ones would not leave room for a sequence
        of full length, or for one that is live.
        """
        pool = self.adapters
        if not on or adapter in pool.pinned:
            pool.pin(adapter, on)
            return
        pool.check(adapter)
        pool.pin(adapter, on=True)
        try:
            fits = self._context_beside("") == self.max_context and all(
                seq.max_length <= self._context_beside(seq.request.adapter)
                for sequences in self.scheduler.live.values()
                for seq in sequences
            )
        except InvalidParameter:
            fits = False
        if not fits:
            pool.pin(adapter, on=False)
            raise InvalidParameter("adapter", adapter, "small enough to stay in memory beside all requests")

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises `QueueFull`, or `InvalidParameter` where it can never be served."""
        self.check_request(request)
        scheduler = self.scheduler
        if request.request_id in scheduler.live:
            raise InvalidParameter("request_id", request.request_id, "unique among live requests")
        if not self.has_room:
            raise QueueFull(self.limits.max_waiting, 1.0)
        params = request.params
        if params.seed is None:
            params = request.params = params.with_seed(secrets.randbits(64))
        if request.arrival < 0:
            request.arrival = self.clock.now()
        num_prompt = len(request.prompt_token_ids)
        max_length = self._context_beside(request.adapter)
        if params.max_tokens is not None:
            max_length = min(max_length, num_prompt + params.max_tokens)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        root = root_digest((*self.limits.identity, request.adapter, request.tenant, request.exactness))
        scheduler.add(
            [
                Sequence(
                    request,
                    index,
                    root=root,
                    max_length=max_length,
                    stop_ids=stop_ids,
                    checker=self.stop_checkers(request.prompt_token_ids, params) if params.stop else None,
                )
                for index in range(params.n)
            ]
        )

    def cancel(self, request_id: str) -> bool:
        """End a request and free all it holds; False if it is not live."""
        return self.scheduler.cancel(request_id)

    def reset(self) -> list[str]:
        """Cancel every request and forget every cached page (after a failed step, KV cannot be trusted).

        Returns the ids of the cancelled requests.
        """
        cancelled = list(self.scheduler.live)
        for request_id in cancelled:
            self.scheduler.cancel(request_id)
        self.scheduler.cache.clear()
        self.adapters.clear()
        return cancelled

    def step(self) -> list[SequenceDelta]:
        """Run one step; returns what each sequence got. Empty when nothing can run.

        When anything in it raises, every request is cancelled (see `reset`) and the error goes on.
        """
        try:
            return self._step()
        except BaseException:
            self.reset()
            raise

    def _step(self) -> list[SequenceDelta]:
        started = perf_counter()
        now = self._fetch_adapters()
        plan = self.scheduler.plan(now)
        if not plan.runs:
            return []
        planned = perf_counter()
        self.speculator.extend(plan, self.scheduler)
        proposed = perf_counter()
        batch = build_batch(plan, self.scheduler.table)
        if self.limits.debug:
            batch.check()
        built = perf_counter()
        result = self.executor.collect(self.executor.submit(batch))
        self.speculator.judge(plan, batch, result, self.executor)
        executed = perf_counter()
        self.adapters.fetch_slice.stepped(result.seconds)
        deltas = self.scheduler.commit(plan, result, self.clock.now())
        if self.scheduler.moves:
            self.executor.move_slots(np.array(self.scheduler.moves, np.int64))
        self.speculator.observe(plan, self.scheduler.accepted, result.seconds)
        if self.limits.debug:
            self.check()
        self._num_steps += 1
        if self.on_step is not None:
            seconds = {
                "plan": planned - started,
                "propose": proposed - planned,
                "build": built - proposed,
                "execute": executed - built,
                "commit": perf_counter() - executed,
            }
            self.on_step(self._record(plan, deltas, seconds, int((batch.work != Work.PREFILL).sum())))
        return deltas

    def _fetch_adapters(self) -> float:
        """Copy a slice of the adapters that are waited for; the time after that."""
        began = self.clock.now()
        copied = self.adapters.stats.bytes_copied
        self.scheduler.fetch_adapters(began)
        now = self.clock.now()
        self.adapters.fetch_slice.copied(self.adapters.stats.bytes_copied - copied, now - began)
        return now

    def _record(
        self, plan: Plan, deltas: list[SequenceDelta], seconds: dict[str, float], num_decodes: int
    ) -> StepRecord:
        scheduler = self.scheduler
        cache = scheduler.cache
        num_nodes = sum(len(tree) for tree in plan.trees.values())
        record = StepRecord(
            step=self._num_steps,
            time=plan.now,
            prefill_rows=plan.num_rows - num_decodes - num_nodes,
            decode_rows=num_decodes,
            verify_rows=num_nodes,
            num_accepted=sum(len(nodes) for nodes in scheduler.accepted.values()),
            speculation=self.speculator.report(),
            context_tokens=sum(run.end for run in plan.runs),
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(scheduler.parked),
            pages_used=len(cache.references),
            pages_idle=cache.num_idle,
            pages_total=cache.pages.max_pages,
            num_preemptions=scheduler.num_preemptions - self._preemptions_seen,
            num_finished=sum(delta.last for delta in deltas),
            prefix_queries=scheduler.prefix_queries - self._queries_seen,
            prefix_hits=scheduler.prefix_hits - self._hits_seen,
            seconds=seconds,
            adapters_resident=len(self.adapters.resident),
            adapter_bytes=self.adapters.pages.num_used * self.adapters.page_bytes,
            adapters_fetched=self.adapters.stats.num_fetched - self._fetched_seen,
            adapters_evicted=self.adapters.stats.num_evicted - self._evicted_seen,
        )
        self._fetched_seen = self.adapters.stats.num_fetched
        self._evicted_seen = self.adapters.stats.num_evicted
        self._preemptions_seen = scheduler.num_preemptions
        self._queries_seen = scheduler.prefix_queries
        self._hits_seen = scheduler.prefix_hits
        return record

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds between two steps."""
        check_scheduler(self.scheduler)

    def close(self) -> None:
        """Release the proposers and the executor."""
        self.speculator.close()
        self.executor.close()
