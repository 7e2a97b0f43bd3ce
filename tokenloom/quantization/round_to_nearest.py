"""Rounding of a weight matrix to 8 or 4 bits without any data: each number to the nearest step of its scale.

Every operation below is one IEEE 754 operation in the format that is named, rounded to nearest, ties to even;
`rint` rounds to the nearest whole number, ties to even. So any other implementation can be compared with `==`.
Round-to-nearest is the baseline of the literature (GPTQ, Frantar et al. 2023, section 5; AWQ, Lin et al. 2024,
section 3); the asymmetric quantiser in groups is that of AWQ, except that 0 always lies in the range.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.quantization.weights import (
    GROUPS,
    Float16,
    Float32,
    Int4Matrix,
    Int8Matrix,
    UInt8,
    num_groups,
    row_blocks,
)

DEFAULT_GROUP: Final = 64

_SMALLEST_NORMAL: Final = np.finfo(np.float32).tiny
_LARGEST_SCALE: Final = float(np.finfo(np.float16).max)


class Rows(Protocol):
    """A matrix of which slices of rows are read: an array, or one that is widened as it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...


def int8(weight: Rows, name: str = "weight") -> Int8Matrix:
    """`weight` [N, K] of float32, bfloat16 or float16, symmetric, one scale a row.

    Per row, all in fp32 (a narrower weight is widened first, which is exact):
        largest = max |w|
        scale   = largest / 127; where that is below 2^-126, the smallest normal number (a row of zeros
                  among others), scale = 1
        q       = clip(rint(w / scale), -127, 127)
    Raises `ModelError`, with `name`, for a value that is not finite.
    """
    _check_weight(weight)
    q = np.empty(weight.shape, np.int8)
    scales = np.empty(len(weight), np.float32)
    for rows in row_blocks(weight.shape):
        block = weight[rows].astype(np.float32)
        largest = np.abs(block).max(axis=1, initial=0)
        _check_finite(largest, name)
        scale = largest / np.float32(127)
        scale[scale < _SMALLEST_NORMAL] = 1
        scales[rows] = scale
        block /= scale[:, None]
        np.rint(block, out=block)
        np.clip(block, -127, 127, out=block)
        q[rows] = block
    return Int8Matrix(q, scales)


def int4(weight: Rows, group: int = DEFAULT_GROUP, name: str = "weight") -> Int4Matrix:
    """`weight` [N, K] of float32, bfloat16 or float16, asymmetric, one scale and zero for `group` inputs.

    `group` is one of `GROUPS`; the last group of a row is shorter where K is no multiple. Per group, in fp32
    but for the scale:
        low   = min(min w, 0); high = max(max w, 0)
        scale = float16((high - low) / 15), used as fp32 from here on; where that is 0 (a group of zeros among
                others), scale = 1
        zero  = clip(rint(-low / scale), 0, 15)
        q     = clip(rint(w / scale) + zero, 0, 15)
    A weight of 0 stays 0. Raises `ModelError`, with `name`, for a value that is not finite, and for a group
    whose scale is too large for float16; ValueError for another `group`.
    """
    _check_weight(weight)
    if group not in GROUPS:
        raise ValueError(f"group is {group}, none of {GROUPS}")
    depth = weight.shape[1]
    groups = num_groups(depth, group)
    q = np.empty(weight.shape, np.uint8)
    scales = np.empty((len(weight), groups), np.float16)
    zeros = np.empty((len(weight), groups), np.uint8)
    for rows in row_blocks(weight.shape):
        # Zeros that fill up the last group change neither low nor high.
        block = np.zeros((len(q[rows]), groups * group), np.float32)
        block[:, :depth] = weight[rows]
        steps, scales[rows], zeros[rows] = _round_groups(block.reshape(-1, groups, group), name)
        q[rows] = steps.reshape(len(block), -1)[:, :depth]
    return Int4Matrix(q, scales, zeros, group)


def _round_groups(block: Float32, name: str) -> tuple[Float32, Float16, UInt8]:
    """q [n, groups, group] (in place of `block`), scales and zeros [n, groups]."""
    low = block.min(axis=2, initial=0)
    high = block.max(axis=2, initial=0)
    _check_finite(low, name)
    _check_finite(high, name)
    with np.errstate(over="ignore"):
        scale16 = ((high - low) / np.float32(15)).astype(np.float16)
    if not np.isfinite(scale16).all():
        raise ModelError(
            f"{name} with values from {low.min():g} to {high.max():g}",
            f"groups that span at most 15 * {_LARGEST_SCALE:g}, for the weight format int4",
        )
    scale16[scale16 == 0] = 1
    scale = scale16.astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    block /= scale[:, :, None]
    np.rint(block, out=block)
    block += zero[:, :, None]
    np.clip(block, 0, 15, out=block)
    return block, scale16, zero.astype(np.uint8)


def _check_weight(weight: Rows) -> None:
    if weight.ndim != 2 or weight.dtype.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}, no matrix of floats")


def _check_finite(values: Float32, name: str) -> None:
    """`values` are extremes, which carry a NaN or an infinity of the weight along."""
    if not np.isfinite(values).all():
        found = values[~np.isfinite(values)][0]
        raise ModelError(f"{name} with the value {found:g}", "finite weights, where they are to be rounded")
