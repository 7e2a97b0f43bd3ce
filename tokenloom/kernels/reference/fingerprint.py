"""What this machine's numpy computes: fit for the promise or not, and as a short digest.

A BLAS chooses its kernels by processor, and numpy its vector loops, so equal versions do not mean equal bits.
The digest is over the results themselves: fixed inputs through the same products, reductions and functions,
in the shapes of the program. On the way it is checked that a row's bits do not depend on its neighbours, on
its place or on its address in memory; that holds for OpenBLAS and numpy's own loops, but no standard demands
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.program import SPLIT, Attention, Program
from tokenloom.kernels.reference.attention import HeadShape
from tokenloom.kernels.reference.gemm import COLUMN_UNIT, ROW_TILE, PackedLinear, padded

Float32 = NDArray[np.float32]


def fingerprint(program: Program, linears: list[PackedLinear]) -> str:
    """16 hexadecimal digits. Raises `UnsupportedFeature` if this numpy cannot keep rows independent."""
    digest = hashlib.sha256()
    shapes = sorted({(linear.depth, width) for linear in linears for width in linear.tile_widths})
    for depth, width in shapes:
        digest.update(check_product(fixed_values(ROW_TILE, depth), fixed_values(depth, width)).tobytes())
    for shape in sorted({HeadShape.of(op) for op in program.ops if isinstance(op, Attention)}):
        keys = fixed_values(SPLIT, shape.head_dim)
        scores = check_product(fixed_values(shape.rows, shape.head_dim), keys.T)
        digest.update(scores.tobytes())
        digest.update(check_product(np.exp(-np.abs(scores)), keys).tobytes())
    for width in sorted({spec.width for spec in program.buffers} | {SPLIT, program.vocab_size}):
        x = fixed_values(ROW_TILE + 1, padded(width, COLUMN_UNIT))[:, :width]
        digest.update(check_rows(lambda rows: np.add.reduce(rows * rows, axis=-1), x).tobytes())
        digest.update(check_rows(lambda rows: np.exp(rows * np.float32(10)), x).tobytes())
        digest.update(check_rows(lambda rows: np.tanh(np.log(np.abs(rows))), x).tobytes())
    return digest.hexdigest()[:16]


def fixed_values(rows: int, columns: int) -> Float32:
    """fp32 [rows, columns] in (-2, 2), the same on every machine: scrambled counters."""
    state = np.arange(1, rows * columns + 1, dtype=np.uint64) * np.uint64(6364136223846793005)
    state ^= state >> np.uint64(29)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    bits = (state >> np.uint64(40)).astype(np.float64)
    return ((bits + 0.5) * 2.0**-22 - 2.0).astype(np.float32).reshape(rows, columns)


def check_product(source: Float32, weight: Float32) -> Float32:
    """source @ weight, if turning its rows, zeroing the others and moving all to another address changes no
    bit of a row. Raises `UnsupportedFeature` otherwise."""
    product: Float32 = np.matmul(source, weight)
    same = all(
        np.array_equal(np.matmul(np.roll(source, shift, axis=0), weight), np.roll(product, shift, axis=0))
        for shift in range(1, len(source))
    )
    alone = np.zeros_like(source)
    alone[0] = source[0]
    same &= np.array_equal(np.matmul(alone, weight)[0], product[0])
    moved = _moved(np.zeros_like(product))
    np.matmul(_moved(source), weight, out=moved)
    if not (same and np.array_equal(moved, product)):
        raise UnsupportedFeature(
            f"this numpy's matrix product ({len(source)} x {source.shape[1]} x {weight.shape[1]})",
            "it lets one row change another's bits; numpy from PyPI, with OpenBLAS, does not",
        )
    return product


def check_rows(function: Callable[[Float32], Float32], rows: Float32) -> Float32:
    """function(rows), if each row alone, at another address, gives the same bits. Raises
    `UnsupportedFeature` otherwise."""
    together = function(rows)
    for i in range(len(rows)):
        if not np.array_equal(function(_moved(rows[i : i + 1])), together[i : i + 1]):
            raise UnsupportedFeature("this numpy", "its vector loops give a row other bits when it is alone")
    return together


def _moved(values: Float32) -> Float32:
    """A copy that begins one element past an allocation's start."""
    copy = np.empty(values.size + 1, np.float32)[1:].reshape(values.shape)
    copy[...] = values
    return copy
