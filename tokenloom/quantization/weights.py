"""The two forms of a rounded weight matrix, whatever it was read from: int8 per row, and int4 in groups.

```
int8   w[n, k] = q[n, k] * scales[n]
int4   w[n, k] = (q[n, k] - zeros[n, k // group]) * scales[n, k // group]
```
N counts the outputs of a linear (rows of its weight), K its inputs. These are plain arrays, one number an
element; a backend packs them as it likes. They are checked when they are made, so that whoever packs them
need not be careful.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]

GROUPS: Final = (32, 64, 128)
"""Sizes of a group of inputs that share one scale and one zero."""

MAX_ZERO: Final = 16
"""A zero is at most this: GPTQ stores zeros less one in 4 bits."""

BLOCK_ELEMENTS: Final = 1 << 22
"""Numbers converted at a time, which bounds temporaries."""


@dataclass(frozen=True, slots=True, eq=False)
class Int8Matrix:
    """`q` int8 [N, K], `scales` float32 [N], finite. Raises ValueError for anything else."""

    q: Int8
    scales: Float32

    def __post_init__(self) -> None:
        _check_array("q", self.q, np.int8, self.q.shape if self.q.ndim == 2 else (0, 0))
        _check_array("scales", self.scales, np.float32, self.q.shape[:1])
        _check_finite(self.scales)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers, as `int8_bytes`."""
        return int8_bytes(self.shape)

    def dequantize(self, out: Float32 | None = None) -> Float32:
        """float32 [N, K]: float32(q) * scale, one fp32 product each. Written to `out` where it is given."""
        result = np.empty(self.shape, np.float32) if out is None else out
        for rows in row_blocks(self.shape):
            np.multiply(self.q[rows], self.scales[rows, None], out=result[rows], dtype=np.float32)
        return result

    def take(self, rows: NDArray[np.intp]) -> Int8Matrix:
        """A copy of these rows, in this order."""
        return Int8Matrix(self.q[rows], self.scales[rows])

    @classmethod
    def concatenate(cls, parts: Sequence[Int8Matrix]) -> Int8Matrix:
        """The rows of all `parts`, in order. Raises ValueError if their K differ or there are none."""
        return cls(
            np.concatenate([part.q for part in parts]), np.concatenate([part.scales for part in parts])
        )


@dataclass(frozen=True, slots=True, eq=False)
class Int4Matrix:
    """`q` uint8 [N, K] from 0 to 15, one number a byte; `scales` float16 [N, groups], finite; `zeros` uint8
    [N, groups] from 0 to 16; `group` inputs to a group, one of `GROUPS`; groups = ceil(K / group).

    The last group of a row may be shorter than the others. Raises ValueError for anything else.
    """

    q: UInt8
    scales: Float16
    zeros: UInt8
    group: int

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group is {self.group}, none of {GROUPS}")
        _check_array("q", self.q, np.uint8, self.q.shape if self.q.ndim == 2 else (0, 0))
        groups = (self.q.shape[0], num_groups(self.q.shape[1], self.group))
        _check_array("scales", self.scales, np.float16, groups)
        _check_array("zeros", self.zeros, np.uint8, groups)
        for name, values, most in (("q", self.q, 15), ("zeros", self.zeros, MAX_ZERO)):
            if values.size and int(values.max()) > most:
                raise ValueError(f"{name} has the value {values.max()}, above {most}")
        _check_finite(self.scales)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers, as `int4_bytes`."""
        return int4_bytes(self.shape, self.group)

    def dequantize(self, out: Float32 | None = None) -> Float32:
        """float32 [N, K]: float32(q - zero) * float32(scale), one fp32 product each. Written to `out` where
        it is given."""
        result = np.empty(self.shape, np.float32) if out is None else out
        for rows in row_blocks(self.shape):
            steps = self.q[rows].astype(np.int8)
            # Each group's values once for every input of it.
            steps -= np.repeat(self.zeros[rows].view(np.int8), self.group, axis=1)[:, : self.shape[1]]
            scales = np.repeat(self.scales[rows].astype(np.float32), self.group, axis=1)
            np.multiply(steps, scales[:, : self.shape[1]], out=result[rows])
        return result

    def take(self, rows: NDArray[np.intp]) -> Int4Matrix:
        """A copy of these rows, in this order."""
        return Int4Matrix(self.q[rows], self.scales[rows], self.zeros[rows], self.group)

    @classmethod
    def concatenate(cls, parts: Sequence[Int4Matrix]) -> Int4Matrix:
        """The rows of all `parts`, in order. Raises ValueError if their K or groups differ or there are
        none."""
        if len({part.group for part in parts}) > 1:
            raise ValueError(f"groups of {sorted({part.group for part in parts})} in one matrix")
        return cls(
            np.concatenate([part.q for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate([part.zeros for part in parts]),
            parts[0].group,
        )


def num_groups(depth: int, group: int) -> int:
    """Groups of a row of `depth` inputs; the last may be shorter."""
    return -(-depth // group)


def int8_bytes(shape: Sequence[int]) -> int:
    """Bytes of an int8 matrix [N, K]: one an element, and four for each row's scale."""
    return shape[0] * (shape[1] + 4)


def int4_bytes(shape: Sequence[int], group: int) -> int:
    """Bytes of an int4 matrix [N, K]: half a byte an element (a row is filled up to a whole one), two for each
    group's scale and one for its zero."""
    return shape[0] * (-(-shape[1] // 2) + 3 * num_groups(shape[1], group))


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of rows that together cover an array, each of about `BLOCK_ELEMENTS` numbers."""
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _check_array(
    name: str, array: NDArray[np.generic], dtype: type[np.generic], shape: Sequence[int]
) -> None:
    if array.dtype != dtype or array.shape != tuple(shape):
        raise ValueError(
            f"{name} is {array.dtype} {list(array.shape)} instead of {np.dtype(dtype)} {list(shape)}"
        )


def _check_finite(scales: Float16 | Float32) -> None:
    if not np.isfinite(scales).all():
        raise ValueError("scales has a value that is not finite")
