"""What a draft model is asked in one call."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Final

from tokenloom.engine.batch import PAGE_SIZE, Int32, TokenBatch

MAX_CANDIDATES: Final = 8
"""Continuations of a node that are looked at; no level is wider."""


@dataclass(slots=True)
class DraftWork:
    """Catch up with S sequences, and draft a tree for each of them.

    ```
    draft's KV   |--- there already ---|-- rows of the batch --|  node  node  ...
                 0                                             c  = context_lens + rows of the segment
    pages        page_tables[s]                  ... c // 16 : scratch[s, beam, 0], scratch[s, beam, 1], ...
    ```
    `batch` has one segment per sequence: the committed tokens whose KV the draft lacks, the last of which is the
    root, and one logit entry for each, in their order, at its last row: the sampling state of the target's next
    token. `depths` int32[S]: levels to draft, 0: only catch up. `widths` int32[S]: nodes of a level, from 1 to
    `MAX_CANDIDATES`. `scratch` int32[S, W, P]: pages that nobody else has; beam b of sequence s has scratch[s, b, j]
    as page c // 16 + j of its table. Rows of nodes stand at c, c + 1, ..., c + depth - 2: the last level is not
    computed. Afterwards the KV of the batch's rows is in its slots, and scratch pages hold nothing of worth.

    Sequences of `draws` get a tree that is drawn instead of the best one: `widths` tokens below the root and one
    below each other node, without replacement, from laws over `law_size` tokens that the proposal states. Their
    seeds are for this alone. They need a temperature above 0.
    """

    batch: TokenBatch
    depths: Int32
    widths: Int32
    scratch: Int32
    draws: Set[int] = frozenset()
    law_size: int = 0

    def check(self) -> None:
        """Raise ValueError unless the shapes are legal and scratch pages suffice."""
        batch, count = self.batch, self.batch.num_segments
        entries = batch.logit_rows
        if self.depths.shape != (count,) or self.widths.shape != (count,):
            raise ValueError(
                f"depths {self.depths.shape} and widths {self.widths.shape} for {count} sequences"
            )
        if self.scratch.ndim != 3 or len(self.scratch) != count:
            raise ValueError(f"scratch has shape {self.scratch.shape} for {count} sequences")
        if (self.depths < 0).any():
            raise ValueError(f"depths {self.depths.tolist()} below 0")
        if ((self.widths < 1) | (self.widths > MAX_CANDIDATES)).any():
            raise ValueError(f"widths {self.widths.tolist()} outside 1 to {MAX_CANDIDATES}")
        if (
            len(entries) != count
            or (entries.rows != batch.starts[1:] - 1).any()
            or (entries.targets >= 0).any()
        ):
            raise ValueError("the logit entries are not one draw at the last row of each segment")
        for s in self.draws:
            if not 0 <= s < count or not entries.temperatures[s] > 0 or self.law_size < 1:
                raise ValueError(f"no draws over {self.law_size} tokens for sequence {s} of {count}")
        for s in range(count):
            beams, pages = self.scratch_of(s)
            if pages and (beams > self.scratch.shape[1] or pages > self.scratch.shape[2]):
                raise ValueError(
                    f"scratch has shape {self.scratch.shape}; sequence {s} has {beams} beams of {pages} pages"
                )

    def context_of(self, sequence: int) -> int:
        """c: tokens in the draft's KV once the rows of the batch are computed."""
        starts = self.batch.starts
        return int(self.batch.context_lens[sequence] + starts[sequence + 1] - starts[sequence])

    def scratch_of(self, sequence: int) -> tuple[int, int]:
        """Beams of a sequence, and scratch pages of each."""
        depth = int(self.depths[sequence])
        return int(self.widths[sequence]), scratch_pages(self.context_of(sequence), depth)


def scratch_pages(context: int, depth: int) -> int:
    """Scratch pages of a beam that drafts `depth` levels behind `context` tokens."""
    return -(-(context % PAGE_SIZE + depth - 1) // PAGE_SIZE) if depth > 1 else 0
