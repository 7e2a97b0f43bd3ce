"""What loading needs of the files that hold a model's tensors, whatever their format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from tokenloom.quantization.config import WeightQuantization
from tokenloom.quantization.gguf_blocks import BlockMatrix
from tokenloom.quantization.linear_format import LinearFormat
from tokenloom.quantization.weights import Int4Matrix, Int8Matrix


class WeightFiles(Protocol):
    """Tensors by the names of Hugging Face. A *source* is a tensor as a program names it, which the files may hold
    in several parts. Every method that takes a name raises `ModelError` where it is not there, but for
    `source_tensors`, `source_bytes`, `linear_format`, `input_order` and `blocks`.

    `directory` is where the files are, for errors; `config` the object of config.json, or what says the same;
    `quantization` what it says about linears that are stored in fewer bits.
    """

    @property
    def directory(self) -> Path: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def quantization(self) -> WeightQuantization | None: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def main_dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """The float type that most bytes are stored in."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """Of the array that `tensor` gives."""

    def tensor(self, name: str) -> NDArray[Any]: ...

    def release(self, name: str) -> None:
        """Give the pages of a tensor back to the system."""

    def source_tensors(self, source: str) -> tuple[str, ...]:
        """The tensors that make up a source; none if it is not there."""

    def source_shape(self, source: str) -> tuple[int, ...]: ...

    def source_bytes(self, source: str) -> int:
        """Bytes as stored; 0 if it is not there."""

    def source(self, source: str) -> NDArray[Any] | Int8Matrix | Int4Matrix | BlockMatrix: ...

    def release_source(self, source: str) -> None: ...

    def linear_format(self, source: str) -> LinearFormat | None:
        """How `source` is stored if it is a linear in several parts; it gives [N, K] in any case."""

    def blocks(self, source: str) -> BlockMatrix | None:
        """The matrix in blocks that `source` gives, [N, K] in any case, of which nothing is read yet; None if it
        gives none."""

    def source_form(self, source: str) -> tuple[str, int]:
        """What `source` gives: (float32, bfloat16 or float16, 0), ("int8", 0), ("int4", inputs to a group), or
        ("int32", 0) for an order of inputs; ("float32", 0) for blocks, whose values are of that type."""

    def input_order(self, source: str) -> NDArray[np.int32] | None:
        """int32 [K]: the input that each column of the linear `source` belongs to; None where they are in order."""

    def content_id(self) -> str:
        """Hex digest of the configuration and the tensors."""

    def files_id(self) -> str:
        """Hex digest of names, sizes and modification times of the files."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
