"""What a speculator knows of each proposer: whether it pays, and what its proposals cost."""

from __future__ import annotations

from tokenloom.engine.policies.pace import DraftGate
from tokenloom.engine.proposer import Proposer

REST = 16
"""Steps for which a proposer that does not pay is left alone: asking whether it does costs something too."""

LOOK_DEEPER = 8
"""Calls after which a proposer is asked for a level more than seems to pay."""

LONGEST_REST = 64
"""The same for one that is found not to pay again and again."""

TRY_MEMORY = 64.0
"""Observations that all earlier ones count for where a proposer that does not pay is tried: the text may be another."""


class ProposerState:
    """A proposer, whether it pays, and what its proposals cost."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self.gate = DraftGate()
        self.calls = 0
        self._costs: dict[int, float] = {}
        self.failed = False
        self.rested = 0
        """Steps since it was last found not to pay; 0: it pays, as far as is known."""
        self._in_vain = 0
        self._rest = REST

    def rests(self) -> bool:
        """Whether it is left alone in this step."""
        if 0 < self.rested < self._rest:
            self.rested += 1
            return True
        return self.failed

    @property
    def is_hopeless(self) -> bool:
        """Whether nothing that it suggested was worth a row in `REST` steps in a row: it is only tried then."""
        return self._in_vain >= REST

    def asked(self, is_verified: bool) -> None:
        """It suggested something, and whether anything was worth a row in that step. After a try it is asked once
        more: then it is seen whether what the try has taught makes a difference."""
        if is_verified:
            self._in_vain = REST - 1 if self.gate.is_trying else 0
            if not self.gate.is_trying:
                self._rest = REST
            return
        self._in_vain += 1
        if self.is_hopeless:
            self.rested = 1
            self._rest = min(2 * self._rest, LONGEST_REST)

    def took(self, levels: int, seconds: float) -> None:
        """A call for `levels` levels took `seconds`. Calls in which a draft model reads a prompt take much longer:
        so what is less than usual counts for more."""
        usual = self._costs.get(levels, seconds)
        self._costs[levels] = usual + (0.5 if seconds < usual else 0.05) * (seconds - usual)
        for fewer in self._costs:
            if fewer < levels:
                self._costs[fewer] = min(self._costs[fewer], self._costs[levels])

    def costs(self, levels: int) -> list[float]:
        """Seconds of calls for 0 to `levels` levels. More than were ever asked for are taken to cost what the most
        did: so they are tried, and then it is known. A level never costs more than those above it do on average:
        what says so was disturbed."""
        costs = [0.0]
        for level in range(1, levels + 1):
            deeper = min((known for known in self._costs if known > level), default=0)
            scaled = self._costs[deeper] * level / deeper if deeper else 0.0
            found = self._costs.get(level, max(costs[-1], scaled))
            costs.append(found if level == 1 else min(found, costs[-1] * level / (level - 1)))
        return costs
