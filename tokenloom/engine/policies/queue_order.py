"""Who goes first: one key for waiting and running sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenloom.engine.sequence import Sequence

QueueKey = tuple[int, float, str, int]


@dataclass(frozen=True, slots=True)
class QueueOrder:
    """First come first served, or by priority class; smaller keys go first.

    Whoever has waited longer than `age_bound` seconds since arrival goes before everyone who has not, oldest
    first: this is what keeps any request from starving, whatever arrives after it.
    """

    policy: Literal["fcfs", "priority"] = "fcfs"
    age_bound: float = 60.0

    def priority_class(self, seq: Sequence, now: float) -> int:
        """The class of `seq`: lower classes may preempt higher ones when priorities are on."""
        if now - seq.request.arrival > self.age_bound:
            return -(1 << 62)
        return seq.request.priority if self.policy == "priority" else 0

    def key(self, seq: Sequence, now: float) -> QueueKey:
        """Sort key at time `now`; total, since (request id, sample index) is unique."""
        request = seq.request
        return (self.priority_class(seq, now), request.arrival, request.request_id, seq.index)
