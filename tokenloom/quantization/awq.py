"""Linears as AutoAWQ stores them, in its version "gemm" (AWQ, Lin et al. 2024).

```
qweight  int32   [K, N / 8]        word j of a row holds outputs 8 j + (0, 2, 4, 6, 1, 3, 5, 7), low nibble first
qzeros   int32   [K / group, N / 8]    likewise
scales   float16 [K / group, N]
```
A weight is (q - zero) * scale with the zero as it is stored, 0 to 15. The versions "gemv" and "gemv_fast" and the
files of llm-awq have other layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenloom.quantization.packed_parts import (
    NIBBLES,
    Shape,
    check_dtypes,
    check_groups,
    check_matrix,
    nibble,
    read_scales,
)
from tokenloom.quantization.weights import BLOCK_ELEMENTS, Int4Matrix, UInt8

ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight outputs the i-th nibble of a word holds."""


def shape(name: str, found: Mapping[str, Shape], group: int) -> tuple[int, int]:
    """(N, K) of the linear `name` from the shapes of its parts. Raises `ModelError` if they do not fit."""
    check_matrix(name, found, "qweight")
    depth, words = found["qweight"]
    check_groups(name, found, words * NIBBLES, depth, group)
    return words * NIBBLES, depth


def unpack(name: str, tensors: Mapping[str, NDArray[Any]], group: int) -> Int4Matrix:
    """The linear `name` from its parts qweight, qzeros and scales, in blocks of columns.

    Raises `ModelError`, naming the part, for a wrong type or shape and for scales that are not finite.
    """
    shape(name, {part: tensor.shape for part, tensor in tensors.items()}, group)
    check_dtypes(name, tensors)
    return Int4Matrix(
        _unpack_words(tensors["qweight"]),
        read_scales(tensors["scales"], name),
        _unpack_words(tensors["qzeros"]),
        group,
    )


def _unpack_words(packed: NDArray[np.int32]) -> UInt8:
    """int32 [R, N / 8] to uint8 [N, R]."""
    depth, num_words = packed.shape
    out = np.empty((num_words, NIBBLES, depth), np.uint8)
    step = max(1, BLOCK_ELEMENTS // (NIBBLES * depth))
    for start in range(0, num_words, step):
        words = np.ascontiguousarray(packed[:, start : start + step].T)
        for i, output in enumerate(ORDER):
            out[start : start + step, output] = nibble(words, i)
    return out.reshape(num_words * NIBBLES, depth)
