"""Fixed-shape products: bits do not depend on the number of rows, also where a plain product's do."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenloom.kernels.reference.gemm import COLUMN_UNIT, ROW_TILE, PackedLinear, column_tile

Float32 = NDArray[np.float32]

# The last four lie on both sides of OpenBLAS's limits for small products and for one block of K.
SHAPES = [(64, 64), (51, 37), (1000, 48), (48, 1000), (256, 704), (1408, 256), (300, 2048)]


def product(packed: PackedLinear, source: Float32) -> Float32:
    out = np.full((len(source), packed.padded_columns), np.nan, np.float32)
    packed.multiply(source, out)
    return out[:, : packed.num_columns]


@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_rows_are_independent(columns: int, depth: int) -> None:
    rng = np.random.default_rng(depth)
    packed = PackedLinear(rng.standard_normal((columns, depth)).astype(np.float32))
    source = rng.standard_normal((256, depth)).astype(np.float32)
    whole = product(packed, source)
    for start in range(0, 64, ROW_TILE):
        tile = source[start : start + ROW_TILE]
        assert (product(packed, tile) == whole[start : start + ROW_TILE]).all()
        assert (product(packed, tile[::-1].copy()) == whole[start : start + ROW_TILE][::-1]).all()
    lonely = np.zeros((ROW_TILE, depth), np.float32)
    lonely[2] = source[77]
    assert (product(packed, lonely)[2] == whole[77]).all()


@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_tiles_are_functions_of_the_shape(columns: int, depth: int) -> None:
    width = column_tile(columns, depth)
    assert width % COLUMN_UNIT == 0
    assert COLUMN_UNIT <= width < columns + COLUMN_UNIT
    assert PackedLinear(np.zeros((columns, depth), np.float32)).tile_widths[0] == width


def test_source_may_be_part_of_a_wider_buffer() -> None:
    rng = np.random.default_rng(0)
    packed = PackedLinear(rng.standard_normal((30, 21)).astype(np.float32))
    buffer = rng.standard_normal((8, 32)).astype(np.float32)
    assert (product(packed, buffer[:, :21]) == product(packed, buffer[:, :21].copy())).all()


def test_rows_must_fill_tiles() -> None:
    packed = PackedLinear(np.zeros((5, 6), np.float32))
    with pytest.raises(ValueError, match="multiple"):
        packed.multiply(np.zeros((3, 6), np.float32), np.empty((3, 16), np.float32))
