"""An executor that predicts the time of a step and moves a virtual clock, under the real scheduler.

The cost model is piecewise linear in rows and linear in attended context, after Vidur (MLSys 2024): the same
scheduler object runs in production and in simulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokenloom.clock import VirtualClock
from tokenloom.engine.batch import StepResult, Ticket, TokenBatch, TopLogprobs
from tokenloom.errors import UnsupportedFeature

HIDDEN_WIDTH = 8


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of one step: max(memory_bound, rows * per_row) + per_key * (keys attended) + fixed.

    `memory_bound` is the time to read the weights once; below the knee memory_bound / per_row more rows are
    free. Rows are rounded up to `tile`, as a matrix kernel does.
    """

    memory_bound: float = 0.020
    per_row: float = 0.0001
    per_key: float = 1e-8
    fixed: float = 0.0005
    tile: int = 1

    def seconds(self, rows: int, keys: int) -> float:
        """Time of a step with `rows` rows that attend to `keys` keys in all."""
        padded = -(-rows // self.tile) * self.tile
        return max(self.memory_bound, padded * self.per_row) + keys * self.per_key + self.fixed


class SimulatedExecutor:
    """Draws tokens by hashing (seed, sample, position), so that outputs do not depend on the schedule.

    `vocab_size` bounds the tokens; `choose` may replace the hash (tests, traces). A hidden row is a hash of its
    token and position, `HIDDEN_WIDTH` numbers between -1 and 1.
    """

    def __init__(
        self,
        clock: VirtualClock,
        cost: CostModel | None = None,
        vocab_size: int = 32000,
        choose: Callable[[TokenBatch], np.ndarray] | None = None,
    ) -> None:
        self.clock = clock
        self.cost = cost or CostModel()
        self.vocab_size = vocab_size
        self.choose = choose or self._hash

    def _hash(self, batch: TokenBatch) -> np.ndarray:
        rows = batch.logit_rows
        with np.errstate(over="ignore"):
            mixed = rows.seeds * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= rows.positions.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
            mixed ^= rows.sample_index.astype(np.uint64) * np.uint64(0x165667B19E3779F9)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(32)
        return (mixed % np.uint64(self.vocab_size)).astype(np.int32)

    def submit(self, batch: TokenBatch) -> Ticket:
        return Ticket(batch)

    def collect(self, ticket: Ticket) -> StepResult:
        batch = ticket.batch
        seconds = self.cost.seconds(batch.num_rows, int(batch.logical.sum()) + batch.num_rows)
        self.clock.advance(seconds)
        rows = batch.logit_rows
        tokens = np.where(rows.targets >= 0, rows.targets, self.choose(batch)).astype(np.int32)
        logprobs = np.full(len(rows), -1.0, np.float32)
        top = {
            int(i): TopLogprobs(np.zeros(0, np.int32), np.zeros(0, np.float32), 1)
            for i in np.flatnonzero(rows.num_logprobs >= 0)
        }
        return StepResult(tokens, logprobs, top, seconds, _hidden(batch))

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Raises `UnsupportedFeature`."""
        raise UnsupportedFeature("logits", "the simulated executor computes none")

    def move_slots(self, moves: np.ndarray) -> None:
        """Nothing: there is no KV."""

    def close(self) -> None:
        """Nothing to release."""


def _hidden(batch: TokenBatch) -> np.ndarray:
    chosen = batch.hidden_rows
    keys = batch.token_ids[chosen].astype(np.int64) * 40503 + batch.logical[chosen] * 2654435
    mixed = keys[:, None] * (2 * np.arange(HIDDEN_WIDTH) + 1) * 25214903917 % (1 << 31)
    return (mixed / (1 << 30) - 1).astype(np.float32)
