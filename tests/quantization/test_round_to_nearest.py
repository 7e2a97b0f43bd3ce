"""Rounding against a loop over single numbers, written from the specification."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenloom.errors import ModelError
from tokenloom.quantization import weights
from tokenloom.quantization.round_to_nearest import int4, int8

F32, F16 = np.float32, np.float16
TYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16]


def half_even(value: np.float32) -> int:
    """The nearest whole number of one float, without numpy."""
    return round(float(value))


def slow_int8(weight: np.ndarray) -> tuple[list[list[int]], list[np.float32]]:
    rows, scales = [], []
    for row in weight.astype(F32):
        scale = F32(max((abs(w) for w in row), default=F32(0))) / F32(127)
        if scale < F32(2.0**-126):
            scale = F32(1)
        rows.append([min(max(half_even(w / scale), -127), 127) for w in row])
        scales.append(scale)
    return rows, scales


def slow_int4(weight: np.ndarray, group: int) -> tuple[list[list[int]], list[list[Any]], list[list[int]]]:
    rows, scales, zeros = [], [], []
    for row in weight.astype(F32):
        q, row_scales, row_zeros = [], [], []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            low, high = min(F32(0), *part), max(F32(0), *part)
            scale16 = F16((high - low) / F32(15))
            if scale16 == 0:
                scale16 = F16(1)
            scale = F32(scale16)
            zero = min(max(half_even(-low / scale), 0), 15)
            q += [min(max(half_even(w / scale) + zero, 0), 15) for w in part]
            row_scales.append(scale16)
            row_zeros.append(zero)
        rows.append(q)
        scales.append(row_scales)
        zeros.append(row_zeros)
    return rows, scales, zeros


def hard_rows(depth: int) -> np.ndarray:
    """Rows that reach every branch: ties, zeros, one sign only, tiny and large numbers."""
    rng = np.random.default_rng(3)
    ties = (np.arange(depth) % 255 - 127) / 2
    return np.stack(
        [
            rng.standard_normal(depth),
            np.zeros(depth),
            np.abs(rng.standard_normal(depth)) + 0.5,
            -np.abs(rng.standard_normal(depth)) - 0.5,
            ties,
            rng.standard_normal(depth) * 1e-7,
            rng.standard_normal(depth) * 6e4,
            np.where(np.arange(depth) == depth // 2, 3.0, 0.0),
        ]
    )


@pytest.mark.parametrize("block", [50, 1 << 22])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("depth", [1, 31, 64, 200])
def test_int8_is_the_loop(monkeypatch: pytest.MonkeyPatch, depth: int, dtype: Any, block: int) -> None:
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", block)
    weight = hard_rows(depth).clip(-6e4, 6e4).astype(dtype)
    matrix = int8(weight)
    q, scales = slow_int8(weight)
    assert matrix.q.tolist() == q
    assert (matrix.scales == np.array(scales, F32)).all()


@pytest.mark.parametrize("block", [50, 1 << 22])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("depth", "group"), [(1, 32), (32, 32), (70, 32), (64, 64), (200, 64), (200, 128)])
def test_int4_is_the_loop(
    monkeypatch: pytest.MonkeyPatch, depth: int, group: int, dtype: Any, block: int
) -> None:
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", block)
    weight = hard_rows(depth).clip(-6e4, 6e4).astype(dtype)
    matrix = int4(weight, group)
    q, scales, zeros = slow_int4(weight, group)
    assert matrix.q.tolist() == q
    assert matrix.scales.tolist() == np.array(scales, F16).tolist()
    assert matrix.zeros.tolist() == zeros


numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-(2.0**-100), 2.0**-100, width=32)
matrices = hnp.arrays(F32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=numbers)


@settings(max_examples=100)
@given(matrices)
def test_int8_of_any_numbers(weight: np.ndarray) -> None:
    matrix = int8(weight)
    q, scales = slow_int8(weight)
    assert matrix.q.tolist() == q
    assert matrix.scales.tolist() == np.array(scales, F32).tolist()
    # Half a step, and what three roundings of 2^-24 add to 127 steps.
    error = np.abs(matrix.dequantize().astype(np.float64) - weight)
    assert (error <= matrix.scales[:, None].astype(np.float64) * (0.5 + 127 * 2.0**-22)).all()


@settings(max_examples=100)
@given(
    hnp.arrays(F32, st.tuples(st.integers(1, 3), st.integers(1, 70)), elements=st.floats(-4e5, 4e5, width=32))
)
def test_int4_of_any_numbers(weight: np.ndarray) -> None:
    matrix = int4(weight, 32)
    q, scales, zeros = slow_int4(weight, 32)
    assert matrix.q.tolist() == q
    assert matrix.scales.tolist() == np.array(scales, F16).tolist()
    assert matrix.zeros.tolist() == zeros
    assert (matrix.dequantize()[weight == 0] == 0).all()


def test_views_that_are_not_contiguous() -> None:
    weight = np.random.default_rng(0).standard_normal((70, 9)).astype(F32)
    for rounded in (int8, int4):
        turned, copied = rounded(weight.T), rounded(np.ascontiguousarray(weight.T))
        assert (turned.q == copied.q).all()
        assert (turned.scales == copied.scales).all()


def test_rounding_again_changes_little_and_8_bits_beat_4() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 128)).astype(F32)
    eight, four = int8(weight).dequantize(), int4(weight).dequantize()
    assert np.abs(eight - weight).max() < 0.02 < np.abs(four - weight).max() < 0.4
    assert (int8(eight).q == int8(weight).q).all()


@pytest.mark.parametrize("rounded", [int8, int4])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(rounded: Any, bad: float) -> None:
    weight = np.ones((3, 40), F32)
    weight[1, 35] = bad
    with pytest.raises(ModelError, match=r"some\.weight with the value (nan|-?inf)"):
        rounded(weight, name="some.weight")


def test_groups_that_are_too_wide_for_their_scale() -> None:
    weight = np.zeros((2, 40), F32)
    weight[1, 3] = 1e6
    with pytest.raises(ModelError, match=r"some\.weight with values from 0 to 1e\+06.*int4"):
        int4(weight, name="some.weight")
    weight[1, 3], weight[1, 4] = 3e38, -3e38
    with pytest.raises(ModelError, match="int4"):
        int4(weight)
    assert int8(weight).q[1, 3] == 127


@pytest.mark.parametrize("rounded", [int8, int4])
@pytest.mark.parametrize("weight", [np.zeros((2, 2)), np.zeros(3, F32), np.zeros((2, 2), np.int32)])
def test_what_is_no_matrix_of_floats(rounded: Any, weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no matrix of floats"):
        rounded(weight)


def test_unknown_groups() -> None:
    with pytest.raises(ValueError, match="group is 16"):
        int4(np.zeros((2, 32), F32), 16)
