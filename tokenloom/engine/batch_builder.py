"""From a plan to the flat arrays of a token batch.

The sampling state and page table of a running sequence live in one row of a table, so that a step gathers
them with a few array operations and no loop over fields.
"""

from __future__ import annotations

import numpy as np

from tokenloom.engine.batch import PAGE_SIZE, Int32, LogitEdits, LogitRows, TokenBatch, Work
from tokenloom.engine.plan import LogitEntry, Plan, PooledRun
from tokenloom.engine.sampling_rules import logit_edits
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.token_tree import TokenTree

_MASK64 = (1 << 64) - 1
_NO_COPIES = np.zeros((0, 2), np.int32)


class SequenceTable:
    """One row per running sequence: page table and sampling parameters.

    `max_running` rows; `max_pages` page-table columns (the longest context).
    """

    def __init__(self, max_running: int, max_pages: int) -> None:
        self.pages = np.zeros((max_running, max_pages), np.int32)
        self.temperatures = np.zeros(max_running, np.float32)
        self.top_k = np.zeros(max_running, np.int32)
        self.top_p = np.ones(max_running, np.float32)
        self.min_p = np.zeros(max_running, np.float32)
        self.seeds = np.zeros(max_running, np.uint64)
        self.num_logprobs = np.full(max_running, -1, np.int32)
        self.adapter_slots = np.full(max_running, -1, np.int32)
        self._free = list(range(max_running - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def assign(self, seq: Sequence, adapter_slot: int) -> None:
        """Give `seq` a row and write its parameters there."""
        row = self._free.pop()
        self.adapter_slots[row] = adapter_slot
        params = seq.request.params
        seq.row = row
        self.pages[row] = 0
        self.pages[row, : len(seq.pages)] = seq.pages
        self.temperatures[row] = params.temperature
        self.top_k[row] = max(params.top_k, 0)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seeds[row] = (params.seed or 0) & _MASK64
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs

    def free(self, seq: Sequence) -> None:
        self._free.append(seq.row)
        seq.row = -1


def build_batch(plan: Plan, table: SequenceTable) -> TokenBatch:
    """Lay the plan's runs out as a token batch; fills `plan.entries` with one entry per logit row, and
    `plan.pooled` with the owners of the hidden rows."""
    token_ids: list[int] = []
    rows: list[int] = []
    starts = [0]
    contexts: list[int] = []
    work: list[int] = []
    unwritten: list[int] = []
    segment_trees: list[tuple[int, int, TokenTree]] = []
    entries = plan.entries
    entry_rows: list[int] = []
    entry_owners: list[int] = []
    hidden_rows: list[int] = []
    offset = 0
    for seq, start, end in plan.runs:
        tokens = seq.tokens
        rows.append(seq.row)
        contexts.append(start)
        if seq.num_stored > start:
            unwritten.extend(range(offset, offset + seq.num_stored - start))
        tree = plan.trees.get(seq)
        if tree is not None:
            token_ids += [tokens[start], *tree.tokens]
            work.append(Work.VERIFY)
            segment_trees.append((offset, start, tree))
        elif end - start == 1 and end > seq.num_prompt:
            token_ids.append(tokens[start])
            work.append(Work.DECODE)
        else:
            token_ids.extend(tokens[start:end])
            work.append(Work.PREFILL)
            if seq.prompt_logprobs is not None:
                for position in range(max(start, seq.num_scored), min(end, seq.num_prompt - 1)):
                    entries.append(LogitEntry(seq, tokens[position + 1]))
                    entry_rows.append(offset + position - start)
                    entry_owners.append(seq.row)
            pooled = range(max(start, seq.num_pooled), min(end, seq.num_prompt))
            if pooled:
                plan.pooled.append(PooledRun(seq, len(pooled)))
                hidden_rows.extend(offset + position - start for position in pooled)
        offset += end - start
        if end == len(tokens) and end < seq.max_length:
            for sampled in (seq, *seq.siblings):
                entries.append(LogitEntry(sampled, -1))
                entry_rows.append(offset - 1)
                entry_owners.append(seq.row)
        if tree is not None:
            entries.extend(LogitEntry(seq, -1, path) for path in tree.paths())
            entry_rows.extend(range(offset, offset + len(tree)))
            entry_owners.extend([seq.row] * len(tree))
            offset += len(tree)
        starts.append(offset)
    segment_starts = np.array(starts, np.int32)
    segment_rows = np.array(rows, np.intp)
    context_lens = np.array(contexts, np.int32)
    lengths = np.diff(segment_starts)
    positions = np.arange(offset, dtype=np.int32) + np.repeat(context_lens - segment_starts[:-1], lengths)
    owner = np.repeat(segment_rows, lengths)
    slots = table.pages[owner, positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE
    slots[unwritten] = -1
    num_pages = int((context_lens + lengths).max()) // PAGE_SIZE + 1 if rows else 1
    copies = plan.page_copies
    return TokenBatch(
        token_ids=np.array(token_ids, np.int32),
        parents=_tree_rows(segment_trees, positions),
        positions=positions,
        logical=positions,
        slots=slots,
        starts=segment_starts,
        context_lens=context_lens,
        page_tables=table.pages[segment_rows, :num_pages],
        adapter_slots=table.adapter_slots[segment_rows],
        work=np.array(work, np.int8),
        logit_rows=_logit_rows(entries, entry_rows, entry_owners, table),
        page_copies=np.array(copies, np.int32) if copies else _NO_COPIES,
        hidden_rows=np.array(hidden_rows, np.int32),
    )


def _tree_rows(trees: list[tuple[int, int, TokenTree]], positions: Int32) -> Int32:
    """The parent row of every row, int32[T]; sets the positions of nodes. `trees` are (row of the root, its
    position, tree)."""
    parents = np.full(len(positions), -1, np.int32)
    for first, start, tree in trees:
        nodes = slice(first + 1, first + 1 + len(tree))
        # Nodes lie in the slots behind the root's in their order; where they stand in the text is their depth.
        positions[nodes] = start + np.array(tree.depths(), np.int32)
        parents[nodes] = first + 1 + np.array(tree.parents, np.int32)
    return parents


def _logit_rows(
    entries: list[LogitEntry], entry_rows: list[int], entry_owners: list[int], table: SequenceTable
) -> LogitRows:
    owners = np.array(entry_owners, np.intp)
    targets = np.array([entry.target for entry in entries], np.int32)
    positions = np.array([len(seq.tokens) + len(path) for seq, _, path in entries], np.int64)
    sample_index = np.array([entry.seq.index for entry in entries], np.uint32)
    num_logprobs = table.num_logprobs[owners]
    edits: dict[int, LogitEdits] = {}
    for i, (seq, target, path) in enumerate(entries):
        if target >= 0:
            num_logprobs[i] = seq.request.params.prompt_logprobs or 0
        elif seq.needs_edits:
            edit = logit_edits(seq, path)
            if edit is not None:
                edits[i] = edit
    return LogitRows(
        rows=np.array(entry_rows, np.int32),
        targets=targets,
        temperatures=table.temperatures[owners],
        top_k=table.top_k[owners],
        top_p=table.top_p[owners],
        min_p=table.min_p[owners],
        seeds=table.seeds[owners],
        sample_index=sample_index,
        positions=positions,
        num_logprobs=num_logprobs,
        edits=edits,
    )
