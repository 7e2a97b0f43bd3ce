"""What a draft model holds of a sequence, and from the jobs of a call to its arrays."""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tokenloom.engine.batch import PAGE_SIZE, Int32, LogitEdits, LogitRows, TokenBatch, Work
from tokenloom.engine.prefix_cache import Digest
from tokenloom.engine.sampling_rules import logit_edits
from tokenloom.engine.sequence import Sequence
from tokenloom.kernels.draft_work import DraftWork
from tokenloom.speculation.multi_step_sampling import draft_seed

_MASK64 = (1 << 64) - 1
_NO_COPIES = np.zeros((0, 2), np.int32)
_DECODE, _PREFILL = int(Work.DECODE), int(Work.PREFILL)


class DraftAdapter(NamedTuple):
    """What the draft computes a sequence with: the content id of an adapter of the draft model, and the slot where
    its executor has it now; "" and -1 for the draft as it is."""

    content: str = ""
    slot: int = -1


@dataclass(slots=True, eq=False)
class DraftState:
    """The draft's KV of one sequence: tokens[:computed] in `pages`."""

    adapter: DraftAdapter
    root: Digest
    chain: list[Digest] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    registered: int = 0
    call: int = -1
    is_lost: bool = False
    """The text has a token that the draft does not know."""


class Job(NamedTuple):
    """Tokens [start, end) of the sequence at `place` in this call, then `depth` levels of up to `width` nodes.
    `scratch` are `width` runs of pages, one after another. With `draws` the nodes are drawn, and their laws stated."""

    place: int
    seq: Sequence
    state: DraftState
    start: int
    end: int
    depth: int
    width: int
    scratch: list[int]
    draws: bool = False


def draft_work(jobs: Seq[Job], drafter: str, law_size: int) -> DraftWork:
    """One segment per job: the tokens that the draft's KV of its sequence lacks. Laws that are stated are those of
    `drafter`, over `law_size` tokens."""
    # Lists: most calls have a few rows, for which an array operation costs more than the rows.
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for job in jobs:
        pages, stored = job.state.pages, job.state.computed
        token_ids += job.seq.tokens[job.start : job.end]
        positions += range(job.start, job.end)
        slots += [
            pages[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE if place >= stored else -1
            for place in range(job.start, job.end)
        ]
        starts.append(len(token_ids))
    places = np.array(positions, np.int32)
    segments = np.array(starts, np.int32)
    batch = TokenBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=places,
        logical=places,
        slots=np.array(slots, np.int64),
        parents=np.full(len(positions), -1, np.int32),
        starts=segments,
        context_lens=np.array([job.start for job in jobs], np.int32),
        page_tables=_rows_of([job.state.pages for job in jobs]),
        adapter_slots=np.array([job.state.adapter.slot for job in jobs], np.int32),
        work=np.array([_DECODE if job.end - job.start == 1 else _PREFILL for job in jobs], np.int8),
        logit_rows=_logit_rows(jobs, segments[1:] - 1, zlib.crc32(drafter.encode())),
        page_copies=_NO_COPIES,
    )
    return DraftWork(
        batch,
        depths=np.array([job.depth for job in jobs], np.int32),
        widths=np.array([job.width for job in jobs], np.int32),
        scratch=_scratch_of(jobs),
        draws=frozenset(i for i, job in enumerate(jobs) if job.draws),
        law_size=law_size,
    )


def _rows_of(lists: Seq[Seq[int]]) -> Int32:
    """int32 [S, longest], 0 behind the end of a list."""
    rows = np.zeros((len(lists), max(1, *map(len, lists))), np.int32)
    for row, found in zip(rows, lists, strict=True):
        row[: len(found)] = found
    return rows


def _scratch_of(jobs: Seq[Job]) -> Int32:
    """int32 [S, W, P]."""
    each = [len(job.scratch) // job.width for job in jobs]
    scratch = np.zeros((len(jobs), max(job.width for job in jobs), max(each)), np.int32)
    for pages, job, count in zip(scratch, jobs, each, strict=True):
        if count:
            pages[: job.width, :count] = np.array(job.scratch, np.int32).reshape(job.width, count)
    return scratch


def _logit_rows(jobs: Seq[Job], rows: Int32, drafter: int) -> LogitRows:
    """The sampling state of each target's next token; seeds of their own for what is drawn."""
    params = [job.seq.request.params for job in jobs]
    edits: dict[int, LogitEdits] = {}
    for i, job in enumerate(jobs):
        if job.depth and job.seq.needs_edits:
            edit = logit_edits(job.seq)
            if edit is not None:
                edits[i] = edit
    return LogitRows(
        rows=rows,
        targets=np.full(len(jobs), -1, np.int32),
        temperatures=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([max(p.top_k, 0) for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        seeds=np.array([_seed(job, drafter) for job in jobs], np.uint64),
        sample_index=np.array([job.seq.index for job in jobs], np.uint32),
        positions=np.array([len(job.seq.tokens) for job in jobs], np.int64),
        num_logprobs=np.full(len(jobs), -1, np.int32),
        edits=edits,
    )


def _seed(job: Job, drafter: int) -> int:
    seq = job.seq
    seed = seq.request.params.seed or 0
    return draft_seed(seed, seq.index, len(seq.tokens), drafter) if job.draws else seed & _MASK64
