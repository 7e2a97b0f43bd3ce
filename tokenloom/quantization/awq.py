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
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from tokenloom.quantization.packed_parts import (
    FLOATS,
    NIBBLES,
    Shape,
    check_groups,
    check_matrix,
    finite_scales,
    held_group,
    int4_matrix,
    narrow_scales,
    number,
)
from tokenloom.quantization.weights import BLOCK_ELEMENTS, Int4Matrix, UInt8

ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight outputs the i-th nibble of a word holds."""


@dataclass(frozen=True, slots=True)
class AwqLinear:
    """`group` inputs share a scale and a zero; 0: all. See `LinearFormat`."""

    group: int

    main: ClassVar[str] = "qweight"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    optional_parts: ClassVar[tuple[str, ...]] = ()
    order_part: ClassVar[str | None] = None

    @property
    def form(self) -> tuple[str, int]:
        return "int4", held_group(self.group)

    def dtypes(self, part: str) -> tuple[str, ...]:
        return FLOATS if part == "scales" else ("int32",)

    def shape(self, name: str, found: Mapping[str, Shape]) -> tuple[int, int]:
        check_matrix(name, found, "qweight")
        depth, words = found["qweight"]
        check_groups(name, found, words * NIBBLES, depth, self.group)
        return words * NIBBLES, depth

    def unpack(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> Int4Matrix:
        """In blocks of columns."""
        scales = narrow_scales(finite_scales(tensors["scales"].T, name), name)
        q, zeros = _unpack_words(tensors["qweight"]), _unpack_words(tensors["qzeros"])
        return int4_matrix(q, scales, zeros, self.group)

    def input_order(self, name: str, groups: NDArray[Any]) -> None:
        return None


def _unpack_words(packed: NDArray[np.int32]) -> UInt8:
    """int32 [R, N / 8] to uint8 [N, R]."""
    depth, num_words = packed.shape
    out = np.empty((num_words, NIBBLES, depth), np.uint8)
    step = max(1, BLOCK_ELEMENTS // (NIBBLES * depth))
    for start in range(0, num_words, step):
        words = np.ascontiguousarray(packed[:, start : start + step].T)
        for i, output in enumerate(ORDER):
            out[start : start + step, output] = number(words, i, 4)
    return out.reshape(num_words * NIBBLES, depth)
