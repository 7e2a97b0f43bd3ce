"""Linears as AutoGPTQ and GPTQModel store them, in 4 or 8 bits (GPTQ, Frantar et al. 2023).

```
                                    C = 32 / bits numbers in a word
qweight  int32   [K / C, N]         word r of a column holds inputs C r to C r + C - 1, from the low end
qzeros   int32   [K / group, N / C]     word j of a row holds outputs C j to C j + C - 1, from the low end
scales   float16 [K / group, N]
g_idx    int32   [K]                the group of each input; may be absent
```
A weight is (q - zero) * scale. The format "gptq" (v1) stores the zero less one, so that it is 1 to 2^bits here, as
AutoGPTQ's and vLLM's kernels read it; "gptq_v2" stores it as it is. A symmetric quantiser gives the zero 2^(bits - 1)
everywhere. (A v1 file cannot store the zero 0. Tools that subtract from whole words wrap it to the highest number
and borrow from the neighbour; only a group without any negative weight leads there.)

With desc_act, inputs are in groups by the size of their activations (act-order): g_idx is no staircase, and the
columns of the unpacked 4-bit matrix are sorted by group. In 8 bits, only symmetric rows without groups have a form
that the kernels multiply; anything else is unpacked to its values in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.quantization.packed_parts import (
    FLOATS,
    Shape,
    check_groups,
    check_input_groups,
    check_matrix,
    check_shape,
    dequantize_groups,
    finite_scales,
    held_group,
    in_order,
    int4_matrix,
    int8_matrix,
    narrow_scales,
    number,
    sorted_inputs,
)
from tokenloom.quantization.weights import BLOCK_ELEMENTS, Float32, Int4Matrix, Int8Matrix, UInt8


@dataclass(frozen=True, slots=True)
class GptqLinear:
    """`group` inputs share a scale and a zero; 0: all. `zero_offset` is added to a stored zero: 1 for "gptq", 0 for
    "gptq_v2". `symmetric`: every zero should be 2^(bits - 1). `needs_order` (desc_act): a linear must have a
    g_idx. See `LinearFormat`.
    """

    group: int
    bits: int = 4
    zero_offset: int = 1
    symmetric: bool = False
    needs_order: bool = False

    main: ClassVar[str] = "qweight"
    order_part: ClassVar[str | None] = "g_idx"

    @property
    def parts(self) -> tuple[str, ...]:
        parts = ("qweight", "qzeros", "scales")
        return (*parts, "g_idx") if self.needs_order else parts

    @property
    def optional_parts(self) -> tuple[str, ...]:
        return () if self.needs_order else ("g_idx",)

    @property
    def form(self) -> tuple[str, int]:
        if self.bits == 4:
            return "int4", held_group(self.group)
        return ("int8", 0) if self.symmetric and not self.group else ("float32", 0)

    def dtypes(self, part: str) -> tuple[str, ...]:
        return FLOATS if part == "scales" else ("int32",)

    def shape(self, name: str, found: Mapping[str, Shape]) -> tuple[int, int]:
        check_matrix(name, found, "qweight")
        words, num_rows = found["qweight"]
        per_word = 32 // self.bits
        depth = words * per_word
        check_groups(name, found, num_rows, depth, self.group, per_word)
        if "g_idx" in found:
            check_shape(name, found, "g_idx", (depth,))
        return num_rows, depth

    def unpack(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> Float32 | Int8Matrix | Int4Matrix:
        """In blocks of rows. A `symmetric` matrix whose zeros are all off by one is of the other format, and
        refused."""
        zeros = _unpack_zeros(tensors["qzeros"], self.bits) + np.int16(self.zero_offset)
        self._check_zeros(name, zeros)
        q = _unpack_rows(tensors["qweight"], self.bits)
        scales = finite_scales(tensors["scales"].T, name)
        groups = tensors.get("g_idx")
        if self.bits == 4:
            order = None if groups is None else self.input_order(name, groups)
            if order is not None:
                q = np.ascontiguousarray(q[:, order])
            return int4_matrix(q, narrow_scales(scales, name), zeros.astype(np.uint8), self.group)
        if groups is not None:
            check_input_groups(name, "g_idx", groups, self.group)
        if self.form[0] == "int8":
            if (zeros != 128).any():
                raise ModelError(
                    f"{name}.qzeros with other zeros than 128, though sym is true", "zeros of 128"
                )
            return int8_matrix((q ^ np.uint8(128)).view(np.int8), scales, name)
        return dequantize_groups(
            q, zeros, scales, in_order(q.shape[1], self.group) if groups is None else groups
        )

    def input_order(self, name: str, groups: NDArray[Any]) -> NDArray[np.int32] | None:
        return sorted_inputs(name, "g_idx", groups, self.group) if self.bits == 4 else None

    def _check_zeros(self, name: str, zeros: NDArray[np.int16]) -> None:
        middle = 1 << (self.bits - 1)
        wrong = middle + 1 if self.zero_offset else middle - 1
        if self.symmetric and (zeros == wrong).all():
            formats = ("gptq", "gptq_v2") if self.zero_offset else ("gptq_v2", "gptq")
            raise ModelError(
                f"{name}.qzeros with the zero {wrong} everywhere, though sym is true",
                f"zeros of {middle}: quantization_config.checkpoint_format says {formats[0]}, where "
                f"the file looks like {formats[1]}",
            )


def _unpack_rows(packed: NDArray[np.int32], bits: int) -> UInt8:
    """int32 [K / C, N] to uint8 [N, K]."""
    words_per_row, num_rows = packed.shape
    count = 32 // bits
    out = np.empty((num_rows, words_per_row, count), np.uint8)
    step = max(1, BLOCK_ELEMENTS // (count * words_per_row))
    for start in range(0, num_rows, step):
        words = np.ascontiguousarray(packed[:, start : start + step].T)
        for i in range(count):
            out[start : start + step, :, i] = number(words, i, bits)
    return out.reshape(num_rows, words_per_row * count)


def _unpack_zeros(packed: NDArray[np.int32], bits: int) -> NDArray[np.int16]:
    """int32 [groups, N / C] to int16 [N, groups]."""
    groups, num_words = packed.shape
    count = 32 // bits
    out = np.empty((num_words, count, groups), np.int16)
    for i in range(count):
        out[:, i] = number(packed.T, i, bits)
    return out.reshape(num_words * count, groups)
