"""An executor that computes nothing, for measuring the step's own cost."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import StepResult, Ticket, TokenBatch
from tokenloom.errors import UnsupportedFeature


class NullExecutor:
    """Answers every logit row with `token`, and every hidden row with a zero."""

    def __init__(self, token: int = 0) -> None:
        self.token = token

    def submit(self, batch: TokenBatch) -> Ticket:
        return Ticket(batch)

    def collect(self, ticket: Ticket) -> StepResult:
        num_entries = len(ticket.batch.logit_rows)
        return StepResult(
            np.full(num_entries, self.token, np.int32),
            np.full(num_entries, np.nan, np.float32),
            {},
            hidden=np.zeros((len(ticket.batch.hidden_rows), 1), np.float32),
        )

    def logits(self, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """Raises `UnsupportedFeature`."""
        raise UnsupportedFeature("logits", "the null executor computes none")

    def move_slots(self, moves: NDArray[np.int64]) -> None:
        """Nothing: there is no KV."""

    def close(self) -> None:
        """Nothing to release."""
