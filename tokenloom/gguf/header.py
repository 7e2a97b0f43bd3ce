"""The header of a GGUF file (versions 2 and 3, little endian), checked in full before any of its numbers is used.

```
| "GGUF" | version, 4 | tensors, 8 | entries, 8 | entry ... | tensor ... | padding | tensor bytes ... |
entry    key, type, value         tensor   name, dimensions (innermost first), type, offset
string   length 8, bytes          array    item type 4, count 8, items
```
The `gguf` package reads the same format, but it believes every count and offset; here each is compared with the
size of the file first. Arrays are not read until they are asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError, shorten
from tokenloom.gguf.types import SERVED, TYPES, TensorType, type_name

MAGIC: Final = b"GGUF"

# Far above every published file; they bound what a broken one can make anybody compute or allocate.
MAX_ENTRIES: Final = 1 << 16
MAX_TENSORS: Final = 1 << 17
MAX_STRINGS: Final = 1 << 23
MAX_HEADER_BYTES: Final = 1 << 28
MAX_KEY_BYTES: Final = (1 << 16) - 1
MAX_NAME_BYTES: Final = 63
MAX_DIMENSIONS: Final = 4
MAX_DIMENSION: Final = 1 << 40
MAX_ALIGNMENT: Final = 1 << 20

_DEFAULT_ALIGNMENT: Final = 32
_ALIGNMENT_KEY: Final = "general.alignment"
_STRING: Final = 8
_ARRAY: Final = 9
_BOOL: Final = 7
_SCALARS: Final[Mapping[int, str]] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "|b1", 10: "<u8", 11: "<i8",
    12: "<f8",
}  # fmt: skip
_COMPLETE: Final = "a complete GGUF file"


class Buffer(Protocol):
    """Bytes of a file: an `mmap.mmap`, or `bytes` in tests."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the metadata that is still in the file: `count` items of the numpy type `dtype` ("" for
    strings) from byte `begin` on."""

    dtype: str
    count: int
    begin: int


Value = int | float | bool | str | Array


class TensorInfo(NamedTuple):
    """One tensor: its shape with the rows last, as numpy has it; bytes [begin, end) from the start of the file."""

    kind: TensorType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the numbers. `size` is the length of the metadata and of the tensors' list in bytes."""

    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    size: int


