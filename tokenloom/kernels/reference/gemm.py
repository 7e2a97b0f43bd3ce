"""Linear layers as matrix products of one fixed shape.

A BLAS picks its kernel, its blocking and thereby its order of additions by the shape of the call. So every
call here multiplies `ROW_TILE` rows by one column tile of the weight: a row's bits cannot depend on how many
rows the batch has. Rows are padded to a multiple of `ROW_TILE`; what stands in the other rows of a tile, and
where in its tile a row stands, does not enter its products (`fingerprint` probes that at load).

The column tiles are so wide that a call stays below OpenBLAS's limit for its small-matrix kernels, which
read the weight in place: on AVX-512 they reach the machine's peak with 4 rows, and there each element is one
chain of fused multiply-adds over K in order, which is the contract's order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

ROW_TILE = 4
COLUMN_UNIT = 16
"""Widths are padded to this many columns: a vector register of AVX-512."""

_SMALL_PRODUCT = 1_000_000
_CACHED_ELEMENTS = 1 << 17
"""A column tile of 512 KiB stays in the second-level cache while the row tiles pass over it."""


def padded(count: int, unit: int) -> int:
    """`count` rounded up to a multiple of `unit`."""
    return -(-count // unit) * unit


def column_tile(num_columns: int, depth: int) -> int:
    """Columns per call for a weight of [num_columns, depth]; a function of the shape alone."""
    most = min(_SMALL_PRODUCT // (ROW_TILE * depth), _CACHED_ELEMENTS // depth)
    return min(max(most // COLUMN_UNIT, 1) * COLUMN_UNIT, padded(num_columns, COLUMN_UNIT))


class PackedLinear:
    """A weight [N, K] as column tiles: [N // width, K, width] and, for the rest, [K, rest].

    Held in fp32 whatever the checkpoint's format, because the BLAS has no other. The columns are padded with
    zeros to a multiple of `COLUMN_UNIT`.
    """

    def __init__(self, weight: Float32) -> None:
        self.num_columns, self.depth = weight.shape
        self.padded_columns = padded(self.num_columns, COLUMN_UNIT)
        self.tile = column_tile(self.num_columns, self.depth)
        count = self.padded_columns // self.tile
        self._split = count * self.tile
        self._tiles = np.zeros((count, 1, self.depth, self.tile), np.float32)
        for i in range(count):
            rows = weight[i * self.tile : (i + 1) * self.tile]
            self._tiles[i, 0, :, : len(rows)] = rows.T
        rest = self.padded_columns - self._split
        self._rest: Float32 | None = None
        if rest:
            self._rest = np.zeros((self.depth, rest), np.float32)
            self._rest[:, : self.num_columns - self._split] = weight[self._split :].T

    @property
    def tile_widths(self) -> tuple[int, ...]:
        """The widths of the products that a multiplication is made of."""
        rest = () if self._rest is None else (self._rest.shape[1],)
        return (self.tile,) * min(len(self._tiles), 1) + rest

    def multiply(self, source: Float32, out: Float32) -> None:
        """out[:, :N] = source @ weight.T; source [R, K], out [R, padded_columns], R a multiple of `ROW_TILE`.

        Inner strides must be one element; the rows may lie apart.
        """
        rows = len(source)
        if rows % ROW_TILE:
            raise ValueError(f"{rows} rows are no multiple of {ROW_TILE}")
        blocks = source.reshape(rows // ROW_TILE, ROW_TILE, self.depth)
        targets = out.reshape(rows // ROW_TILE, ROW_TILE, self.padded_columns)
        count, tile = len(self._tiles), self.tile
        if count == 1:
            np.matmul(blocks, self._tiles[0], out=targets[:, :, :tile])
        else:
            head = targets[:, :, : self._split].reshape(len(blocks), ROW_TILE, count, tile)
            np.matmul(blocks, self._tiles, out=head.transpose(2, 0, 1, 3))
        if self._rest is not None:
            np.matmul(blocks, self._rest, out=targets[:, :, self._split :])
