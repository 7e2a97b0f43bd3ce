"""When requests are due when no trace says so."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import numpy as np


def arrival_times(rate: float, burstiness: float = 1.0, seed: int = 0) -> Iterator[float]:
    """Seconds at which requests arrive, without end; all 0 where `rate` (requests per second) is infinite.

    The gaps are independent draws of a gamma distribution with mean 1 / rate and shape `burstiness`: 1 makes
    a Poisson process, less is burstier, more is more even, infinity is a metronome. Nothing is rescaled, so
    that n requests take n / rate seconds on average only.
    """
    rng = np.random.default_rng([seed, 0])
    now = 0.0
    while True:
        if rate != inf:
            now += 1 / rate if burstiness == inf else float(rng.gamma(burstiness, 1 / (rate * burstiness)))
        yield now
