"""The token batch: everything one step computes for one model, as flat arrays over T rows.

```
rows       |--- segment 0 (prefill, 5 rows) ---|- segment 1 (decode) -|- segment 2 (verify) ... -|
starts      0                                   5                      6                        T
```
There is no padding and no prefill or decode mode: a segment is a run of rows of one sequence.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.request import TokenLogprobs

PAGE_SIZE = 16
"""Slots (token positions) of one KV page."""

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class Work(enum.IntEnum):
    """What the rows of a segment are for."""

    PREFILL = 0
    DECODE = 1
    VERIFY = 2
    TRAIN = 3


@dataclass(slots=True)
class LogitEdits:
    """Changes to one logit row before sampling, applied in the order of the fields.

    `allowed_ids` int32[A]: every other token is excluded (None: all are allowed). Penalties as in vLLM:
    `seen_ids` int32[P] are the distinct tokens of prompt and output, `output_counts` int32[P] how often each
    stands in the output (0: prompt only); repetition divides positive and multiplies negative logits of seen
    tokens, frequency subtracts per output count, presence subtracts once if the count is above 0.
    `bias_ids` int32[B], `bias` float32[B] are added; -inf excludes a token. Ids are distinct within an array.
    """

    allowed_ids: Int32 | None = None
    seen_ids: Int32 | None = None
    output_counts: Int32 | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias_ids: Int32 | None = None
    bias: Float32 | None = None


@dataclass(slots=True)
class LogitRows:
    """The L rows whose logits are needed, one entry of sampling state each.

    Several entries may share a row (the n samples of one prompt). `rows` int32[L]: row in the batch.
    `targets` int32[L]: -1 samples a token; t >= 0 only scores token t (prompt logprobs). `temperatures`
    float32[L] (0: greedy), `top_k` int32[L] (0: off), `top_p`, `min_p` float32[L]. `seeds` uint64[L],
    `sample_index` uint32[L] and `positions` int64[L] (absolute position of the token to draw) key the noise.
    `num_logprobs` int32[L]: -1 none, k: the chosen token's and the k best. `edits` maps an entry to its edits.
    """

    rows: Int32
    targets: Int32
    temperatures: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32
    seeds: NDArray[np.uint64]
    sample_index: NDArray[np.uint32]
    positions: Int64
    num_logprobs: Int32
    edits: Mapping[int, LogitEdits] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(slots=True)
class TokenBatch:
    """One step's rows for one model.

    Per row, int32[T] (slots int64[T]): `token_ids`; `positions` (RoPE); `logical` = number of keys before the
    row that it sees; `slots` = page * PAGE_SIZE + offset where the row's K and V are written, -1 = nowhere
    (they are in the page already); `parents` = row index of the tree parent, -1 = the committed context.
    Per segment: `starts` int32[S+1] row offsets; `context_lens` int32[S] = committed tokens of the sequence
    before the segment's first row; `page_tables` int32[S, P] page ids in path order (entries past the context
    are 0); `adapter_slots` int32[S] (-1: base); `work` int8[S]. `page_copies` int32[C, 2] (source,
    destination) are done before the pass. `hidden_rows` int32[H], rising: rows whose hidden state (what the
    head reads) is an output of the step; they need no logits.
    """

    token_ids: Int32
    positions: Int32
    logical: Int32
    slots: Int64
    parents: Int32
    starts: Int32
    context_lens: Int32
    page_tables: Int32
    adapter_slots: Int32
    work: NDArray[np.int8]
    logit_rows: LogitRows
    page_copies: Int32
    hidden_rows: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def num_segments(self) -> int:
        return len(self.work)

    def check(self) -> None:
        """Raise ValueError unless the batch is legal (debug runs and tests call it on every step)."""
        rows, segments = self.num_rows, self.num_segments
        for name in ("positions", "logical", "slots", "parents"):
            if len(getattr(self, name)) != rows:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {rows} rows")
        if len(self.starts) != segments + 1 or self.starts[0] != 0 or self.starts[-1] != rows:
            raise ValueError(f"starts {self.starts.tolist()} do not cover {rows} rows")
        if (np.diff(self.starts) <= 0).any():
            raise ValueError("empty segment")
        written = self.slots[self.slots >= 0]
        if len(np.unique(written)) != len(written):
            raise ValueError("two rows write one slot")
        for segment in range(segments):
            self._check_segment(segment)
        if len(self.logit_rows) and not (self.logit_rows.rows < rows).all():
            raise ValueError("a logit row lies outside the batch")
        bounded = np.concatenate([[-1], self.hidden_rows, [rows]])
        if (np.diff(bounded) < 1).any():
            raise ValueError(f"hidden_rows {self.hidden_rows.tolist()} do not rise within {rows} rows")

    def _check_segment(self, segment: int) -> None:
        begin, end = int(self.starts[segment]), int(self.starts[segment + 1])
        pages = self.page_tables[segment]
        if (self.logical[begin:end] // PAGE_SIZE >= len(pages)).any():
            raise ValueError(f"segment {segment}: the page table ends before the last key")
        if self.work[segment] == Work.VERIFY:
            self._check_tree(segment, begin, end)
            return
        if self.work[segment] not in (Work.PREFILL, Work.DECODE):
            return
        first = int(self.context_lens[segment])
        logical = np.arange(first, first + end - begin)
        if (self.parents[begin:end] >= 0).any() or (self.logical[begin:end] != logical).any():
            raise ValueError(f"segment {segment}: rows are not a run after {first} tokens")
        own = pages[logical // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + logical % PAGE_SIZE
        slots = self.slots[begin:end]
        if ((slots >= 0) & (slots != own)).any():
            raise ValueError(f"segment {segment}: slots {slots.tolist()} are not those of its keys")

    def _check_tree(self, segment: int, begin: int, end: int) -> None:
        """One root, then nodes below it, each one place behind its parent."""
        parents, logical = self.parents[begin:end], self.logical[begin:end]
        if parents[0] != -1 or logical[0] != self.context_lens[segment]:
            raise ValueError(f"segment {segment}: the root is not the next token")
        if (parents[1:] < begin).any() or (parents[1:] >= np.arange(begin + 1, end)).any():
            raise ValueError(f"segment {segment}: parents {parents.tolist()} do not come first")
        if (logical[1:] != self.logical[parents[1:]] + 1).any():
            raise ValueError(f"segment {segment}: {logical.tolist()} are not one behind the parents'")


@dataclass(slots=True)
class TopLogprobs:
    """The k best tokens of one logit row: ids int32[k], logprobs float32[k] in falling order, and the rank
    (from 1) of the chosen token."""

    token_ids: Int32
    logprobs: Float32
    rank: int

    def of(self, token: int, logprob: float) -> TokenLogprobs:
        """What a client sees, with the chosen `token`."""
        best = tuple(zip(self.token_ids.tolist(), self.logprobs.tolist(), strict=True))
        return TokenLogprobs(token, logprob, self.rank, best)


@dataclass(slots=True)
class StepResult:
    """What one step gave: `token_ids` int32[L] and `logprobs` float32[L] (NaN where none was asked), and
    `top` for the entries with `num_logprobs` >= 0; `hidden` float32[H, W], W the width of what the head reads,
    for the batch's `hidden_rows`. `seconds` is the executor's time for the step."""

    token_ids: Int32
    logprobs: Float32
    top: Mapping[int, TopLogprobs]
    seconds: float = 0.0
    hidden: Float32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass(slots=True)
class Ticket:
    """A submitted batch; `payload` is the executor's own."""

    batch: TokenBatch
    payload: object = None


class Executor(Protocol):
    """What runs a token batch. One batch may be in flight while the next is planned."""

    def submit(self, batch: TokenBatch) -> Ticket:
        """Start the batch."""

    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for the batch; returns one entry per logit row, and one row of `hidden` per hidden row."""

    def logits(self, rows: Int32) -> Float32:
        """fp32 [n, vocabulary]: what the last batch that was collected gave for at most 64 rows that are among its
        logit rows. Raises `UnsupportedFeature` where there are none."""

    def move_slots(self, moves: Int64) -> None:
        """Between steps: copy K and V of whole slots, int64 [C, 2] (source, destination; page * PAGE_SIZE + offset),
        one move after the other. Raises ValueError for a slot outside the pool, before anything is copied."""

    def close(self) -> None:
        """Release memory and threads."""
