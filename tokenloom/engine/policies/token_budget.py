"""The token budget of a step from a measured profile of step times.

Section 4 of the Sarathi-Serve paper (OSDI 2024): the budget is the largest number of rows whose step still meets
the target for the time between tokens, rounded down to a tile of the matrix kernels, since a row past a tile
costs a whole tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenloom.errors import InvalidParameter


def choose_budget(profile: Sequence[tuple[int, float]], target_seconds: float, tile: int = 16) -> int:
    """Rows per step, a multiple of `tile` (at least one tile), within the profiled range.

    `profile` is (rows, seconds) as measured; times between two points are interpolated, and a time that falls with
    more rows is taken as noise: the curve is made to rise. Raises `InvalidParameter` for an empty profile or a
    target that is not positive.
    """
    if not profile:
        raise InvalidParameter("profile", [], "at least one (rows, seconds) pair")
    if not target_seconds > 0:
        raise InvalidParameter("target_seconds", target_seconds, "above 0")
    points = sorted(profile)
    rows = np.array([point[0] for point in points], float)
    seconds = np.maximum.accumulate(np.array([point[1] for point in points], float))
    candidates = np.arange(tile, max(int(rows[-1]), tile) + 1, tile)
    within = candidates[np.interp(candidates, rows, seconds) <= target_seconds]
    return int(within[-1]) if len(within) else tile
