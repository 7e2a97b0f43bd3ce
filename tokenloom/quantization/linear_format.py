"""What every way to store a quantised linear offers, whatever its files are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.quantization.packed_parts import Shape
from tokenloom.quantization.weights import Float32, Int4Matrix, Int8Matrix


class LinearFormat(Protocol):
    """How the linear X of a checkpoint is stored: as tensors X.part, by suffix.

    `main` is the part by which such a linear is known. `parts` must all be there, `optional_parts` may be.
    `form` is what `unpack` gives: ("int4", inputs to a group), ("int8", 0) or ("float32", 0). Where X.`order_part`
    is there, it holds the group of each input, and the columns of an `Int4Matrix` lie in the order that
    `input_order` finds.
    """

    @property
    def main(self) -> str: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def optional_parts(self) -> tuple[str, ...]: ...

    @property
    def order_part(self) -> str | None: ...

    @property
    def form(self) -> tuple[str, int]: ...

    def dtypes(self, part: str) -> tuple[str, ...]:
        """Types that X.`part` may have; empty for a part that is not read."""

    def shape(self, name: str, found: Mapping[str, Shape]) -> tuple[int, int]:
        """(N, K) of the linear `name` from the shapes of its parts. Raises `ModelError` if they do not fit."""

    def unpack(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> Float32 | Int8Matrix | Int4Matrix:
        """The linear `name`, [N, K], from its parts, whose types and shapes fit. Raises `ModelError`, naming the
        part, for numbers that cannot be."""

    def input_order(self, name: str, groups: NDArray[Any]) -> NDArray[Any] | None:
        """int32 [K]: the input that each column of the unpacked matrix belongs to, from X.`order_part`; None
        where they are in order. Raises `ModelError` for groups that cannot be."""


def unpack_linear(
    stored: LinearFormat, name: str, tensors: Mapping[str, NDArray[Any]]
) -> Float32 | Int8Matrix | Int4Matrix:
    """The linear `name` from its parts by suffix. Raises `ModelError`, naming the part, for a wrong type or shape,
    and as `LinearFormat.unpack`."""
    stored.shape(name, {part: tensor.shape for part, tensor in tensors.items()})
    for part, tensor in tensors.items():
        wanted = stored.dtypes(part)
        if wanted and tensor.dtype.name not in wanted:
            raise ModelError(f"{name}.{part} of dtype {tensor.dtype}", ", ".join(wanted))
    return stored.unpack(name, tensors)
