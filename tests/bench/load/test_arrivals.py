"""Arrivals have the law they claim; the distribution functions are written out here."""

from __future__ import annotations

from itertools import islice
from math import exp, factorial, inf, sqrt

import numpy as np
import pytest

from tokenloom.bench.load.arrivals import arrival_times
from tokenloom.bench.load.workload import random_lengths

COUNT = 5000


def gaps(rate: float, burstiness: float = 1.0, seed: int = 0) -> np.ndarray:
    times = np.array(list(islice(arrival_times(rate, burstiness, seed), COUNT)))
    return np.diff(times, prepend=0.0)


def erlang(shape: int, rate: float, x: float) -> float:
    """Distribution function of the gamma law with a whole shape (mean shape / rate)."""
    return 1 - exp(-rate * x) * sum((rate * x) ** k / factorial(k) for k in range(shape))


def kolmogorov_smirnov(values: np.ndarray, law: object) -> float:
    """sqrt(n) times the largest distance between the empirical and the given distribution function."""
    ordered = np.sort(values)
    expected = np.array([law(x) for x in ordered])  # type: ignore[operator]
    n = len(ordered)
    above = np.arange(1, n + 1) / n - expected
    below = expected - np.arange(n) / n
    return sqrt(n) * max(above.max(), below.max())


# P(sqrt(n) D > 1.95) is 0.001 (Kolmogorov's limit law: 2 exp(-2 x^2)).
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [1, 2, 5])
def test_gaps_follow_the_gamma_law_with_the_mean_asked_for(shape: int, seed: int) -> None:
    values = gaps(4.0, shape, seed)
    assert kolmogorov_smirnov(values, lambda x: erlang(shape, 4.0 * shape, x)) < 1.95
    # A law that is ten per cent off is found out.
    assert kolmogorov_smirnov(values, lambda x: erlang(shape, 4.4 * shape, x)) > 1.95


def test_burstiness_below_one_has_the_right_mean_and_variance() -> None:
    values = gaps(10.0, 0.25)
    assert values.mean() == pytest.approx(0.1, rel=0.1)
    assert values.std() / values.mean() == pytest.approx(2.0, rel=0.1)


def test_gaps_are_independent() -> None:
    values = gaps(1.0)
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / sqrt(COUNT)


def test_infinity_is_all_at_once_or_a_metronome() -> None:
    assert list(islice(arrival_times(inf), 5)) == [0.0] * 5
    assert list(islice(arrival_times(4.0, inf), 3)) == [0.25, 0.5, 0.75]


def test_a_seed_is_a_sequence() -> None:
    assert (gaps(1.0, seed=7) == gaps(1.0, seed=7)).all()
    assert (gaps(1.0, seed=7) != gaps(1.0, seed=8)).all()


def test_random_lengths_reach_both_ends() -> None:
    pairs = list(random_lengths(4000, 20, 10, 0.5, 3))
    assert {prompt for prompt, _ in pairs} == set(range(10, 31))
    assert {output for _, output in pairs} == set(range(5, 16))
    assert pairs == list(random_lengths(4000, 20, 10, 0.5, 3))
    assert set(random_lengths(10, 20, 10, 0.0, 3)) == {(20, 10)}
