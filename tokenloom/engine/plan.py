"""What the scheduler decided for one step, and the record that the step leaves."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenloom.engine.sequence import Sequence
from tokenloom.engine.token_tree import TokenTree


class Run(NamedTuple):
    """Tokens [start, end) of a sequence, to be computed in this step."""

    seq: Sequence
    start: int
    end: int


class LogitEntry(NamedTuple):
    """Whom a logit row is for: `target` -1 samples the next token of `seq` after `path` (tokens of a tree that
    follow the committed ones), else scores that prompt token."""

    seq: Sequence
    target: int
    path: Seq[int] = ()


class PooledRun(NamedTuple):
    """Whom the next `num_rows` hidden rows are for."""

    seq: Sequence
    num_rows: int


@dataclass(slots=True)
class Plan:
    """One step: the runs in batch order, and the page copies (source, destination) to do before.

    `trees` hang below the last token of a decoding run; their rows follow that token's. `entries` and `pooled` are
    filled when the batch is built.
    """

    now: float
    runs: list[Run] = field(default_factory=list)
    page_copies: list[tuple[int, int]] = field(default_factory=list)
    entries: list[LogitEntry] = field(default_factory=list)
    pooled: list[PooledRun] = field(default_factory=list)
    trees: dict[Sequence, TokenTree] = field(default_factory=dict)
    num_rows: int = 0

    def drop(self, seq: Sequence) -> None:
        """Take back the run of a sequence that was preempted after it was planned."""
        kept = [run for run in self.runs if run.seq is not seq]
        self.num_rows -= sum(run.end - run.start for run in self.runs if run.seq is seq)
        self.runs[:] = kept


class PlaceCounts(NamedTuple):
    """How often in one step a proposer suggested something at `depth` (from 1) below a path that came true, and how
    often something that came true, for sequences with `adapter` ("": none)."""

    proposer: str
    adapter: str
    depth: int
    tested: int
    accepted: int


@dataclass(slots=True)
class StepSpeculation:
    """What speculation did in one step: `num_trees` sequences had a tree, and `accepted_by_depth[i]` of them took a
    token of depth i + 1. `skipped`: sequences decoded and none had a tree. `seconds_saved` may be below 0; see
    `SpeculationStats`.
    """

    num_trees: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    places: list[PlaceCounts] = field(default_factory=list)
    skipped: bool = False
    seconds_saved: float = 0.0


@dataclass(slots=True)
class StepRecord:
    """What one step did. Metrics, the cost model and the simulator read this one record.

    Rows by work (`verify_rows`: nodes of trees, whose roots are decode rows; `num_accepted` of them became tokens),
    sequences by state after the step, pages by use, `seconds` by phase (plan, build, execute,
    commit), and counts of events in the step. `speculation` is None where nothing is proposed.
    """

    step: int
    time: float
    prefill_rows: int
    decode_rows: int
    context_tokens: int
    num_running: int
    num_waiting: int
    pages_used: int
    pages_idle: int
    pages_total: int
    num_preemptions: int
    num_finished: int
    prefix_queries: int
    prefix_hits: int
    seconds: dict[str, float]
    adapters_resident: int = 0
    adapter_bytes: int = 0
    adapters_fetched: int = 0
    adapters_evicted: int = 0
    verify_rows: int = 0
    num_accepted: int = 0
    speculation: StepSpeculation | None = None
