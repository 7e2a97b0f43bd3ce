"""What this machine's numpy computes, as a short digest.

A BLAS chooses its kernels by processor, and numpy its vector loops, so equal versions do not mean equal bits.
The digest is over the results themselves: fixed inputs through the same products, reductions and functions, in
the shapes of the program.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from tokenloom.kernels.program import Attention, Program
from tokenloom.kernels.reference.attention import SPLIT, HeadShape
from tokenloom.kernels.reference.gemm import COLUMN_UNIT, ROW_TILE, PackedLinear, padded

Float32 = NDArray[np.float32]


def fingerprint(program: Program, linears: list[PackedLinear]) -> str:
    """16 hexadecimal digits. Raises RuntimeError if the BLAS is not fit for row tiles (`check_row_tile`)."""
    digest = hashlib.sha256()
    shapes = sorted({(linear.depth, width) for linear in linears for width in linear.tile_widths})
    for depth, width in shapes:
        digest.update(check_row_tile(fixed_values(ROW_TILE, depth), fixed_values(depth, width)).tobytes())
    for shape in sorted({HeadShape.of(op) for op in program.ops if isinstance(op, Attention)}):
        keys = fixed_values(SPLIT, shape.head_dim)
        scores = check_row_tile(fixed_values(shape.rows, shape.head_dim), keys.T)
        digest.update(scores.tobytes())
        digest.update(check_row_tile(np.exp(scores - np.float32(8)), keys).tobytes())
    for width in sorted({spec.width for spec in program.buffers} | {SPLIT, program.vocab_size}):
        x = fixed_values(ROW_TILE, padded(width, COLUMN_UNIT))[:, :width]
        digest.update(np.add.reduce(x * x, axis=-1).tobytes())
        digest.update(np.add.reduce(np.exp(x), axis=-1).tobytes())
    x = fixed_values(64, 1024)
    for values in (np.exp(x * 10), np.log(np.abs(x) + 1), np.sqrt(np.abs(x)), np.tanh(x)):
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]


def fixed_values(rows: int, columns: int) -> Float32:
    """fp32 [rows, columns] in (-2, 2) from a linear congruential generator: the same on every machine."""
    state = np.arange(1, rows * columns + 1, dtype=np.uint64) * np.uint64(6364136223846793005)
    state ^= state >> np.uint64(29)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    bits = (state >> np.uint64(40)).astype(np.float64)
    return ((bits + 0.5) * 2.0**-22 - 2.0).astype(np.float32).reshape(rows, columns)


def check_row_tile(source: Float32, weight: Float32) -> Float32:
    """source @ weight, after checking that a row's bits depend neither on its place in the tile nor on the
    other rows. Raises RuntimeError otherwise: such a BLAS cannot keep the promise."""
    product: Float32 = np.matmul(source, weight)
    count = len(source)
    for shift in range(1, count):
        turned = np.roll(source, shift, axis=0)
        if not np.array_equal(np.matmul(turned, weight), np.roll(product, shift, axis=0)):
            raise RuntimeError(f"the BLAS of this numpy treats the {count} rows of a product differently")
    alone = np.zeros_like(source)
    alone[0] = source[0]
    if not np.array_equal(np.matmul(alone, weight)[0], product[0]):
        raise RuntimeError("the BLAS of this numpy lets one row of a product change another")
    return product
