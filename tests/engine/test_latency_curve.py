"""The fitted curve of step times against machines that are known."""

from __future__ import annotations

import random
from math import inf, nan
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.engine.policies.latency_curve import LatencyCurve
from tokenloom.runtime.simulated import CostModel

MACHINE = CostModel(memory_bound=0.020, per_row=0.0005, per_key=2e-8, fixed=0.001)


def taught(curve: LatencyCurve, machine: CostModel, count: int, noise: float = 0.02, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        rows = int(2 ** rng.uniform(0, 9))
        keys = rows * rng.randrange(10, 3000)
        curve.observe(rows, keys, machine.seconds(rows, keys) * rng.gauss(1, noise))


def errors(curve: LatencyCurve, machine: CostModel) -> list[float]:
    """Relative errors over the range; the knee of the machine lies between two knots."""
    found = []
    for rows in (1, 2, 3, 6, 8, 16, 24, 32, 64, 100, 128, 256, 400, 512):
        for keys in (0, 100 * rows, 2000 * rows):
            true = machine.seconds(rows, keys)
            found.append(abs(curve.seconds(rows, keys) - true) / true)
    return found


def test_it_learns_a_machine() -> None:
    curve = LatencyCurve()
    assert not curve.known
    taught(curve, MACHINE, 600)
    assert curve.known
    assert np.mean(errors(curve, MACHINE)) < 0.03
    assert max(errors(curve, MACHINE)) < 0.1


def test_outliers_hardly_matter() -> None:
    curve = LatencyCurve()
    rng = random.Random(3)
    for i in range(1500):
        rows = int(2 ** rng.uniform(0, 8))
        seconds = MACHINE.seconds(rows, rows * 100) * rng.gauss(1, 0.02)
        curve.observe(rows, rows * 100, seconds * (20 if i % 25 == 0 else 1))
    for rows in (1, 8, 40, 200):
        assert curve.seconds(rows, rows * 100) == pytest.approx(MACHINE.seconds(rows, rows * 100), rel=0.1)


def test_a_machine_that_slows_down_is_followed() -> None:
    curve = LatencyCurve()
    taught(curve, MACHINE, 600)
    slow = CostModel(memory_bound=0.045, per_row=0.001, per_key=4e-8, fixed=0.002)
    taught(curve, slow, 100, seed=1)
    assert np.mean(errors(curve, slow)) < 0.1
    taught(curve, MACHINE, 100, seed=2)
    assert np.mean(errors(curve, MACHINE)) < 0.1


def test_a_new_shape_is_learned_too() -> None:
    curve = LatencyCurve(window=50)
    taught(curve, MACHINE, 600)
    other = CostModel(memory_bound=0.002, per_row=0.001, per_key=4e-8, fixed=0.002)
    taught(curve, other, 3000, seed=1)
    assert np.mean(errors(curve, other)) < 0.1


def test_steps_of_one_row_do_not_wash_out_the_others() -> None:
    curve = LatencyCurve()
    taught(curve, MACHINE, 600)
    for _ in range(20_000):
        curve.observe(1, 500, MACHINE.seconds(1, 500))
    assert curve.seconds(256, 25_600) == pytest.approx(MACHINE.seconds(256, 25_600), rel=0.1)
    assert curve.seconds(1, 500) == pytest.approx(MACHINE.seconds(1, 500), rel=0.02)


def test_unobserved_parts_go_on_as_their_neighbours() -> None:
    curve = LatencyCurve()
    for _ in range(50):
        curve.observe(1, 10, 0.020)
        curve.observe(512, 5120, 0.250)
    middle = curve.seconds(256, 2560)
    assert 0.1 < middle < 0.18
    assert curve.trusted_rows == 1024
    assert curve.seconds(4096, 40_960) > 1.5


@given(
    st.lists(
        st.tuples(st.integers(1, 3000), st.integers(0, 10**7), st.floats(1e-6, 100.0)),
        min_size=1,
        max_size=60,
    )
)
def test_it_never_falls_and_is_never_negative(steps: list[tuple[int, int, float]]) -> None:
    curve = LatencyCurve()
    for step in steps:
        curve.observe(*step)
    rows = np.array([1, 2, 3, 5, 9, 17, 33, 70, 150, 300, 600, 1024, 1025, 5000])
    seconds = curve.seconds_of(rows, 1000)
    assert np.all(np.isfinite(seconds)) and np.all(seconds >= 0)
    assert np.all(np.diff(seconds) >= -1e-12)
    assert np.all(curve.seconds_of(rows, 100_000) >= seconds - 1e-12)
    assert seconds.tolist() == pytest.approx([curve.seconds(int(row), 1000) for row in rows])


def test_what_cannot_be_a_step_is_left_out() -> None:
    curve = LatencyCurve()
    taught(curve, MACHINE, 100)
    before = curve.seconds(8, 800)
    for step in (
        (0, 0, 0.1),
        (-1, 0, 0.1),
        (8, -5, 0.1),
        (8, 800, 0.0),
        (8, 800, -1.0),
        (8, 800, nan),
        (8, 8, inf),
    ):
        curve.observe(*step)
    assert curve.seconds(8, 800) == before


def test_an_observation_is_cheap() -> None:
    curve = LatencyCurve()
    taught(curve, MACHINE, 200)

    def seconds() -> float:
        started = perf_counter()
        taught(curve, MACHINE, 400)
        return (perf_counter() - started) / 400

    # 30 us with the fits that fall due are wanted; the factor is for a busy machine.
    assert min(seconds() for _ in range(5)) < 120e-6
