"""Matrices as GGUF stores them, in blocks along a row, and what becomes of them.

A block holds 32 or 256 numbers with scales of its own. Our forms are int8 with one scale a row, and int4 in groups
with a scale and a whole zero. Q4_0 is such an int4 already and keeps its values; all other types lose a little on
the way, unless they are widened to float32, which keeps the values that the `gguf` package gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tokenloom.errors import ModelError, UnsupportedFeature
from tokenloom.gguf.types import TensorType
from tokenloom.quantization import least_squares, round_to_nearest
from tokenloom.quantization.weights import Float16, Float32, Int4Matrix, Int8Matrix, UInt8, row_blocks

GROUP: Final = least_squares.GROUP
"""Inputs that share a scale in the 4-bit types, and in the int4 that they become."""

_FOUR_BITS: Final = ("Q4_0", "Q4_1", "Q4_K")
_ZERO: Final = 8


def check_available() -> None:
    """Raise `UnsupportedFeature` where the `gguf` package, which knows the values of blocks, is missing."""
    _library()


@dataclass(frozen=True, slots=True, eq=False)
class BlockMatrix:
    """`data` uint8 [N, bytes of a row] in blocks of `kind`; `name` is the tensor's, for errors.

    Slices of rows are float32, as those of an array: so it is rounded without being widened as a whole.
    """

    data: UInt8
    kind: TensorType
    name: str

    ndim = 2
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.data), self.data.shape[1] // self.kind.block_bytes * self.kind.block

    @property
    def has_four_bits(self) -> bool:
        """Whether int4 in groups of 32 has as many bits."""
        return self.kind.name in _FOUR_BITS

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: slice) -> Float32:
        quants, types = _library()
        # A scale may be anything in a broken file; what it makes is looked at by whoever rounds.
        with np.errstate(all="ignore"):
            values: Float32 = quants.dequantize(self.data[rows], types(self.kind.number))
        return values

    def dequantize(self, out: Float32 | None = None) -> Float32:
        """float32 [N, K], the very values of the blocks. Written to `out` where it is given."""
        result = np.empty(self.shape, np.float32) if out is None else out
        for rows in row_blocks(self.shape):
            result[rows] = self[rows]
        return result

    def int8(self) -> Int8Matrix:
        """Rounded to one scale a row. Raises `ModelError` for a value that is not finite."""
        return round_to_nearest.int8(self, self.name)

    def int4(self, group: int = GROUP) -> Int4Matrix:
        """In groups of `group`. For groups of 32, Q4_0 keeps every value, and the others of 4 bits, which have a
        minimum where we have a whole zero, are fitted (`least_squares`). All else is rounded to the nearest step.
        Raises `ModelError` for a value that is not finite."""
        if group != GROUP or not self.has_four_bits:
            return round_to_nearest.int4(self, group, self.name)
        if self.kind.name != "Q4_0":
            return least_squares.int4(self, self.name)
        q = np.empty(self.shape, np.uint8)
        scales = np.empty((len(self), self.shape[1] // GROUP), np.float16)
        for rows in row_blocks(self.shape):
            scales[rows], q[rows] = _split_q4_0(self.data[rows], self.kind)
        try:
            return Int4Matrix(q, scales, np.full_like(scales, _ZERO, np.uint8), GROUP)
        except ValueError as error:
            raise ModelError(f"{self.name}: {error}", "finite scales") from None


def _split_q4_0(data: UInt8, kind: TensorType) -> tuple[Float16, UInt8]:
    """Scales [n, groups] and q [n, K] of rows: a block is a float16 and 16 bytes, whose low nibbles come first."""
    blocks = data.reshape(len(data), -1, kind.block_bytes)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0]
    codes = blocks[:, :, 2:]
    return scales, np.concatenate([codes & 15, codes >> 4], axis=2).reshape(len(data), -1)


def _library() -> tuple[Any, Any]:
    """`gguf.quants` and its type of types."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise UnsupportedFeature("a GGUF file", f"pip install 'tokenloom[gguf]' ({error})") from None
    return quants, GGMLQuantizationType
