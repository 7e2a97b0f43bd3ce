"""How a step's token budget is shared between decodes and prompt chunks.

Stall-free batching after Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
Sarathi-Serve" (OSDI 2024): all decodes go first, prompt chunks fill what the budget leaves. The two switches give
the paper's ablations, for simulation and measurement: no chunks is whole prompts beside decodes, not mixed is
alternating steps, neither is prefill first as in early vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Turns(NamedTuple):
    """What may run in this step."""

    decode: bool
    prefill: bool


@dataclass(frozen=True, slots=True)
class ChunkedPrefill:
    """`max_batch_tokens` rows a step at most, `max_chunk_tokens` of one prompt at most (0: the budget).

    Decodes are never cut: the scheduler admits at most `max_running` sequences, which keeps `min_prefill` rows of
    the budget for prompts, so that first tokens cannot starve behind decodes.
    """

    max_batch_tokens: int = 512
    max_chunk_tokens: int = 0
    chunked: bool = True
    mixed: bool = True

    @property
    def min_prefill(self) -> int:
        """Rows of each step that decodes can never take."""
        return self.max_batch_tokens // 8

    @property
    def max_running(self) -> int:
        """Most sequences that may run at once under this budget."""
        return max(1, self.max_batch_tokens - self.min_prefill)

    def turns(self, step: int, has_decodes: bool, has_prefills: bool) -> Turns:
        """Which kinds of work share step number `step`."""
        if self.mixed or not (has_decodes and has_prefills):
            return Turns(True, True)
        if self.chunked:
            return Turns(step % 2 == 0, step % 2 == 1)
        return Turns(False, True)

    def chunk(self, num_pending: int, budget: int) -> int:
        """Rows to give a prompt with `num_pending` rows to go when `budget` rows are left (never below 0)."""
        if not self.chunked:
            return num_pending
        rows = min(num_pending, budget)
        if self.max_chunk_tokens:
            rows = min(rows, self.max_chunk_tokens)
        return max(rows, 0)
