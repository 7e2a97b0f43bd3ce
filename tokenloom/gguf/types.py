"""The number types of GGUF tensors: which are served, and how many bytes a block of each has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class TensorType(NamedTuple):
    """`block` numbers of a row are stored together in `block_bytes` bytes; `number` is the type's in the file."""

    name: str
    number: int
    block: int
    block_bytes: int

    @property
    def is_plain(self) -> bool:
        """Whether each number stands by itself: F32, F16, BF16."""
        return self.block == 1


TYPES: Final[Mapping[int, TensorType]] = {
    kind.number: kind
    for kind in (
        TensorType("F32", 0, 1, 4),
        TensorType("F16", 1, 1, 2),
        TensorType("BF16", 30, 1, 2),
        TensorType("Q8_0", 8, 32, 34),
        TensorType("Q6_K", 14, 256, 210),
        TensorType("Q5_K", 13, 256, 176),
        TensorType("Q5_0", 6, 32, 22),
        TensorType("Q5_1", 7, 32, 24),
        TensorType("Q4_K", 12, 256, 144),
        TensorType("Q4_0", 2, 32, 18),
        TensorType("Q4_1", 3, 32, 20),
    )
}
"""The types that are served, by number. Q5_0, Q5_1 and Q4_1 are not asked for by themselves: quantisers put them
where the rows are no multiple of 256, as K-quants need."""

SERVED: Final = ", ".join(kind.name for kind in TYPES.values())

_REFUSED: Final[Mapping[int, str]] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


def type_name(number: int) -> str:
    """The name of a type, or what there is to say about an unknown one."""
    kind = TYPES.get(number)
    return kind.name if kind is not None else _REFUSED.get(number, f"number {number}, which is unknown")
