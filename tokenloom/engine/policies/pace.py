"""Pace per request: how many tokens each should make in a step, and how much speculation that is worth.

After Li et al., "AdaServe: Accelerating Multi-SLO LLM Serving with SLO-Customized Speculative Decoding" (EuroSys
2026). The paper profiles one budget of verified rows; here it is chosen in every step from the fitted
`LatencyCurve` and from what time is worth, so that speculation shrinks under load and is off where it does not pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.policies.latency_curve import LatencyCurve
from tokenloom.engine.policies.tree_selection import RankedTrees

_KEEP: Final = 0.95
TRIAL_STEPS: Final = 4
TRIAL_REQUESTS: Final = 4
"""Steps in a row in which a draft that does not pay is tried, and requests for which it is."""


@dataclass(slots=True)
class Pace:
    """How far a request is against its SLO of `tpot` seconds per token (inf: none, best effort).

    The clock starts with the first step that decodes it; prompt and queue do not count. `produced` are the tokens
    since then.
    """

    tpot: float = inf
    started: float = inf
    produced: int = 0

    def begin(self, now: float) -> None:
        """The first decode step begins; later calls change nothing."""
        if self.started == inf:
            self.started = now

    def need(self, now: float, step_seconds: float) -> float:
        """A(r): tokens that a step of `step_seconds` should make to be on the line at its end; 0 or less: none."""
        if self.tpot == inf:
            return 0.0
        return (max(0.0, now - self.started) + step_seconds) / self.tpot - self.produced


class Needs(NamedTuple):
    """The needs of a step as a function of its seconds t: `base` + t * `rate`, at most `most`; float64 [requests]."""

    base: NDArray[np.float64]
    rate: NDArray[np.float64]
    most: float

    def at(self, seconds: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """[requests] for a number; [steps, requests] for [steps] seconds."""
        found = self.base + np.multiply.outer(seconds, self.rate)
        return np.minimum(found, self.most)


def needs_of(
    paces: Sequence[Pace],
    now: float,
    depth: int,
    remaining: Sequence[int] | None = None,
    fastest: float = 0.0,
) -> Needs:
    """The needs of requests with trees of at most `depth` levels, which make `depth` + 1 tokens at most.

    With `remaining`, the most tokens that each may still produce, whoever has lost the SLO even at `fastest` seconds
    per token needs nothing any more: those rows can still save somebody else.
    """
    rate = np.array([1 / pace.tpot for pace in paces])
    lag = np.array([pace.need(now, 0.0) for pace in paces])
    if remaining is not None and len(paces):
        lost = lag > np.asarray(remaining) * (1 - fastest * rate)
        lag[lost] = rate[lost] = 0.0
    return Needs(lag, rate, depth + 1.0)


@dataclass(frozen=True, slots=True)
class ShapeRule:
    """Depth and width of drafted trees by load (section 5.3 of the paper).

    `verify_rows` and `draft_rows` are the rows that a step of the target and of the draft have to spend; `c1` and
    `c2` were found by grid search.
    """

    verify_rows: int = 128
    draft_rows: int = 96
    c1: int = 1
    c2: int = 1
    min_depth: int = 1
    max_depth: int = 8
    max_width: int = 3

    def shape(self, requests: int) -> tuple[int, int]:
        """(depth, width) for `requests` at least 1; neither rises with more of them."""
        depth = self.verify_rows // (requests + self.c1) - 1
        width = self.draft_rows // requests + self.c2
        return (
            min(max(depth, self.min_depth), self.max_depth),
            min(max(width, 1), self.max_width),
        )


class TimePrice:
    """What a second is worth in tokens: what decoding makes of one, over about the last twenty steps.

    Not the rate of one step: a step that computes a long prompt has few tokens for its seconds whatever is verified,
    and by its own rate every row would seem to pay.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second; 0 before anything was decoded."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        """A step made `tokens` in `seconds`: its drafting, and what its roots and nodes would take without the
        prompt rows beside them, which cost their time anyway."""
        self._tokens = self._tokens * _KEEP + tokens
        self._seconds = self._seconds * _KEEP + seconds


class Budget(NamedTuple):
    """Rows to verify, roots included, and the expected seconds of the step with its drafting."""

    rows: int
    seconds: float


def choose_budget(
    ranked: RankedTrees,
    curve: LatencyCurve,
    keys: int,
    limit: int,
    *,
    other_rows: int = 0,
    overhead: float = 0.0,
    needs: Needs | None = None,
    boost: float = 2.0,
    price: float = 0.0,
) -> Budget:
    """How many rows of this step's trees are worth verifying: from the roots alone up to `limit`.

    Beside the trees the step has `other_rows` (prompt chunks); it attends to `keys` keys. The trees are there
    already: the `overhead` seconds of drafting count in the needs and in the rate, but are spent whatever is chosen.
    A row is verified if its tokens are worth more than its seconds at `price` (`TimePrice.rate`); with a price of 0
    the choice is the most expected tokens a second in this step. A token that a need asks for counts `boost` times.
    A curve that knows nothing yet is asked for no more than twice the roots.
    """
    roots = len(ranked)
    base = roots + other_rows
    trusted = max(curve.trusted_rows - base, roots) if curve.known else roots
    most = max(0, min(limit - roots, len(ranked.reaches), trusted))
    if needs is not None and needs.rate.any():
        worth = ranked.worth(needs.at(overhead + curve.seconds(base + roots, keys)), boost)
        gains = -np.sort(-worth, axis=None)[:most]
    else:
        gains = ranked.reaches[:most]
    values = np.zeros(most + 1)
    np.cumsum(gains, out=values[1:])
    seconds = curve.seconds_up_to(base, base + most, keys) + overhead
    if not curve.known:
        best = most
    elif price:
        best = int((values - price * seconds).argmax())
    else:
        best = int(((roots + values) / np.maximum(seconds, 1e-9)).argmax())
    return Budget(roots + best, float(seconds[best]))


class DraftGate:
    """How deep it pays to draft, decided before drafting; 0 where it does not pay.

    A draft that is off learns nothing, so it is tried again from time to time: for a few of the requests, in some steps
    in a row, since the first call after a pause says little of what the next would cost. It is tried as often as keeps
    the cost of trying within `probe_share` of the time. A new draft is asked in its first `first_trial` steps whatever
    is expected of it.
    """

    def __init__(self, probe_share: float = 0.005, first_trial: int = 0) -> None:
        self._probe_share = probe_share
        self._off_seconds = 0.0
        self._trial = first_trial
        self.is_trying = False
        """Whether the last depth was not expected to pay: what is drafted then has to be verified, or nothing is
        learned."""

    def depth(
        self,
        gains: Sequence[float],
        curve: LatencyCurve,
        keys: int,
        *,
        requests: int,
        other_rows: int,
        level_seconds: float | Sequence[float],
        steps: int = 1,
        rows: Sequence[float] | None = None,
        price: float = 0.0,
    ) -> int:
        """Levels to draft for `requests` sequences in this step, at most len(gains).

        `gains` are the tokens that each level is expected to bring per request; each level costs `level_seconds` of
        drafting (or, as a sequence, drafting to each depth from 0 on costs so much) and `rows` of the target per
        request (one, if not given: selection leaves out what is not worth it, so that it may be less); `steps` have
        passed since the last call. The depth whose tokens are worth most above its seconds at `price` is taken, or
        with a price of 0 the one with the most tokens a second. A curve that knows nothing yet is taught by trying.
        """
        self.is_trying = False
        if not gains or requests < 1:
            return 0
        if not curve.known:
            self._trial = max(0, self._trial - 1)
            self.is_trying = True
            return 1
        # Numbers one by one: an array operation costs more than a handful of levels.
        base = requests + other_rows
        plain = tried = curve.seconds(base, keys)
        best, best_value = 0, requests - price * plain if price else 1 / max(plain, 1e-9)
        tokens, nodes = 1.0, 0.0
        for level, gain in enumerate(gains, 1):
            tokens += gain
            nodes += 1.0 if rows is None else rows[level - 1]
            drafting = level_seconds * level if isinstance(level_seconds, float) else level_seconds[level]
            seconds = curve.seconds(base + round(requests * nodes), keys) + drafting
            if level == 1:
                tried = curve.seconds(base + min(requests, TRIAL_REQUESTS), keys) + drafting
            value = requests * tokens - price * seconds if price else tokens / max(seconds, 1e-9)
            if value > best_value:
                best, best_value = level, value
        if best:
            self._off_seconds = 0.0
        elif not self._trial:
            self._off_seconds += steps * plain
            if self._off_seconds * self._probe_share < TRIAL_STEPS * (tried - plain):
                return 0
            self._off_seconds = 0.0
            self._trial = TRIAL_STEPS
        if not self._trial:
            return best
        self._trial -= 1
        self.is_trying = not best
        return max(best, 1)
