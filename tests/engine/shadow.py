"""An executor whose KV is a fingerprint of everything that a row attends to.

Each slot holds a number computed from the row's token and from the numbers in *all* slots before it, read through
the page table. A wrong page, a stale slot, a lost copy or a premature reuse changes the number, hence the sampled
tokens; outputs equal those of a request alone only if every row saw exactly its own context.
"""

from __future__ import annotations

import numpy as np

from tokenloom.clock import VirtualClock
from tokenloom.engine.batch import PAGE_SIZE, StepResult, Ticket, TokenBatch, TopLogprobs
from tokenloom.errors import UnsupportedFeature

PRIME = (1 << 61) - 1


class ShadowExecutor:
    """Serves `num_slots` slots; each step takes 10 ms of virtual time."""

    def __init__(self, clock: VirtualClock, num_slots: int, vocab_size: int) -> None:
        self.clock = clock
        self.vocab_size = vocab_size
        self.kv = np.zeros(num_slots, np.int64)
        self.max_rows = 0

    def submit(self, batch: TokenBatch) -> Ticket:
        return Ticket(batch, self._run(batch))

    def _run(self, batch: TokenBatch) -> np.ndarray:
        self.max_rows = max(self.max_rows, batch.num_rows)
        for source, target in batch.page_copies.tolist():
            pages = self.kv.reshape(-1, PAGE_SIZE)
            pages[target] = pages[source]
        prints = np.zeros(batch.num_rows, np.int64)
        for segment in range(batch.num_segments):
            pages = batch.page_tables[segment].astype(np.int64)
            slots = (pages[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).ravel()
            for row in range(batch.starts[segment], batch.starts[segment + 1]):
                logical = int(batch.logical[row])
                path = slots.copy()
                parent = int(batch.parents[row])
                while parent >= 0:
                    if batch.slots[parent] >= 0:
                        path[batch.logical[parent]] = batch.slots[parent]
                    parent = int(batch.parents[parent])
                seen = self.kv[path[:logical]].astype(object)
                total = int((seen * (np.arange(logical) + 7).astype(object)).sum()) if logical else 0
                value = (total * 31 + int(batch.token_ids[row]) * 1_000_003 + logical) % PRIME
                if batch.slots[row] >= 0:
                    self.kv[batch.slots[row]] = value
                elif self.kv[slots[logical]] != value:
                    raise AssertionError("a row that stores nothing does not find its own KV")
                prints[row] = value
        return prints

    def collect(self, ticket: Ticket) -> StepResult:
        self.clock.advance(0.010)
        batch = ticket.batch
        prints = ticket.payload
        assert isinstance(prints, np.ndarray)
        rows = batch.logit_rows
        tokens = []
        for i in range(len(rows)):
            key = hash((int(prints[rows.rows[i]]), int(rows.seeds[i]), int(rows.sample_index[i])))
            tokens.append(int(rows.targets[i]) if rows.targets[i] >= 0 else key % self.vocab_size)
        top = {
            int(i): TopLogprobs(np.zeros(0, np.int32), np.zeros(0, np.float32), 1)
            for i in np.flatnonzero(rows.num_logprobs >= 0)
        }
        logprobs = np.array([int(prints[r]) % 9973 for r in rows.rows.tolist()], np.float32)
        hidden = np.stack([prints % 9973, prints % 9967], axis=1)[batch.hidden_rows].astype(np.float32)
        return StepResult(np.array(tokens, np.int32), logprobs, top, hidden=hidden)

    def logits(self, rows: np.ndarray) -> np.ndarray:
        raise UnsupportedFeature("logits", "fingerprints have none")

    def move_slots(self, moves: np.ndarray) -> None:
        for source, target in moves.tolist():
            self.kv[target] = self.kv[source]

    def close(self) -> None:
        """Nothing to release."""
