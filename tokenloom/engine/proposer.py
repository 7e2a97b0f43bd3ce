"""The protocol of proposers: whatever suggests how a sequence goes on."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from tokenloom.engine.sequence import Sequence
from tokenloom.engine.token_tree import Draws


class Wanted(NamedTuple):
    """A sequence that a proposal is wanted for: it decodes, and `seq.tokens` are all its committed tokens, the
    last of which is the root. At most `max_depth` levels and `max_nodes` nodes below it, and `width` children of a
    node are worth proposing; all are at least 1.

    With `draws` the tree will be verified by rejection (speculation/multi_step_sampling.py), and a proposal may say
    which nodes are draws, and from which law. What it draws is verified whole, up to `max_nodes` nodes."""

    seq: Sequence
    max_depth: int
    max_nodes: int
    width: int
    draws: bool = False


@dataclass(slots=True)
class Proposal:
    """A tree as one proposer suggests it, nodes in any order with parents first.

    Node i has `tokens[i]` below node `parents[i]` < i (-1: the root), is the `ranks[i]`-th best of its siblings
    (from 0), and would be right with probability `confidences[i]` if its parent is: an estimate in [0, 1] that
    may be off, since acceptance is tracked by rank and confidence. Siblings have different tokens.

    Where `Wanted.draws` asked for it, `draws[node]` may state that children of a node (-1: the root) were drawn, in
    which order and from which law [vocabulary]. Whoever states it owes that they are all that was drawn there, that
    how many depends at most on tokens above them and drawn before them, and that the random numbers of a call are
    used for nothing else, in no other call, nor by another proposer.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    draws: dict[int, Draws] = field(default_factory=dict)

    def check_draws(self, max_nodes: int, vocab_size: int) -> None:
        """Raise ValueError unless `draws` may be what they say."""
        if self.draws and len(self.tokens) > max_nodes:
            raise ValueError(
                f"{len(self.tokens)} nodes with draws among them, more than the {max_nodes} wanted"
            )
        for parent, (regime, nodes, law) in self.draws.items():
            if regime not in ("independent", "distinct") or law is None:
                raise ValueError(f"draws of the regime {regime} {'without' if law is None else 'with'} a law")
            if law.shape != (vocab_size,) or not (law >= 0).all() or not 0 < float(law.sum()) < np.inf:
                raise ValueError(f"a law of shape {law.shape} and sum {law.sum()} over {vocab_size} tokens")
            for node in nodes:
                if not 0 <= node < len(self.tokens) or self.parents[node] != parent:
                    raise ValueError(f"node {node} is no child of node {parent}")
                if not 0 <= self.tokens[node] < vocab_size or not law[self.tokens[node]] > 0:
                    raise ValueError(f"token {self.tokens[node]} was drawn from a law that does not have it")
            if regime == "distinct" and len({self.tokens[node] for node in nodes}) < len(nodes):
                raise ValueError("a token was drawn twice without replacement")


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
