"""Who goes first: one key for waiting and running sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenloom.engine.request import Request
from tokenloom.engine.sequence import Sequence

QueuePolicy = Literal["fcfs", "priority", "slo"]
QueueKey = tuple[int, float, float, str, int]


@dataclass(frozen=True, slots=True)
class QueueOrder:
    """First come first served, by priority class, or by the time at which the first token is due; smaller keys go
    first.

    With "slo" a request is due at its arrival + `slo.ttft`, and those that nothing was promised come after all
    others, first come first served. It is an order only: nobody who runs is preempted for somebody who is due.

    Whoever has waited longer than `age_bound` seconds since arrival goes before everyone who has not, oldest
    first: this is what keeps any request from starving, whatever arrives after it.
    """

    policy: QueuePolicy = "fcfs"
    age_bound: float = 60.0

    def rank(self, request: Request) -> tuple[int, float]:
        """Class and due time of a request that has not aged; equal ones go by arrival."""
        if self.policy == "priority":
            return request.priority, 0.0
        return 0, request.arrival + request.slo.ttft if self.policy == "slo" else 0.0

    def has_aged(self, seq: Sequence, now: float) -> bool:
        """Whether `seq` goes before everyone who is younger."""
        return now - seq.request.arrival > self.age_bound

    def priority_class(self, seq: Sequence, now: float) -> int:
        """The class of `seq`: lower classes may preempt higher ones when priorities are on."""
        return -(1 << 62) if self.has_aged(seq, now) else self.rank(seq.request)[0]

    def key(self, seq: Sequence, now: float) -> QueueKey:
        """Sort key at time `now`; total, since (request id, sample index) is unique."""
        request = seq.request
        urgency = (-(1 << 62), 0.0) if self.has_aged(seq, now) else self.rank(request)
        return (*urgency, request.arrival, request.request_id, seq.index)
