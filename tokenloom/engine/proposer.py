"""The protocol of proposers: whatever suggests how a sequence goes on."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tokenloom.engine.sequence import Sequence


class Wanted(NamedTuple):
    """A sequence that a proposal is wanted for: it decodes, and `seq.tokens` are all its committed tokens, the
    last of which is the root. At most `max_depth` levels and `max_nodes` nodes below it, and `width` children of a
    node are worth proposing; all are at least 1."""

    seq: Sequence
    max_depth: int
    max_nodes: int
    width: int


@dataclass(slots=True)
class Proposal:
    """A tree as one proposer suggests it, nodes in any order with parents first.

    Node i has `tokens[i]` below node `parents[i]` < i (-1: the root), is the `ranks[i]`-th best of its siblings
    (from 0), and would be right with probability `confidences[i]` if its parent is: an estimate in [0, 1] that
    may be off, since acceptance is tracked by rank and confidence. Siblings have different tokens.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)


class Proposer(Protocol):
    """Suggests trees. Nothing that it returns can change an output, only how fast it comes.

    State is kept by sequence: what was committed since the last call stands in `seq.tokens` (append-only while the
    sequence runs). A sequence that is not asked for in a step is not forgotten.
    """

    @property
    def name(self) -> str:
        """A short name for metrics, unique among the proposers of an engine."""

    def propose(self, wanted: Seq[Wanted]) -> Seq[Proposal]:
        """One proposal for each, in their order; an empty one where there is nothing to suggest."""

    def forget(self, seq: Sequence) -> None:
        """`seq` has stopped running (finished, cancelled or preempted): give back what is held for it. Called for
        sequences that were never asked for, too."""

    def close(self) -> None:
        """Release everything."""
