"""Steps of made-up tokens for measuring. They take the pages from 0 on, whatever these hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tokenloom.engine.batch import PAGE_SIZE, LogitRows, TokenBatch, Work
from tokenloom.models.memory_plan import pages_of


def uniform_batch(sequences: int, rows: int, context: int, vocab_size: int) -> TokenBatch:
    """Each of `sequences` sequences has `rows` rows behind `context` tokens, stores them, and draws one
    greedy token. Each has as many pages of its own as it fills."""
    pages = pages_of(context + rows)
    positions = np.tile(np.arange(context, context + rows, dtype=np.int32), sequences)
    tables = np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages)
    owner = np.repeat(np.arange(sequences), rows)
    slots = tables[owner, positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE
    return TokenBatch(
        token_ids=np.arange(len(positions), dtype=np.int32) % vocab_size,
        positions=positions,
        logical=positions,
        slots=slots,
        parents=np.full(len(positions), -1, np.int32),
        starts=np.arange(0, len(positions) + 1, rows, dtype=np.int32),
        context_lens=np.full(sequences, context, np.int32),
        page_tables=tables,
        adapter_slots=np.full(sequences, -1, np.int32),
        work=np.full(sequences, Work.DECODE if rows == 1 else Work.PREFILL, np.int8),
        logit_rows=LogitRows(
            rows=np.arange(rows - 1, len(positions), rows, dtype=np.int32),
            targets=np.full(sequences, -1, np.int32),
            temperatures=np.zeros(sequences, np.float32),
            top_k=np.zeros(sequences, np.int32),
            top_p=np.ones(sequences, np.float32),
            min_p=np.zeros(sequences, np.float32),
            seeds=np.zeros(sequences, np.uint64),
            sample_index=np.zeros(sequences, np.uint32),
            positions=np.full(sequences, context + rows, np.int64),
            num_logprobs=np.full(sequences, -1, np.int32),
        ),
        page_copies=np.zeros((0, 2), np.int32),
    )


def page_writers(num_pages: int, vocab_size: int) -> Iterator[TokenBatch]:
    """Steps that write to all the memory of the first `num_pages` pages.

    Memory that never was written is one page of zeros, which the caches hold: reading it costs nothing. The
    first page is filled with keys and values, and copied to the others.
    """
    # All at position 0, which a model of the shortest context has as well.
    batch = replace(uniform_batch(1, PAGE_SIZE, 0, vocab_size), positions=np.zeros(PAGE_SIZE, np.int32))
    yield batch
    others = np.arange(1, num_pages, dtype=np.int32)
    yield replace(batch, page_copies=np.stack([np.zeros_like(others), others], axis=1))
