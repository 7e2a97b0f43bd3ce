"""What a speculator knows of each proposer: whether it pays, and what its proposals cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Final

from tokenloom.engine.policies.pace import DraftGate
from tokenloom.engine.proposer import Proposer
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.token_tree import TokenTree

REST = 16
"""Steps for which a proposer that does not pay is left alone: asking whether it does costs something too."""

FIRST_TRIAL = 8
"""Steps in which a new proposer is asked whatever is expected of it."""

LOOK_DEEPER = 8
"""Calls after which a proposer is asked for a level more than seems to pay."""

TRY_MEMORY = 64.0
"""Observations that all earlier ones count for where a proposer that does not pay is tried: the text may be another."""

log = logging.getLogger(__name__)

_PRIOR: Final = 0.6
_PULL: Final = 8
_SHARE: Final = 0.03
_TRY_SHARE: Final = 0.15


class ProposerState:
    """A proposer, whether it pays, what its proposals cost and what each of their levels brings."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self.gate = DraftGate(first_trial=FIRST_TRIAL)
        self.calls = 0
        self._costs: dict[int, float] = {}
        self.failed = False
        self._rest = REST
        self._is_warm = False
        self.rested = 0
        """Steps since it was last found not to pay; 0: it pays, as far as is known."""
        self.asked = 0
        """Levels that it was asked for in this step; 0: it was not asked."""
        self.requests = 0
        """Sequences that it was asked for last."""
        self.known = 0
        """How many of those are asked for all the time. The others are tries, which are rare: they count for more, or a
        draft that has become good would stay off for long."""
        self._values = [_PRIOR]
        self._rows = [1.0]
        self._steps = [0]

    def fail(self) -> None:
        """It has raised what is being handled: it is not asked any more."""
        if not self.failed:
            log.exception("the proposer %s failed and is not asked any more", self.proposer.name)
        self.failed = True

    def forget(self, seq: Sequence) -> None:
        """`seq` has stopped. One that failed hears of it too: it may hold something for it."""
        try:
            self.proposer.forget(seq)
        except Exception:
            self.fail()

    def close(self) -> None:
        """Release what it holds."""
        try:
            self.proposer.close()
        except Exception:
            log.exception("the proposer %s failed when it was closed", self.proposer.name)

    def rests(self) -> bool:
        """Whether it is left alone in this step."""
        if 0 < self.rested < self._rest:
            self.rested += 1
            return True
        return self.failed

    def pause(self, is_long: bool) -> None:
        """It does not pay in this step, which is the first of a rest. One that is not `is_long` ends with it: beside
        the rows of prompts every row costs, and the next step may be another matter."""
        self.rested = 1
        self._rest = REST if is_long else 1

    def asks(self, depth: int, requests: int) -> None:
        """It is asked for `depth` levels for `requests` sequences in this step, at least one of each."""
        self.calls += 1
        self._is_warm = self._is_warm and not self.rested
        self.rested = 0
        self.asked = depth
        self.requests = requests

    def took(self, levels: int, seconds: float) -> None:
        """A call for `levels` levels took `seconds`. The first call after a rest, which catches up with what came
        meanwhile, does not count."""
        if not self._is_warm:
            self._is_warm = True
            return
        self._costs[levels] = usual(self._costs.get(levels, seconds), seconds)
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

    def levels(self, most: int) -> tuple[list[float], list[float]]:
        """Of each level from the first to `most`, per request: the tokens that it brings, weighed by the needs, and the
        rows of it that are verified. Levels that were never asked for fall off as the last one did."""
        values, rows = self._values[:most], self._rows[:most]
        while len(values) < most:
            above = values[-2] if len(values) > 1 else 1.0
            values.append(values[-1] * min(1.0, values[-1] / above) if above > 0 else 0.0)
            rows.append(rows[-1])
        return values, rows

    def learn(self, values: Seq[float], rows: Seq[int]) -> None:
        """The levels that were asked for in this step brought `values` and took `rows`, of all requests together."""
        depth = len(values)
        most = max(depth, len(self._values))
        self._values, self._rows = self.levels(most)
        self._steps += [0] * (most - len(self._steps))
        last, last_rows = self._values[depth - 1], self._rows[depth - 1]
        for level in range(depth):
            # What was assumed before the first step counts for `_PULL` steps.
            share = max(_SHARE if level < self.known else _TRY_SHARE, 1 / (self._steps[level] + _PULL))
            self._steps[level] += 1
            self._values[level] += (values[level] / self.requests - self._values[level]) * share
            self._rows[level] += (rows[level] / self.requests - self._rows[level]) * share
        # What was not drafted keeps its share of the last level that was.
        for level in range(depth, most):
            self._values[level] = _carried(self._values[level], last, self._values[depth - 1])
            self._rows[level] = _carried(self._rows[level], last_rows, self._rows[depth - 1])


def usual(before: float, seconds: float) -> float:
    """What usually takes `before` seconds took `seconds`: what it usually takes now.

    The first steps of a process, calls in which a draft model reads a prompt, and whatever something disturbs take
    much longer than the others: so what is less counts for more.
    """
    return before + (0.5 if seconds < before else 0.05) * (seconds - before)


def _carried(deep: float, before: float, now: float) -> float:
    """What a level that was not drafted stands at, once one above it went from `before` to `now`. Where others suggest
    the same first, one above may bring next to nothing and a deep one much: twice nothing then says nothing of it."""
    return min(deep * now / before, max(deep, now)) if before > 0 else 0.0


def learn_levels(
    sources: Seq[ProposerState],
    trees: Mapping[Sequence, TokenTree],
    accepted: Mapping[Sequence, Seq[int]],
    needs: Mapping[Sequence, float],
    boost: float,
) -> None:
    """Tell `sources` what the levels that they were asked for in this step brought, and in how many rows.

    Of the requests that they were asked for, those of `trees` had something verified; `accepted` are the nodes that
    became tokens. A token within what a request needs counts `boost` times. What several suggested is the first one's:
    the others would not have been missed.
    """
    if not any(source.asked for source in sources):
        return
    values = [[0.0] * source.asked for source in sources]
    rows = [[0] * source.asked for source in sources]
    for seq, tree in trees.items():
        depths = tree.depths()
        for depth, features in zip(depths, tree.features, strict=True):
            rows[features[0][0]][depth - 1] += 1
        need = needs.get(seq, 0.0)
        for node in accepted.get(seq, ()):
            depth = depths[node]
            values[tree.features[node][0][0]][depth - 1] += boost if need > depth else 1.0
    for source, brought, verified in zip(sources, values, rows, strict=True):
        if source.asked:
            source.learn(brought, verified)
