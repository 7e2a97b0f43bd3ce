"""How deep to draft and how many rows to verify, step by step, for one draft and one target.

The decisions are those of `pace`; here is what they remember from one step to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.policies.latency_curve import LatencyCurve
from tokenloom.engine.policies.pace import DraftGate, Needs, TimePrice, choose_budget
from tokenloom.engine.policies.tree_selection import FULL, RankedTrees, SelectionPolicy
from tokenloom.engine.token_tree import ROOT, TokenTree

_LEVEL_SHARE: Final = 0.03
_PROBE_LEVEL_SHARE: Final = 0.15
_PRIOR: Final = 0.6
_PLAIN_EVERY: Final = 200


class Load(NamedTuple):
    """What a step does anyway: rows of decoding `requests`, `other_rows` of prompts, attended `keys` in all."""

    requests: int
    other_rows: int
    keys: int


class Choice(NamedTuple):
    """The nodes of each tree to verify, all rows with the roots, the expected seconds of the step with its drafting,
    and the needs [requests] that were served."""

    nodes: list[list[int]]
    rows: int
    seconds: float
    needs: NDArray[np.float64]


class TreeBudget:
    """In each step: `depth`, then (with the drafted trees) `choose`, then `observe`."""

    def __init__(
        self,
        policy: SelectionPolicy = FULL,
        curve: LatencyCurve | None = None,
        probe_share: float = 0.005,
    ) -> None:
        self.policy = policy
        self.curve = curve or LatencyCurve()
        self.price = TimePrice()
        self._gate = DraftGate(probe_share)
        # Of each level, per decoding request: tokens that it brought (weighed by the needs), and rows verified.
        self._values = [_PRIOR]
        self._rows = [1.0]
        self._steps = 0
        self._is_off = self._was_off = False

    @property
    def _boost(self) -> float:
        """Weight of a token that a need asks for; where needs go first whatever they cost, nothing is weighed."""
        return self.policy.boost if self.policy.serve_needs and self.policy.boost < inf else 1.0

    def depth(self, load: Load, level_seconds: float, most: int) -> int:
        """Levels to draft, at most `most`; 0 where drafting does not pay. A level costs `level_seconds`.

        Now and then it is 0 though drafting pays, and often before the curve knows anything: who always speculates
        never learns what a plain step takes.
        """
        values, rows = self._levels(max(most, 0))
        self._steps += 1
        if self._steps % (_PLAIN_EVERY if self.curve.known else 2) == 0:
            return 0
        self._was_off = self._is_off
        depth = self._gate.depth(
            values,
            self.curve,
            load.keys,
            requests=load.requests,
            other_rows=load.other_rows,
            level_seconds=level_seconds,
            rows=rows,
            price=self.price.rate,
        )
        self._is_off = depth == 0
        return depth

    def _levels(self, depth: int) -> tuple[list[float], list[float]]:
        """Tokens and rows of each level down to `depth`: those that were never drafted fall off as the last one did."""
        values, rows = self._values[:depth], self._rows[:depth]
        while len(values) < depth:
            values.append(values[-1] * _fall(values))
            rows.append(rows[-1])
        return values, rows

    def choose(
        self,
        ranked: RankedTrees,
        load: Load,
        needs: Needs | None = None,
        *,
        limit: int,
        drafting: float = 0.0,
    ) -> Choice:
        """The nodes that are worth their rows, at most `limit` rows with the roots; one tree for each request."""
        if not self.policy.serve_needs:
            needs = None
        budget = choose_budget(
            ranked,
            self.curve,
            load.keys,
            limit,
            other_rows=load.other_rows,
            overhead=drafting,
            needs=needs,
            boost=self._boost,
            price=self.price.rate,
        )
        wanted = needs.at(budget.seconds) if needs is not None else np.zeros(len(ranked))
        nodes = ranked.select(budget.rows, wanted, self.policy)
        return Choice(nodes, len(ranked) + sum(map(len, nodes)), budget.seconds, wanted)

    def observe(
        self,
        trees: Sequence[TokenTree],
        choice: Choice,
        taken: Sequence[int],
        load: Load,
        *,
        seconds: float,
        depth: int,
        drafting: float = 0.0,
    ) -> None:
        """A step took `seconds` beside its `drafting` to `depth` levels; request i made `taken[i]` tokens."""
        self.curve.observe(choice.rows + load.other_rows, load.keys, seconds)
        made = np.asarray(taken, float)
        extra = self._boost - 1
        worth = made + extra * np.minimum(made, np.maximum(choice.needs, 0.0))
        alone = min(self.curve.seconds(choice.rows, load.keys), seconds) if load.other_rows else seconds
        if len(made):
            self.price.observe(float(worth.sum()), alone + drafting)
        if not depth or not len(made):
            return
        # The first draft after a pause is a try. Tries are rare, so they must count for more, or a draft that has
        # become good again would stay off for long.
        share = _PROBE_LEVEL_SHARE if self._was_off else _LEVEL_SHARE
        most = max(depth, len(self._values))
        self._values, self._rows = self._levels(most)
        for level, rows in enumerate(_rows_by_level(trees, choice, depth)):
            gained = (made > level + 1) * (1 + extra * (choice.needs > level + 1))
            self._values[level] += (float(gained.mean()) - self._values[level]) * share
            self._rows[level] += (rows / len(made) - self._rows[level]) * share
        # What was not drafted now is slowly forgotten: it is what the levels above let expect.
        for level in range(depth, most):
            expected = self._values[level - 1] * _fall(self._values[:level])
            self._values[level] += (expected - self._values[level]) * share
            self._rows[level] += (self._rows[level - 1] - self._rows[level]) * share


def _fall(values: Sequence[float]) -> float:
    """What the next level brings of what the last one of `values` (at least one) does."""
    above = values[-2] if len(values) > 1 else 1.0
    return min(1.0, values[-1] / above) if above > 0 else 0.0


def _rows_by_level(trees: Sequence[TokenTree], choice: Choice, depth: int) -> list[int]:
    """Verified nodes of each level from the first to `depth`."""
    rows = [0] * depth
    for tree, nodes in zip(trees, choice.nodes, strict=True):
        levels = {ROOT: -1}
        for node in nodes:
            level = levels[node] = levels[tree.parents[node]] + 1
            if level < depth:
                rows[level] += 1
    return rows
