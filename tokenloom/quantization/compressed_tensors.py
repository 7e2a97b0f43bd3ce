"""Linears as llm-compressor stores them for vLLM (the formats of the package compressed-tensors).

```
pack-quantized, C = 32 / bits numbers in a word
  weight_packed      int32 [N, K / C]         word j of a row holds inputs C j to C j + C - 1, from the low end
  weight_scale       float [N, K / group], [N, 1] for whole rows
  weight_zero_point  int32 [N / C, K / group]     word r of a column holds outputs C r to C r + C - 1
  weight_shape       int64 [2] = N, K
  weight_g_idx       int32 [K]                the group of each input; may be absent
int-quantized
  weight             int8 [N, K]
  weight_scale       float [N, 1], or [N, K / group]
  weight_zero_point  int8 as weight_scale
float-quantized: fp8.py
```
A weight is (q - zero) * scale. Packed numbers and zeros are stored with 2^(bits - 1) added. In 4 bits, and in 8 bits
with symmetric whole rows, the kernels multiply what is stored; anything else in 8 bits is unpacked to its values in
float32. What a file says of activations (input_scale, input_zero_point, output_scale) is not read.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.quantization.fp8 import Fp8Linear
from tokenloom.quantization.linear_format import LinearFormat
from tokenloom.quantization.packed_parts import (
    FLOATS,
    Shape,
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
    sorted_inputs,
    unpack_columns,
)
from tokenloom.quantization.selection import PATTERN, Selection, Targets, TargetSelection, pattern_problem
from tokenloom.quantization.weights import Float32, Int4Matrix, Int8Matrix, num_groups
from tokenloom.quantization.written import Written

FORMATS: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")

_UNREAD: Final = ("input_scale", "input_zero_point", "output_scale")
_G_IDX: Final = "weight_g_idx"
_MAX_GROUPS: Final = 64
_MAX_PATTERNS: Final = 1000


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """pack-quantized: `group` inputs share a scale, 0: all. See `LinearFormat`."""

    group: int
    bits: int = 4
    symmetric: bool = True

    main: ClassVar[str] = "weight_packed"
    order_part: ClassVar[str | None] = _G_IDX

    @property
    def parts(self) -> tuple[str, ...]:
        parts = ("weight_packed", "weight_scale")
        return parts if self.symmetric else (*parts, "weight_zero_point")

    @property
    def optional_parts(self) -> tuple[str, ...]:
        return ("weight_shape", _G_IDX, *_UNREAD)

    @property
    def form(self) -> tuple[str, int]:
        if self.bits == 4:
            return "int4", held_group(self.group)
        return ("int8", 0) if self.symmetric and not self.group else ("float32", 0)

    def dtypes(self, part: str) -> tuple[str, ...]:
        if part in _UNREAD:
            return ()
        return {"weight_scale": FLOATS, "weight_shape": ("int64", "int32")}.get(part, ("int32",))

    def shape(self, name: str, found: Mapping[str, Shape]) -> tuple[int, int]:
        check_matrix(name, found, "weight_packed")
        num_rows, words = found["weight_packed"]
        per_word = 32 // self.bits
        depth = words * per_word
        groups = num_groups(depth, self.group or depth)
        _check_scales(name, found, (num_rows, groups))
        if not self.symmetric:
            check_shape(name, found, "weight_zero_point", (num_groups(num_rows, per_word), groups))
        for part, expected in (("weight_shape", (2,)), (_G_IDX, (depth,))):
            if part in found:
                check_shape(name, found, part, expected)
        return num_rows, depth

    def unpack(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> Float32 | Int8Matrix | Int4Matrix:
        packed = tensors["weight_packed"]
        num_rows, depth = len(packed), packed.shape[1] * 32 // self.bits
        stated = tensors.get("weight_shape")
        if stated is not None and stated.tolist() != [num_rows, depth]:
            raise ModelError(
                f"{name}.weight_shape = {stated.tolist()}", f"{[num_rows, depth]}, as it is packed"
            )
        count = num_groups(depth, self.group or depth)
        scales = _row_scales(name, tensors["weight_scale"], (num_rows, count))
        if self.symmetric:
            zeros = np.full((num_rows, count), 1 << (self.bits - 1), np.uint8)
        else:
            words = np.ascontiguousarray(tensors["weight_zero_point"].T)
            zeros = np.ascontiguousarray(unpack_columns(words, self.bits)[:, :num_rows].T)
        q = unpack_columns(packed, self.bits)
        groups = tensors.get(_G_IDX)
        if groups is not None and (groups == -1).all():
            groups = None  # so it is before the inputs are put in an order
        if self.bits == 4:
            order = None if groups is None else self.input_order(name, groups)
            if order is not None:
                q = np.ascontiguousarray(q[:, order])
            return int4_matrix(q, narrow_scales(scales, name, "weight_scale"), zeros, self.group)
        if groups is not None:
            check_input_groups(name, _G_IDX, groups, self.group)
        if self.form[0] == "int8":
            return int8_matrix((q ^ np.uint8(128)).view(np.int8), scales, name)
        return dequantize_groups(q, zeros, scales, in_order(depth, self.group) if groups is None else groups)

    def input_order(self, name: str, groups: NDArray[Any]) -> NDArray[np.int32] | None:
        if self.bits != 4 or (groups == -1).all():
            return None
        return sorted_inputs(name, _G_IDX, groups, self.group)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """int-quantized in 8 bits: `group` inputs share a scale, 0: all. See `LinearFormat`."""

    group: int = 0
    symmetric: bool = True

    main: ClassVar[str] = "weight"
    order_part: ClassVar[str | None] = None

    @property
    def parts(self) -> tuple[str, ...]:
        return (
            ("weight", "weight_scale") if self.symmetric else ("weight", "weight_scale", "weight_zero_point")
        )

    @property
    def optional_parts(self) -> tuple[str, ...]:
        return ("weight_zero_point", *_UNREAD) if self.symmetric else _UNREAD

    @property
    def form(self) -> tuple[str, int]:
        return ("int8", 0) if self.symmetric and not self.group else ("float32", 0)

    def dtypes(self, part: str) -> tuple[str, ...]:
        if part in _UNREAD:
            return ()
        return FLOATS if part == "weight_scale" else ("int8",)

    def shape(self, name: str, found: Mapping[str, Shape]) -> tuple[int, int]:
        check_matrix(name, found, "weight")
        num_rows, depth = found["weight"]
        wanted = (num_rows, num_groups(depth, self.group or depth))
        _check_scales(name, found, wanted)
        if "weight_zero_point" in found:
            _check_scales(name, found, wanted, "weight_zero_point")
        return num_rows, depth

    def unpack(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> Float32 | Int8Matrix:
        q = tensors["weight"]
        wanted = (len(q), num_groups(q.shape[1], self.group or q.shape[1]))
        scales = _row_scales(name, tensors["weight_scale"], wanted)
        zeros = np.zeros(wanted, np.int8)
        if "weight_zero_point" in tensors:
            zeros = np.broadcast_to(tensors["weight_zero_point"].reshape(-1, wanted[1]), wanted)
        if self.symmetric and zeros.any():
            raise ModelError(
                f"{name}.weight_zero_point that is not 0, though symmetric is true", "zeros of 0"
            )
        if self.form[0] == "int8":
            return int8_matrix(q, scales, name)
        return dequantize_groups(q, zeros, scales, in_order(q.shape[1], self.group))

    def input_order(self, name: str, groups: NDArray[Any]) -> None:
        return None


def _check_scales(
    name: str, found: Mapping[str, Shape], wanted: tuple[int, int], part: str = "weight_scale"
) -> None:
    """One number of a row may stand without its second dimension, and one of the whole tensor alone."""
    given = found[part]
    alone = wanted[1] == 1 and given in ((), (1,), (1, 1), (wanted[0],))
    if given != wanted and not alone:
        raise ModelError(f"{name}.{part} of shape {list(given)}", f"{list(wanted)}")


def _row_scales(name: str, scales: NDArray[Any], wanted: tuple[int, int]) -> Float32:
    wide = finite_scales(scales, name, "weight_scale").reshape(-1, wanted[1])
    return np.ascontiguousarray(np.broadcast_to(wide, wanted))


# --- config.json -------------------------------------------------------------------------------------------


def parse(written: Written) -> list[tuple[Selection, LinearFormat]]:
    """The formats in `config_groups`, and the linears of each. Raises `ModelError`, with the field's name and
    value, for what is malformed or not offered."""
    written.choice("format", None, "mixed-precision", *FORMATS)
    sparsity = written.data.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format", "dense") == "dense"):
        written.refuse("sparsity_config", "dense weights")
    written.empty("transform_config", "weights without transforms of their inputs")
    written.empty("moe_sparsity_config", "no sparse experts")
    ignored = Targets.of(_targets(written, "ignore"))
    groups = written.inner("config_groups")
    if not 0 < len(groups.data) <= _MAX_GROUPS:
        written.refuse("config_groups", f"1 to {_MAX_GROUPS} groups")
    targets = {name: _targets(groups.inner(name), "targets") for name in groups.data}
    # Every pattern is tried on every linear.
    num_patterns = sum(target.startswith(PATTERN) for found in targets.values() for target in found)
    if num_patterns > _MAX_PATTERNS:
        written.refuse("config_groups", f"targets with at most {_MAX_PATTERNS} patterns")
    result: list[tuple[Selection, LinearFormat]] = []
    for name, own in targets.items():
        others = itertools.chain.from_iterable(found for other, found in targets.items() if other != name)
        selection = TargetSelection(targets=Targets.of(own), ignored=ignored, others=Targets.of(others))
        result.append((selection, _format(groups.inner(name), written.data.get("format"))))
    return result


def _targets(written: Written, name: str) -> tuple[str, ...]:
    targets = written.names(name)
    if name == "targets" and not targets:
        written.refuse(name, "a list of names of modules")
    if sum(target.startswith(PATTERN) for target in targets) > _MAX_PATTERNS:
        written.refuse(name, f"at most {_MAX_PATTERNS} patterns")
    for target in targets:
        problem = pattern_problem(target)
        if problem is not None:
            written.refuse(name, f"behind {PATTERN!r}, {problem}")
    return targets


def _format(group: Written, default: object) -> LinearFormat:
    group.empty("output_activations", "null: outputs are not rounded")
    own = group.choice("format", None, *FORMATS)
    weights = group.inner("weights")
    kind = weights.choice("type", None, "int", "float") or "int"
    if weights.flag("dynamic", False):
        weights.refuse("dynamic", "false")
    layout = own if own is not None else default
    expected = {"int": ("pack-quantized", "int-quantized"), "float": ("float-quantized",)}[kind]
    if layout == "naive-quantized":
        layout = expected[-1]
    if layout not in expected:
        (weights if kind == "float" and layout == "pack-quantized" else group).refuse(
            "type" if kind == "float" and layout == "pack-quantized" else "format", " or ".join(expected)
        )
    symmetric = weights.flag("symmetric", True)
    block = _block(weights)
    if kind == "float":
        weights.bits("num_bits", 8)
        if not symmetric:
            weights.refuse("symmetric", "true for floats")
        return Fp8Linear(block)
    if block[0] > 1:
        weights.refuse("strategy", "'group', 'channel' or 'tensor' for integers")
    if layout == "pack-quantized":
        return PackedLinear(block[1], weights.bits("num_bits", 4, 8), symmetric)
    weights.bits("num_bits", 8)
    return Int8Linear(block[1], symmetric)


def _block(weights: Written) -> tuple[int, int]:
    """(outputs, inputs) that share a scale; 0 for all of them."""
    strategy = weights.choice("strategy", None, "tensor", "channel", "group", "block")
    if strategy is None and weights.data.get("group_size") is not None:
        strategy = "group"
    if strategy == "group":
        return 1, weights.group()
    if strategy == "block":
        return weights.pair("block_structure")
    return (1, 0) if strategy == "channel" else (0, 0)
