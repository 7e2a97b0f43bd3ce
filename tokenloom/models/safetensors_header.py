"""The header of a safetensors file, checked in full before any of its numbers is used.

```
| 8 bytes: N, little endian | N bytes: JSON {name: {dtype, shape, data_offsets}, ...} | tensor bytes ... |
```
The safetensors package reads the same format, but hands numpy copies of the tensors; serving wants views of a
mapped file whose pages it can give back. The rules are those of the package: tensors lie back to back in the
order of their offsets, and the file ends with the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from tokenloom.errors import ModelError
from tokenloom.models.json_fields import parse_json, shorten

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors package."""

ITEM_BYTES: Mapping[str, int] = {
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of one number, by the format's name of the type. No other type is served. Integers are for the parts of
quantised linears; U8 and BOOL for causal masks, which old checkpoints store and nobody reads."""

_COMPLETE = "a complete file"
_MAX_DIMENSIONS = 8
_MAX_DIMENSION = 1 << 40


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `dtype` as the format names it, bytes [begin, end) counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(prefix: bytes, file_size: int, where: str) -> int:
    """The number of JSON bytes that follow `prefix`, the first 8 bytes of a file of `file_size` bytes."""
    if len(prefix) < 8:
        raise ModelError(f"{where} of {file_size} bytes", "a safetensors file (8 bytes of length come first)")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{where} with a header of {length} bytes", f"at most {MAX_HEADER_BYTES} bytes")
    if length > file_size - 8:
        raise ModelError(
            f"{where} of {file_size} bytes with a header of {length}, so it is cut short", _COMPLETE
        )
    return length


def parse_entries(header: bytes, file_size: int, where: str) -> dict[str, TensorEntry]:
    """The tensors that a JSON header lists, by name.

    Raises `ModelError` for a type that is not in `ITEM_BYTES`, a shape that does not give the tensor's bytes,
    tensors that overlap or leave a gap, and a file that is shorter or longer than its header says.
    """
    start = 8 + len(header)
    entries: dict[str, TensorEntry] = {}
    for name, value in parse_json(header, where + " (header)").items():
        if name != "__metadata__":
            entries[name] = _entry(value, start, f"{where}: tensor {shorten(name)}")
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ModelError(
                f"{where}: tensor {shorten(name)} at byte {entry.begin}, where byte {position} is next",
                "tensors back to back, without overlap or gap",
            )
        position = entry.end
    if position != file_size:
        verdict = "is cut short" if position > file_size else "has bytes after the last tensor"
        raise ModelError(
            f"{where} of {file_size} bytes, whose header says {position}: it {verdict}", _COMPLETE
        )
    return entries


def _entry(value: Any, start: int, where: str) -> TensorEntry:
    if not isinstance(value, dict):
        raise ModelError(f"{where}: {shorten(value)}", "an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ModelError(f"{where} of dtype {shorten(dtype)}", ", ".join(ITEM_BYTES))
    if not _is_integers(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ModelError(f"{where}: shape {shorten(shape)}", f"at most {_MAX_DIMENSIONS} integers from 0")
    if not _is_integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{where}: data_offsets {shorten(offsets)}", "two integers [begin, end]")
    num_bytes = ITEM_BYTES[dtype]
    for size in shape:
        num_bytes *= size
    if num_bytes != offsets[1] - offsets[0]:
        found = f"{offsets[1] - offsets[0]} bytes for {dtype} {shorten(shape)}"
        raise ModelError(f"{where}: {found}", f"{shorten(num_bytes)} bytes")
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_integers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= _MAX_DIMENSION for item in value
    )
