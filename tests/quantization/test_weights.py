"""The canonical matrices: what they mean, and what they refuse to be."""

from __future__ import annotations

import numpy as np
import pytest

from tests.quantization.packers import random_parts
from tokenloom.quantization import weights
from tokenloom.quantization.weights import Int4Matrix, Int8Matrix, row_blocks


def small_int8(rows: int = 5, depth: int = 7, seed: int = 0) -> Int8Matrix:
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, (rows, depth)).astype(np.int8)
    return Int8Matrix(q, rng.standard_normal(rows).astype(np.float32))


def small_int4(rows: int = 5, depth: int = 70, group: int = 32, seed: int = 0) -> Int4Matrix:
    q, scales, zeros = random_parts(rows, -(-depth // group) * group, group, seed, zero_from=1)
    return Int4Matrix(q[:, :depth].copy(), scales, zeros, group)


@pytest.mark.parametrize("block", [1, 20, 1 << 22])
def test_dequantised_is_one_product_an_element(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", block)
    eight, four = small_int8(), small_int4()
    for matrix in (eight, four):
        found = matrix.dequantize()
        assert found.dtype == np.float32
        assert found.shape == matrix.shape
        out = np.empty(matrix.shape, np.float32)
        assert matrix.dequantize(out) is out
        assert (out == found).all()
    for n in range(5):
        for k in range(7):
            assert eight.dequantize()[n, k] == np.float32(eight.q[n, k]) * eight.scales[n]
        for k in range(70):
            step = np.float32(int(four.q[n, k]) - int(four.zeros[n, k // 32]))
            assert four.dequantize()[n, k] == step * np.float32(four.scales[n, k // 32])


def test_concatenation_stacks_rows() -> None:
    eights = [small_int8(rows, seed=rows) for rows in (1, 3, 2)]
    fours = [small_int4(rows, seed=rows) for rows in (1, 3, 2)]
    together = Int8Matrix.concatenate(eights)
    assert together.shape == (6, 7)
    assert (together.dequantize() == np.concatenate([m.dequantize() for m in eights])).all()
    wide = Int4Matrix.concatenate(fours)
    assert (wide.shape, wide.group) == ((6, 70), 32)
    assert (wide.dequantize() == np.concatenate([m.dequantize() for m in fours])).all()
    with pytest.raises(ValueError, match="groups"):
        Int4Matrix.concatenate([small_int4(), small_int4(group=64)])
    with pytest.raises(ValueError):
        Int8Matrix.concatenate([small_int8(), small_int8(depth=8)])


def test_sizes() -> None:
    assert small_int8().num_bytes == 5 * 7 + 5 * 4
    assert small_int4().num_bytes == 5 * 35 + 5 * 3 * 3


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("q", np.zeros((2, 3), np.uint8), "q is uint8"),
        ("q", np.zeros((2, 3), np.int16), "q is int16"),
        ("q", np.zeros(3, np.int8), "q is int8"),
        ("scales", np.ones(3, np.float32), "scales is float32"),
        ("scales", np.ones(2, np.float64), "scales is float64"),
        ("scales", np.array([1, np.inf], np.float32), "not finite"),
    ],
)
def test_int8_refuses(field: str, value: np.ndarray, named: str) -> None:
    fields = {"q": np.zeros((2, 3), np.int8), "scales": np.ones(2, np.float32)} | {field: value}
    with pytest.raises(ValueError, match=named):
        Int8Matrix(**fields)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("q", np.full((2, 40), 16, np.uint8), "q has the value 16"),
        ("q", np.zeros((2, 40), np.int8), "q is int8"),
        ("q", np.zeros((2, 65), np.uint8), "scales is"),
        ("scales", np.ones((2, 1), np.float16), "scales is"),
        ("scales", np.ones((2, 2), np.float32), "scales is float32"),
        ("scales", np.full((2, 2), np.nan, np.float16), "not finite"),
        ("zeros", np.full((2, 2), 17, np.uint8), "zeros has the value 17"),
        ("zeros", np.zeros((1, 2), np.uint8), "zeros is"),
        ("group", 48, "group is 48"),
        ("group", -1, "group is -1"),
    ],
)
def test_int4_refuses(field: str, value: object, named: str) -> None:
    fields = {
        "q": np.zeros((2, 40), np.uint8),
        "scales": np.ones((2, 2), np.float16),
        "zeros": np.full((2, 2), 16, np.uint8),
        "group": 32,
    }
    Int4Matrix(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=named):
        Int4Matrix(**(fields | {field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (10, 3), (7, 0), (9,), (5, 2, 2)])
def test_row_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", 8)
    rows = np.arange(shape[0])
    assert np.concatenate([rows[:0], *(rows[block] for block in row_blocks(shape))]).tolist() == rows.tolist()
