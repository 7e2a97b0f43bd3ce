"""What the AWQ and GPTQ formats of a linear have in common: int32 words of eight nibbles, and their shapes.

A linear X of N outputs and K inputs is stored as X.qweight, X.qzeros and X.scales (GPTQ: perhaps X.g_idx),
all with the inputs first. The low nibble of a word comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.quantization.weights import Float16, num_groups

NIBBLES = 8
"""4-bit numbers in an int32 word."""

FLOATS = ("float16", "bfloat16", "float32")

Shape = tuple[int, ...]


def nibble(words: NDArray[np.int32], index: int) -> NDArray[np.uint8]:
    """The `index`-th 4 bits of each word, from the low end."""
    return ((words >> np.int32(4 * index)) & np.int32(15)).astype(np.uint8)


def read_scales(scales: NDArray[Any], name: str) -> Float16:
    """`scales` [groups, N] as float16 [N, groups]. Raises `ModelError` for a value that is not finite, or that
    float16 does not hold (some tools store them in a wider type)."""
    wide = np.ascontiguousarray(scales.T, dtype=np.float32)
    if not np.isfinite(wide).all():
        raise ModelError(f"{name}.scales with a value that is not finite", "finite scales")
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if (narrow != wide).any():
        raise ModelError(f"{name}.scales of {scales.dtype} with values that float16 does not hold", "float16")
    return narrow


def check_shape(name: str, found: Mapping[str, Shape], part: str, expected: Shape) -> None:
    """Raise `ModelError` unless X.`part` has its expected shape."""
    if found[part] != expected:
        raise ModelError(f"{name}.{part} of shape {list(found[part])}", f"{list(expected)}")


def check_matrix(name: str, found: Mapping[str, Shape], part: str) -> None:
    """Raise `ModelError` unless X.`part` is a matrix with rows and columns."""
    if len(found[part]) != 2 or 0 in found[part]:
        raise ModelError(f"{name}.{part} of shape {list(found[part])}", "a matrix")


def check_groups(name: str, found: Mapping[str, Shape], num_rows: int, depth: int, group: int) -> None:
    """Raise `ModelError` unless groups divide K = `depth`, and zeros and scales have one row a group."""
    if depth % group:
        raise ModelError(f"{name} of {depth} inputs with group_size {group}", f"a multiple of {group} inputs")
    if num_rows % NIBBLES:
        raise ModelError(f"{name} of {num_rows} outputs", f"a multiple of {NIBBLES} outputs")
    groups = num_groups(depth, group)
    check_shape(name, found, "qzeros", (groups, num_rows // NIBBLES))
    check_shape(name, found, "scales", (groups, num_rows))


def check_dtypes(name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Raise `ModelError` unless scales are floats and all other parts int32."""
    for part, tensor in tensors.items():
        wanted = FLOATS if part == "scales" else ("int32",)
        if tensor.dtype.name not in wanted:
            raise ModelError(f"{name}.{part} of dtype {tensor.dtype}", ", ".join(wanted))