def parse_header(data: Buffer, where: str) -> Header:
    """The header of the file `data`; `where` names it in errors.

    Raises `ModelError` for another format or version, counts and lengths beyond the file or the limits above,
    keys or tensors that stand there twice, arrays of arrays, text that is not UTF-8, types that are not served,
    rows that are no multiple of their block, and tensors that overlap, are not aligned or leave the file.
    """
    cursor = _Cursor(data, where)
    magic = cursor.take(4)
    if magic != MAGIC:
        raise ModelError(f"{where} that begins with {magic!r}", "a GGUF file (it begins with b'GGUF')")
    version = cursor.number("<u4")
    if version not in (2, 3):
        hint = ", written for big-endian machines" if version in (2 << 24, 3 << 24) else ""
        raise ModelError(f"{where} of GGUF version {version}{hint}", "versions 2 and 3, little endian")
    num_tensors = cursor.count("tensors", MAX_TENSORS, least=24)
    num_entries = cursor.count("metadata entries", MAX_ENTRIES, least=13)
    metadata: dict[str, Value] = {}
    for _ in range(num_entries):
        key = cursor.text("a metadata key", MAX_KEY_BYTES)
        if key in metadata:
            raise ModelError(f"{where} with the key {shorten(key)} twice", "one value a key")
        metadata[key] = cursor.value(key)
    written = [cursor.tensor() for _ in range(num_tensors)]
    alignment = _alignment(metadata, where)
    start = -(-cursor.position // alignment) * alignment
    tensors = _placed(written, start, alignment, len(data), where)
    return Header(version, metadata, tensors, cursor.position)


def read_strings(data: Buffer, array: Array, where: str) -> list[str]:
    """The items of an array of strings. Raises `ModelError` for one that is not UTF-8."""
    cursor = _Cursor(data, where, array.begin)
    return [cursor.text(f"item {i}", MAX_HEADER_BYTES) for i in range(array.count)]


def read_numbers(data: Buffer, array: Array) -> NDArray[Any]:
    """A copy of an array of numbers."""
    dtype = np.dtype(array.dtype)
    return np.frombuffer(data[array.begin : array.begin + array.count * dtype.itemsize], dtype)


class _Written(NamedTuple):
    name: str
    kind: TensorType
    shape: tuple[int, ...]
    num_bytes: int
    offset: int


class _Cursor:
    """Reads on from a position; every method raises `ModelError` at the end of the file."""

    def __init__(self, data: Buffer, where: str, position: int = 0) -> None:
        self._data = data
        self._size = len(data)
        self._where = where
        self._strings = 0
        self.position = position

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > self._size:
            raise ModelError(f"{self._where} of {self._size} bytes, which is cut short", _COMPLETE)
        if end > MAX_HEADER_BYTES:
            raise ModelError(f"{self._where} with a header beyond byte {end}", f"at most {MAX_HEADER_BYTES}")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, dtype: str) -> Any:
        item = np.dtype(dtype)
        return np.frombuffer(self.take(item.itemsize), item)[0].item()

    def length(self) -> int:
        """A count or a length of 8 bytes."""
        value: int = struct.unpack("<Q", self.take(8))[0]
        return value

    def count(self, what: str, most: int, least: int) -> int:
        """A number of things that take at least `least` bytes each."""
        found = self.length()
        if found > most or found * least > self._size - self.position:
            limit = min(most, max(self._size - self.position, 0) // least)
            raise ModelError(f"{self._where} with {found} {what}", f"at most {limit} in {self._size} bytes")
        return found

    def text(self, what: str, most: int) -> str:
        length = self.length()
        if length > most:
            raise ModelError(f"{self._where}: {what} of {length} bytes", f"at most {most} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{self._where}: {what} that is not UTF-8", "text in UTF-8") from None

    def value(self, key: str) -> Value:
        kind = self.number("<u4")
        if kind == _STRING:
            return self.text(key, MAX_HEADER_BYTES)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise ModelError(f"{self._where}: {shorten(key)} of value type {kind}", "types 0 to 12")
        return self._scalar(key, kind)

    def tensor(self) -> _Written:
        name = self.text("a tensor's name", MAX_NAME_BYTES)
        what = f"{self._where}: tensor {shorten(name)}"
        num_dimensions = self.number("<u4")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise ModelError(f"{what} of {num_dimensions} dimensions", f"1 to {MAX_DIMENSIONS}")
        shape = tuple(self.length() for _ in range(num_dimensions))[::-1]
        if not all(1 <= size <= MAX_DIMENSION for size in shape):
            raise ModelError(f"{what} of shape {list(shape)}", f"sizes from 1 to {MAX_DIMENSION}")
        number = self.number("<u4")
        kind = TYPES.get(number)
        if kind is None:
            raise ModelError(f"{what} of type {type_name(number)}", SERVED)
        if shape[-1] % kind.block:
            raise ModelError(f"{what}: rows of {shape[-1]} in {kind.name}", f"a multiple of {kind.block}")
        num_bytes = kind.block_bytes * (shape[-1] // kind.block)
        for size in shape[:-1]:
            num_bytes *= size
        return _Written(name, kind, shape, num_bytes, self.length())

    def _array(self, key: str) -> Array:
        kind = self.number("<u4")
        if kind == _STRING:
            count = self.count(f"items in {shorten(key)}", MAX_STRINGS - self._strings, least=8)
            self._strings += count
            begin = self.position
            for _ in range(count):
                self._skip(self.length())
            return Array("", count, begin)
        if kind not in _SCALARS:
            nested = "an array of arrays" if kind == _ARRAY else f"an array of type {kind}"
            raise ModelError(f"{self._where}: {shorten(key)} is {nested}", "arrays of numbers or strings")
        dtype = np.dtype(_SCALARS[kind])
        count = self.count(f"items in {shorten(key)}", MAX_HEADER_BYTES, least=dtype.itemsize)
        begin = self.position
        self._skip(count * dtype.itemsize)
        # A byte that is neither 0 nor 1 is no bool, and numpy must not be told that it is.
        return Array("|u1" if kind == _BOOL else _SCALARS[kind], count, begin)

    def _scalar(self, key: str, kind: int) -> Value:
        if kind != _BOOL:
            number: int | float = self.number(_SCALARS[kind])
            return number
        byte = self.number("<u1")
        if byte > 1:
            raise ModelError(f"{self._where}: {shorten(key)} is a bool of value {byte}", "0 or 1")
        return bool(byte)

    def _skip(self, length: int) -> None:
        end = self.position + length
        if end > min(self._size, MAX_HEADER_BYTES):
            self.position = min(self.position, self._size)
            self.take(length)
        self.position = end


def _alignment(metadata: Mapping[str, Value], where: str) -> int:
    value = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    if type(value) is int and 8 <= value <= MAX_ALIGNMENT and not value & (value - 1):
        return value
    limit = f"a power of two from 8 to {MAX_ALIGNMENT}"
    raise ModelError(f"{where}: {_ALIGNMENT_KEY} = {shorten(value)}", limit)


def _placed(
    written: list[_Written], start: int, alignment: int, size: int, where: str
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for tensor in written:
        name = shorten(tensor.name)
        if tensor.name in tensors:
            raise ModelError(f"{where} with tensor {name} twice", "one tensor a name")
        if tensor.offset % alignment:
            raise ModelError(
                f"{where}: tensor {name} at offset {tensor.offset}", f"multiples of {alignment} bytes"
            )
        begin = start + tensor.offset
        end = begin + tensor.num_bytes
        if end > size:
            raise ModelError(f"{where} of {size} bytes: tensor {name} ends at byte {end}", _COMPLETE)
        tensors[tensor.name] = TensorInfo(tensor.kind, tensor.shape, begin, end)
    before, last = "", 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].begin):
        if info.begin < last:
            raise ModelError(
                f"{where}: tensors {shorten(before)} and {shorten(name)} overlap", "a place each"
            )
        before, last = name, info.end
    return tensors
