"""Linears as AutoGPTQ and GPTQModel store them, in 4 bits (GPTQ, Frantar et al. 2023).

```
qweight  int32   [K / 8, N]            word r of a column holds inputs 8 r to 8 r + 7, low nibble first
qzeros   int32   [K / group, N / 8]    word j of a row holds outputs 8 j to 8 j + 7, low nibble first
scales   float16 [K / group, N]
g_idx    int32   [K]                   the group of each input; may be absent
```
A weight is (q - zero) * scale. The format "gptq" (v1) stores the zero less one, so that it is 1 to 16 here, as
AutoGPTQ's and vLLM's kernels read it; "gptq_v2" stores it as it is, 0 to 15. A symmetric quantiser gives the
zero 8 everywhere. (A v1 file cannot store the zero 0. Tools that subtract from whole words wrap it to nibble 15
and borrow from the neighbour; only a group without any negative weight leads there.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.quantization.packed_parts import (
    NIBBLES,
    Shape,
    check_dtypes,
    check_groups,
    check_matrix,
    check_shape,
    nibble,
    read_scales,
)
from tokenloom.quantization.weights import BLOCK_ELEMENTS, Int4Matrix, UInt8

_SYMMETRIC_ZERO = 8


def shape(name: str, found: Mapping[str, Shape], group: int) -> tuple[int, int]:
    """(N, K) of the linear `name` from the shapes of its parts. Raises `ModelError` if they do not fit."""
    check_matrix(name, found, "qweight")
    words, num_rows = found["qweight"]
    depth = words * NIBBLES
    check_groups(name, found, num_rows, depth, group)
    if "g_idx" in found:
        check_shape(name, found, "g_idx", (depth,))
    return num_rows, depth


def unpack(
    name: str, tensors: Mapping[str, NDArray[Any]], group: int, *, zero_offset: int, symmetric: bool
) -> Int4Matrix:
    """The linear `name` from its parts qweight, qzeros, scales and perhaps g_idx, in blocks of rows.

    `zero_offset` is added to a stored zero: 1 for "gptq", 0 for "gptq_v2". Raises `ModelError`, naming the
    part, for a wrong type or shape, for scales that are not finite, for a g_idx that is not k // group, and
    for a `symmetric` matrix whose zeros are all off by one, which then is of the other format.
    """
    _, depth = shape(name, {part: tensor.shape for part, tensor in tensors.items()}, group)
    check_dtypes(name, tensors)
    if "g_idx" in tensors and (tensors["g_idx"] != np.arange(depth) // group).any():
        raise ModelError(
            f"{name}.g_idx with inputs ordered by activation (desc_act)",
            f"groups of {group} inputs in their order",
        )
    zeros = _unpack_zeros(tensors["qzeros"])
    zeros += np.uint8(zero_offset)
    wrong = _SYMMETRIC_ZERO + 1 if zero_offset else _SYMMETRIC_ZERO - 1
    if symmetric and (zeros == wrong).all():
        formats = ("gptq", "gptq_v2") if zero_offset else ("gptq_v2", "gptq")
        raise ModelError(
            f"{name}.qzeros with the zero {wrong} everywhere, though sym is true",
            f"zeros of {_SYMMETRIC_ZERO}: quantization_config.checkpoint_format says {formats[0]}, where "
            f"the file looks like {formats[1]}",
        )
    return Int4Matrix(_unpack_rows(tensors["qweight"]), read_scales(tensors["scales"], name), zeros, group)


def _unpack_rows(packed: NDArray[np.int32]) -> UInt8:
    """int32 [K / 8, N] to uint8 [N, K]."""
    words_per_row, num_rows = packed.shape
    out = np.empty((num_rows, words_per_row, NIBBLES), np.uint8)
    step = max(1, BLOCK_ELEMENTS // (NIBBLES * words_per_row))
    for start in range(0, num_rows, step):
        words = np.ascontiguousarray(packed[:, start : start + step].T)
        for i in range(NIBBLES):
            out[start : start + step, :, i] = nibble(words, i)
    return out.reshape(num_rows, words_per_row * NIBBLES)


def _unpack_zeros(packed: NDArray[np.int32]) -> UInt8:
    """int32 [groups, N / 8] to uint8 [N, groups]."""
    groups, num_words = packed.shape
    out = np.empty((num_words, NIBBLES, groups), np.uint8)
    words = packed.T
    for i in range(NIBBLES):
        out[:, i] = nibble(words, i)
    return out.reshape(num_words * NIBBLES, groups)
