"""What the formats of quantised linears have in common: int32 words of small numbers, groups, scales, and their
shapes.

Shapes are checked apart from the numbers, so that a loader can refuse a checkpoint before it reads one. N counts
the outputs of a linear (rows of its weight), K its inputs. A `group` of 0 is the whole row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

NIBBLES = 8
"""4-bit numbers in an int32 word."""

FLOATS = ("float16", "bfloat16", "float32")

GROUP_STEP = 32
"""Groups in a file are multiples of this, or the whole row."""

Shape = tuple[int, ...]


def number(words: NDArray[np.int32], index: int, bits: int) -> NDArray[np.uint8]:
    """The `index`-th `bits` bits (4 or 8) of each word, from the low end."""
    return ((words >> np.int32(bits * index)) & np.int32((1 << bits) - 1)).astype(np.uint8)


def unpack_columns(packed: NDArray[np.int32], bits: int) -> UInt8:
    """int32 [N, W] to uint8 [N, W * 32 / bits]: a word holds numbers that follow each other in a row."""
    count = 32 // bits
    out = np.empty((*packed.shape, count), np.uint8)
    for rows in row_blocks(out.shape):
        for i in range(count):
            out[rows, :, i] = number(packed[rows], i, bits)
    return out.reshape(len(packed), -1)


def finite_scales(scales: NDArray[Any], name: str, part: str = "scales") -> Float32:
    """`scales` as float32, which holds them all exactly. Raises `ModelError` for one that is not finite."""
    wide = np.ascontiguousarray(scales, dtype=np.float32)
    if not np.isfinite(wide).all():
        raise ModelError(f"{name}.{part} with a value that is not finite", "finite scales")
    return wide


def narrow_scales(wide: Float32, name: str, part: str = "scales") -> Float16:
    """`wide` as float16, to nearest. A scale of at least 2^-14 moves by at most 2^-11 of itself, a smaller one by
    at most 2^-25, which moves no weight by more than 2^-21. Raises `ModelError` for one above 65504."""
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise ModelError(
            f"{name}.{part} with the value {np.abs(wide).max():g}", "scales that float16 holds, up to 65504"
        )
    return narrow


def held_group(group: int) -> int:
    """The group of `GROUPS` that an `Int4Matrix` holds a stored `group` in: its scales are repeated."""
    return max(size for size in GROUPS if group % size == 0)


def int4_matrix(q: UInt8, scales: Float16, zeros: UInt8, group: int) -> Int4Matrix:
    """`q` [N, K] with `scales` and `zeros` [N, groups] of the stored `group`, repeated for the group that is
    held."""
    held = held_group(group)
    if held != group:
        count = num_groups(q.shape[1], held)
        # A group may be longer than the row.
        times = min(group // held, count) if group else count
        scales, zeros = (
            np.ascontiguousarray(np.repeat(values, times, axis=1)[:, :count]) for values in (scales, zeros)
        )
    return Int4Matrix(q, scales, zeros, held)


def int8_matrix(q: NDArray[np.int8], scales: Float32, name: str) -> Int8Matrix:
    """`q` [N, K] with `scales` of one number, or of one a row in any shape."""
    rows = np.broadcast_to(scales.reshape(-1), (len(q),))
    return Int8Matrix(np.ascontiguousarray(q), np.ascontiguousarray(rows))


def dequantize_groups(q: NDArray[Any], zeros: NDArray[Any], scales: Float32, groups: NDArray[Any]) -> Float32:
    """float32 [N, K]: (q - zero) * scale, one fp32 product each. `zeros` and `scales` [N, groups]; `groups` [K]
    is the group of each input."""
    out = np.empty(q.shape, np.float32)
    for rows in row_blocks(q.shape):
        steps = q[rows].astype(np.int16)
        steps -= zeros[rows].astype(np.int16)[:, groups]
        np.multiply(steps, scales[rows][:, groups], out=out[rows])
    return out


def in_order(depth: int, group: int) -> NDArray[np.int64]:
    """[K]: the group of each input where they follow each other."""
    return np.arange(depth) // (group or depth)


def check_input_groups(name: str, part: str, groups: NDArray[Any], group: int) -> None:
    """Raise `ModelError` unless each group has `group` inputs, whatever their order."""
    depth = len(groups)
    size = group or depth
    count = num_groups(depth, size)
    if groups.size and (int(groups.min()) < 0 or int(groups.max()) >= count):
        raise ModelError(
            f"{name}.{part} with groups from {groups.min()} to {groups.max()}",
            f"groups from 0 to {count - 1}",
        )
    if (np.bincount(groups, minlength=count) != size).any():
        raise ModelError(f"{name}.{part} with groups of different sizes", f"{size} inputs in every group")


def sorted_inputs(name: str, part: str, groups: NDArray[Any], group: int) -> NDArray[np.int32] | None:
    """int32 [K]: the inputs, sorted by their group; None where they are in order. Raises `ModelError` as
    `check_input_groups`."""
    if (groups == in_order(len(groups), group)).all():
        return None
    check_input_groups(name, part, groups, group)
    return np.argsort(groups, kind="stable").astype(np.int32)


def check_shape(name: str, found: Mapping[str, Shape], part: str, expected: Shape) -> None:
    """Raise `ModelError` unless X.`part` has its expected shape."""
    if found[part] != expected:
        raise ModelError(f"{name}.{part} of shape {list(found[part])}", f"{list(expected)}")


def check_matrix(name: str, found: Mapping[str, Shape], part: str) -> None:
    """Raise `ModelError` unless X.`part` is a matrix with rows and columns."""
    if len(found[part]) != 2 or 0 in found[part]:
        raise ModelError(f"{name}.{part} of shape {list(found[part])}", "a matrix")


def check_groups(
    name: str, found: Mapping[str, Shape], num_rows: int, depth: int, group: int, per_word: int = NIBBLES
) -> None:
    """Raise `ModelError` unless groups divide K = `depth`, and qzeros (`per_word` in a word) and scales have one
    row a group."""
    if group and depth % group:
        raise ModelError(f"{name} of {depth} inputs with group_size {group}", f"a multiple of {group} inputs")
    if num_rows % per_word:
        raise ModelError(f"{name} of {num_rows} outputs", f"a multiple of {per_word} outputs")
    groups = num_groups(depth, group or depth)
    check_shape(name, found, "qzeros", (groups, num_rows // per_word))
    check_shape(name, found, "scales", (groups, num_rows))
