"""What a packed weight is apart from its numbers, so that kept weights are compared before they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenloom.kernels.native import extension
from tokenloom.kernels.native.weights import INT4_GROUP, PackedTable, shrinks
from tokenloom.kernels.program import PAIRED, Embed, Linear, Program

Sources = Mapping[str, Sequence[tuple[str, int]]]
"""By name of each weight that will be packed, its sources as stored: (float32, bfloat16 or float16, 0), or
("int8", 0), or ("int4", inputs to a group)."""

_TYPES: Mapping[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class WeightForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kind` packed: a native PackedWeight in `format` (float32, bfloat16, int8, int4), with its `paired` and
    `group`. table: a `PackedTable`, vector: an array, both of numbers of type `format`."""

    kind: Literal["packed", "table", "vector"]
    format: str
    shape: tuple[int, ...]
    paired: bool = False
    group: int = 0


def expected_forms(
    program: Program, dtype: str, roundings: Mapping[str, str], sources: Sources
) -> dict[str, WeightForm]:
    """The form of each weight of `sources` that a `WeightPacker` of the same arguments makes, in the order of
    the program."""
    linears = [op for op in program.ops if isinstance(op, Linear)]
    multiplied = {op.weight for op in linears} | {program.head.weight}
    paired = {op.weight for op in linears if op.epilogue in PAIRED}
    tables = {op.weight for op in program.ops if isinstance(op, Embed)} - multiplied
    forms: dict[str, WeightForm] = {}
    for spec in program.weights:
        name = spec.name
        if name not in sources:
            continue
        stored = sources[name]
        types = {kind for kind, _ in stored}
        if name in multiplied or (name in tables and shrinks(types, roundings.get(name), dtype)):
            number, group = _product_format(stored, roundings.get(name, dtype))
            forms[name] = WeightForm("packed", number, spec.shape, name in paired, group)
        elif name in tables:
            forms[name] = WeightForm("table", types.pop() if len(types) == 1 else "float32", spec.shape)
        else:
            forms[name] = WeightForm("vector", "float32", spec.shape)
    return forms


def _product_format(stored: Sequence[tuple[str, int]], chosen: str) -> tuple[str, int]:
    """Format and group of a linear: 8 and 4 bits stay as they are where all of its sources have them."""
    for number in ("int8", "int4"):
        if all(kind == number for kind, _ in stored):
            return number, stored[0][1]
    return chosen, INT4_GROUP if chosen == "int4" else 0


def form_of(weight: Any) -> WeightForm:
    """The form of what a `WeightPacker` made."""
    if isinstance(weight, extension.load().PackedWeight):
        return WeightForm("packed", weight.format, tuple(weight.shape), weight.paired, weight.group)
    values = weight.values if isinstance(weight, PackedTable) else weight
    kind: Literal["table", "vector"] = "table" if isinstance(weight, PackedTable) else "vector"
    return WeightForm(kind, values.dtype.name, values.shape)


def assemble(form: WeightForm, parts: Sequence[NDArray[np.uint8]]) -> Any:
    """The weight of the form whose `byte_parts` these are; it keeps them. Raises ValueError where they do not
    fit."""
    if form.kind == "packed":
        rows, depth = form.shape
        data, scales = parts
        return extension.load().view_weight(form.format, form.paired, rows, depth, form.group, data, scales)
    (part,) = parts
    values = part.view(_TYPES[form.format]).reshape(form.shape)
    return PackedTable(values) if form.kind == "table" else values


def byte_parts(weight: Any) -> list[NDArray[np.uint8]]:
    """Views of the bytes of a weight: data and scales of a PackedWeight, else its numbers."""
    if isinstance(weight, extension.load().PackedWeight):
        parts = [weight.data, weight.scales]
    else:
        parts = [weight.values if isinstance(weight, PackedTable) else weight]
    return [part.reshape(-1).view(np.uint8) for part in parts]
