"""Weights in the packed layouts of native/src/kernels.hpp.

A `WeightPacker` knows what the program does with each weight: multiply it (and with which epilogue), look rows
up in it, or add it. Linears are packed straight from what the loader hands over (views of mapped files), on
all threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.native import extension
from tokenloom.kernels.program import Embed, Program, WeightSpec

INT4_GROUP = 64
"""Weights that share a scale when they are rounded to 4 bits at load; a divisor of the usual sizes."""

Rounding = Literal["int8", "int4"]

_FLOATS = {"float32", "float16", "bfloat16"}


@dataclass(frozen=True, slots=True)
class PackedTable:
    """An embedding that no product reads, as stored: rows [V, width] of float32, bfloat16 or float16."""

    values: NDArray[Any]


class WeightPacker:
    """Packs the weights of `program` for arithmetic in `dtype` ("float32" or "bfloat16").

    `pool` is a native ThreadPool. `roundings` names the weights that are rounded to 8 or 4 bits.
    """

    def __init__(self, program: Program, dtype: str, pool: Any, roundings: Mapping[str, Rounding]) -> None:
        self._native = extension.load()
        if program.vocab_size > self._native.max_vocabulary:
            raise UnsupportedFeature(
                f"a vocabulary of {program.vocab_size:,} tokens",
                f"the native sampler counts up to {self._native.max_vocabulary:,}; --kernels reference has no limit",
            )
        self._pool = pool
        self._plain = {"float32": "float32", "bfloat16": "bfloat16"}[dtype]
        self._roundings = roundings
        products = set(program.products())
        self._multiplied = {name for name, _ in products}
        self._paired = {name for name, paired in products if paired}
        if len(products) > len(self._multiplied):
            raise UnsupportedFeature(
                "a weight under silu_mul and without it", "packed weights have one layout"
            )
        self._tables = {op.weight for op in program.ops if isinstance(op, Embed)} - self._multiplied

    def pack(self, spec: WeightSpec, sources: Sequence[Any]) -> Any:
        """The packed form of one weight: a native PackedWeight, a `PackedTable`, or float32 or int32 [n] for vectors.

        `sources` are arrays or quantised matrices that are stacked along axis 0 to `spec.shape`; a transposed
        spec's are turned already. Raises ValueError for values that the format cannot hold: not finite ones
        and groups that are too wide where they are rounded to 8 or 4 bits, too large ones for bfloat16, and
        integers outside their range.
        """
        if spec.integers:
            return _integers(spec, sources)
        if spec.name in self._multiplied:
            return self._matrix(spec, sources)
        if spec.name not in self._tables:
            return np.concatenate([_float32(source) for source in sources])
        types = {source.dtype.name if isinstance(source, np.ndarray) else "quantized" for source in sources}
        if shrinks(types, self._roundings.get(spec.name), self._plain):
            return self._matrix(spec, sources)
        return PackedTable(_stacked(sources))

    def _matrix(self, spec: WeightSpec, sources: Sequence[Any]) -> Any:
        paired = spec.name in self._paired
        kinds = {(type(source), getattr(source, "group", 0)) for source in sources}
        if len(kinds) == 1 and not isinstance(sources[0], np.ndarray):
            return self._quantized(sources, paired)
        if kinds != {(np.ndarray, 0)}:
            # A stack of different parts, some perhaps left in floating point: the whole is multiplied in it.
            sources = [
                source if isinstance(source, np.ndarray) else source.dequantize() for source in sources
            ]
        rounding = self._roundings.get(spec.name, self._plain)
        arrays = [_contiguous(source) for source in sources]
        types = [array.dtype.name for array in arrays]
        raw = [array.view(np.uint16) if array.dtype.itemsize == 2 else array for array in arrays]
        group = INT4_GROUP if rounding == "int4" else 0
        return self._native.pack(self._pool, raw, types, rounding, paired, group)

    def _quantized(self, sources: Sequence[Any], paired: bool) -> Any:
        parts = [(source.q, source.scales, getattr(source, "zeros", None)) for source in sources]
        group = getattr(sources[0], "group", 0)
        scales = [s.view(np.uint16) if s.dtype == np.float16 else s for _, s, _ in parts]
        return self._native.pack_quantized(
            self._pool, [q for q, _, _ in parts], scales, [z for _, _, z in parts], paired, group
        )


def shrinks(types: Set[str], rounding: str | None, dtype: str) -> bool:
    """Whether an embedding that no product reads is packed all the same, as that holds the values in use
    in fewer bytes: where it is rounded, or wider than arithmetic in `dtype`. `types` are those of its sources."""
    if rounding is not None or not types <= _FLOATS:
        return True
    return dtype == "bfloat16" and "float32" in types


def _stacked(sources: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """A copy of the rows of all sources, in their own type where they have one in common."""
    arrays = [_contiguous(source) for source in sources]
    if len({array.dtype for array in arrays}) > 1:
        arrays = [_float32(array) for array in arrays]
    return np.concatenate(arrays)


def _integers(spec: WeightSpec, sources: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    """A copy of the int32 numbers of all sources: it outlives the file."""
    if any(source.dtype != np.int32 for source in sources):
        raise ValueError(
            f"weight {spec.name} is {[str(source.dtype) for source in sources]} instead of int32"
        )
    return np.concatenate(sources)


def _contiguous(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
        array = array.astype(np.float32)
    return np.ascontiguousarray(array)


def _float32(source: Any) -> NDArray[np.float32]:
    values = source if isinstance(source, np.ndarray) else source.dequantize()
    return np.ascontiguousarray(values, dtype=np.float32)
