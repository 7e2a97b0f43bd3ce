"""A backend whose K and V are digests: each slot holds the digest of the whole text up to its token, so that a row
that reads a wrong, stale or foreign slot anywhere gives other logits."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE, StepResult, TokenBatch

VOCAB = 48


def digest(before: int, token: int, position: int, adapter: int) -> int:
    return zlib.crc32(np.array([before, token, position, adapter], np.int64).tobytes())


def logits_of(state: int) -> NDArray[np.float32]:
    return np.random.default_rng(state).normal(scale=2.0, size=VOCAB).astype(np.float32)


def text_logits(tokens: Sequence[int], adapter: int = -1) -> NDArray[np.float32]:
    """Logits after a text."""
    state = 0
    for position, token in enumerate(tokens):
        state = digest(state, token, position, adapter)
    return logits_of(state)


class ShadowBackend:
    """`Backend`, as far as drafts need it."""

    numerics_id = "shadow"

    def __init__(self, num_pages: int) -> None:
        self.slots = np.zeros(num_pages * PAGE_SIZE, np.int64)
        self.num_rows: list[int] = []
        self._rows: list[int] = []

    def run(self, batch: TokenBatch) -> StepResult:
        batch.check()
        self.num_rows.append(batch.num_rows)
        self._rows = []
        pages = self.slots.reshape(-1, PAGE_SIZE)
        sources = pages[batch.page_copies[:, 0]].copy()
        pages[batch.page_copies[:, 1]] = sources
        for segment in range(batch.num_segments):
            table = batch.page_tables[segment]
            for row in range(batch.starts[segment], batch.starts[segment + 1]):
                place = int(batch.logical[row])
                before = int(pages[table[(place - 1) // PAGE_SIZE], (place - 1) % PAGE_SIZE]) if place else 0
                token, slot = int(batch.token_ids[row]), int(batch.slots[row])
                state = digest(before, token, int(batch.positions[row]), int(batch.adapter_slots[segment]))
                if slot >= 0:
                    self.slots[slot] = state
                else:
                    assert pages[table[place // PAGE_SIZE], place % PAGE_SIZE] == state
                self._rows.append(state)
        count = len(batch.logit_rows)
        return StepResult(np.zeros(count, np.int32), np.zeros(count, np.float32), {})

    def logits(self, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        assert len(rows) <= 64
        return np.stack([logits_of(self._rows[row]) for row in rows.tolist()])


class ShadowExecutor:
    """`LocalExecutor`, likewise."""

    def __init__(self, num_pages: int) -> None:
        self.backend = ShadowBackend(num_pages)
        self.closed = False

    def close(self) -> None:
        self.closed = True
