"""Seconds of a step by its rows and attended keys, fitted while serving.

The price list of every decision about speculation: AdaServe (EuroSys 2026) profiles its target once; here the curve
follows the machine, whose speed moves with what else runs on it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

import numpy as np
from numpy.typing import NDArray

KNOTS: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)

_KEYS_UNIT: Final = 1e5
_SMOOTH: Final = 0.02
_RIDGE: Final = 1e-6
_SMALLEST_SCALE: Final = 0.01
_OUTLIER: Final = 4.0
_FOLLOW: Final = 0.05
_ENOUGH: Final = 8
_FEW: Final = 3


class LatencyCurve:
    """Piecewise linear in rows between `knots`, linear in keys, non-decreasing in both.

    The curve is a shape times a speed. The shape is a least-squares fit of relative errors under the constraint
    that no part falls; past the last knot, and where nothing was observed, the slope is that of the neighbouring
    parts. It forgets by parts: about the last `window` observations between two knots count, so steps of one row do
    not wash out what is known about steps of a hundred. The speed follows all steps within tens of them. An
    observation that is off by more than four times the usual error counts for less the further it is off, so that
    a step during which the machine did something else hardly matters.
    """

    def __init__(self, knots: tuple[int, ...] = KNOTS, window: float = 200.0, refit_every: int = 64) -> None:
        self._knots = knots
        self._starts = np.array(knots[:-1], float)
        self._widths = np.diff(np.array(knots, float))
        self._limits = np.append(np.ones(len(knots) - 2), np.inf)
        self._keep = 1 - 1 / window
        self._refit_every = refit_every
        # The unknowns, none below 0: seconds of one row, the rise over each part, seconds of `_KEYS_UNIT` keys.
        size = len(knots) + 1
        self._moments = np.zeros((len(knots), size, size))
        self._targets = np.zeros((len(knots), size))
        self._counts = [0.0] * len(knots)
        self._pending: list[tuple[int, int, int, float, float]] = []
        """Observations since the last fit: part, rows, keys, seconds at the speed of then, weight."""
        self._smooth = self._penalty(size)
        self._values = [0.0] * len(knots)
        self._values_array = np.zeros(len(knots))
        self._table = np.zeros(knots[-1] + 1)
        """Seconds by rows, at a speed of 1 and without keys."""
        self._per_key = 0.0
        self._speed = 1.0
        self._scale = 0.1
        self._most_rows = 0
        self._observed = 0

    def _penalty(self, size: int) -> NDArray[np.float64]:
        """Quadratic form [size, size] that grows with the difference of slopes of neighbouring parts."""
        difference = np.zeros((len(self._widths) - 1, size))
        for part in range(len(self._widths) - 1):
            difference[part, 1 + part] = 1.0
            difference[part, 2 + part] = -self._widths[part] / self._widths[part + 1]
        return _SMOOTH * difference.T @ difference + _RIDGE * np.eye(size)

    @property
    def known(self) -> bool:
        """Whether enough was observed for `seconds` to mean anything; before, it is 0 or a first guess."""
        return self._observed >= _ENOUGH

    @property
    def trusted_rows(self) -> int:
        """Rows up to which the curve may be believed: twice the most that were ever observed."""
        return 2 * self._most_rows

    def has_seen(self, rows: int) -> bool:
        """Whether steps of about so many rows were observed a few times."""
        return bool(self._counts[bisect_right(self._knots, max(rows, 1)) - 1] >= _FEW)

    def seconds(self, rows: int, keys: int) -> float:
        """Estimated seconds of a step of `rows` rows (at least 1) that attend to `keys` keys in all."""
        knots, values = self._knots, self._values
        part = min(max(bisect_right(knots, rows) - 1, 0), len(knots) - 2)
        rise = (values[part + 1] - values[part]) / (knots[part + 1] - knots[part])
        return self._speed * (values[part] + rise * (rows - knots[part]) + self._per_key * keys)

    def seconds_of(self, rows: NDArray[np.int64], keys: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """`seconds` of many numbers of rows at once: [steps] → float64 [steps]."""
        knots, values = self._knots, self._values_array
        slope = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
        beyond = slope * np.maximum(rows - knots[-1], 0)
        found: NDArray[np.float64] = np.interp(rows, knots, values) + beyond + self._per_key * keys
        return found * self._speed

    def seconds_up_to(self, first: int, last: int, keys: int) -> NDArray[np.float64]:
        """`seconds` of `first`, `first` + 1, ... `last` rows (`first` at least 1): float64 [last - first + 1]."""
        table = self._table
        if last >= len(table):
            return self.seconds_of(np.arange(first, last + 1), keys)
        return self._speed * (table[first : last + 1] + self._per_key * keys)

    def observe(self, rows: int, keys: int, seconds: float) -> None:
        """A step of `rows` rows over `keys` keys took `seconds`. What cannot be a step (no rows, no time) is left
        out."""
        if rows < 1 or keys < 0 or not 0 < seconds < float("inf"):
            return
        weight = self._weight(rows, keys, seconds)
        part = bisect_right(self._knots, rows) - 1
        self._pending.append((part, rows, keys, seconds / self._speed, weight))
        self._counts[part] = self._counts[part] * self._keep + 1
        self._observed += 1
        news = rows > self._most_rows or self._counts[part] < _FEW
        self._most_rows = max(self._most_rows, rows)
        if news or self._observed <= 2 * _ENOUGH or len(self._pending) >= self._refit_every:
            self._fit()

    def _weight(self, rows: int, keys: int, seconds: float) -> float:
        """Weight of an observation in the shape, after the speed has followed it. Errors are relative ones."""
        expected = self.seconds(rows, keys)
        if not self.known or expected <= 0 or rows > self.trusted_rows:
            return (self._speed / seconds) ** 2
        error = abs(seconds - expected) / expected
        limit = _OUTLIER * self._scale
        nearest = min(max(seconds / expected, 1 - limit, 0.1), 1 + limit)
        self._speed *= nearest**_FOLLOW
        # A lasting change looks like outliers at first. The usual error grows by a third with each of them until
        # they are the rule.
        self._scale = max(_SMALLEST_SCALE, self._scale + 0.05 * (min(error, 2 * limit) - self._scale))
        return min(1.0, limit / error if error else 1.0) * (self._speed / expected) ** 2

    def _absorb(self) -> None:
        """Add what was observed since the last fit to the sums of its parts."""
        seen = np.array(self._pending)
        self._pending.clear()
        parts, rows, keys, seconds, weights = seen.T
        features = np.ones((len(seen), len(self._knots) + 1))
        rise = np.maximum(rows[:, None] - self._starts, 0.0) / self._widths
        np.minimum(rise, self._limits, out=features[:, 1:-1])
        features[:, -1] = keys / _KEYS_UNIT
        for part in np.unique(parts).astype(int).tolist():
            chosen = parts == part
            ages = np.arange(int(chosen.sum()))[::-1]
            weighted = features[chosen] * (weights[chosen] * self._keep**ages)[:, None]
            forgotten = self._keep ** len(ages)
            self._moments[part] = self._moments[part] * forgotten + weighted.T @ features[chosen]
            self._targets[part] = self._targets[part] * forgotten + seconds[chosen] @ weighted

    def _fit(self) -> None:
        """Solve for the unknowns; those that would fall below 0 are held at 0."""
        self._absorb()
        moments, targets = self._moments.sum(0), self._targets.sum(0)
        moments += self._smooth * (moments[0, 0] / sum(self._counts))
        free = np.arange(len(targets))
        while len(free):
            solved = np.linalg.solve(moments[np.ix_(free, free)], targets[free])
            if solved.min() >= 0:
                break
            free = free[solved > 0]
        found = np.zeros(len(targets))
        found[free] = solved
        self._values_array = np.cumsum(found[:-1])
        self._values = self._values_array.tolist()
        self._table = np.interp(np.arange(len(self._table)), self._knots, self._values_array)
        self._per_key = float(found[-1]) / _KEYS_UNIT
