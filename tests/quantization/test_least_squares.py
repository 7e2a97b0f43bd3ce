"""The fitted int4 against its own specification, number by number, and against plain rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.errors import ModelError
from tokenloom.quantization import least_squares, round_to_nearest

F = np.float32


def folded(values: list[F]) -> F:
    while len(values) > 1:
        half = len(values) // 2
        values = [values[i] + values[half + i] for i in range(half)]
    return values[0]


def specified(group: list[F]) -> tuple[list[int], np.float16, int]:
    """q, scale and zero of one group, one operation after the other."""
    low, high = min(*group, F(0)), max(*group, F(0))
    step = (high - low) / F(15)
    step = F(1) if step == 0 else step
    best = None
    for whole in (np.floor, np.ceil):
        zero = min(max(whole(-low / step), F(0)), F(15))
        scale = F(np.float16(step))
        scale = F(1) if scale == 0 else scale

        def steps(scale: F, zero: F = zero) -> list[F]:
            return [min(max(np.rint(w / scale), -zero), F(15) - zero) for w in group]

        for _ in range(2):
            u = steps(scale)
            with np.errstate(all="ignore"):
                fitted = F(
                    np.float16(
                        folded([w * x for w, x in zip(group, u, strict=True)]) / folded([x * x for x in u])
                    )
                )
            scale = fitted if np.isfinite(fitted) and fitted != 0 else scale
        u = steps(scale)
        errors = [w - x * scale for w, x in zip(group, u, strict=True)]
        loss = folded([error * error for error in errors])
        if best is None or loss < best[0]:
            best = loss, [int(x + zero) for x in u], np.float16(scale), int(zero)
    assert best is not None
    return best[1:]


def check(weight: np.ndarray) -> None:
    found = least_squares.int4(weight)
    for row in range(len(weight)):
        for group in range(weight.shape[1] // 32):
            inputs = slice(32 * group, 32 * group + 32)
            q, scale, zero = specified(list(weight[row, inputs]))
            assert found.q[row, inputs].tolist() == q
            assert (found.scales[row, group], found.zeros[row, group]) == (scale, zero)


@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=32, max_size=32),
    scale=st.sampled_from([1.0, 1e-3, 1e-6, 0.0]),
)
def test_every_operation_is_the_specified_one(values: list[float], scale: float) -> None:
    check((np.array([values], np.float32) * np.float32(scale)).astype(np.float32))


def test_matrices() -> None:
    rng = np.random.default_rng(0)
    check((rng.standard_normal((3, 96)) * 0.1).astype(np.float32))
    check(np.abs(rng.standard_normal((2, 32))).astype(np.float32))
    check(-np.abs(rng.standard_normal((2, 32))).astype(np.float32))


def test_it_loses_less_than_plain_rounding() -> None:
    rng = np.random.default_rng(1)
    # 4-bit codes on grids of their own, as Q4_K has them.
    steps = rng.uniform(0.5, 1.5, (200, 8, 1)).astype(np.float32)
    lows = steps * rng.uniform(4, 12, (200, 8, 1)).astype(np.float32)
    weight = (rng.integers(0, 16, (200, 8, 32)) * steps - lows).reshape(200, 256).astype(np.float32)
    losses = [
        float(((matrix.dequantize() - weight) ** 2).mean())
        for matrix in (least_squares.int4(weight), round_to_nearest.int4(weight, 32))
    ]
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e6])
def test_values_that_have_no_scale(value: float) -> None:
    weight = np.ones((2, 64), np.float32)
    weight[1, 40] = value
    with pytest.raises(ModelError, match="w1 with values"):
        least_squares.int4(weight, "w1")
