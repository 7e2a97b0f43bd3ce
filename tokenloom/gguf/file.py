"""A GGUF file on this machine: where it is, its metadata by key and type, and views of its tensors."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError, shorten
from tokenloom.gguf.header import Array, TensorInfo, Value, parse_header, read_numbers, read_strings
from tokenloom.regular_file import open_regular

SUFFIX: Final = ".gguf"


def find_gguf(path: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that `path` means: a file, or the only .gguf of a directory without config.json; None for
    any other directory. Raises `ModelError` for a directory that leaves the choice between several."""
    path = Path(path)
    if not path.is_dir():
        return path if path.exists() else None
    if (path / "config.json").exists():
        return None
    try:
        found = sorted(entry.name for entry in os.scandir(path) if entry.name.lower().endswith(SUFFIX))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", "a readable directory") from None
    if len(found) > 1:
        raise ModelError(
            f"{len(found)} {SUFFIX} files in {path}: {shorten(found, 500)}", "one of them by its path"
        )
    return path / found[0] if found else None


class GgufFile:
    """One mapped file; a context manager. `tensors` lists its tensors, `read` gives the bytes of one.

    `size` and `mtime_ns` are those of the file when it was opened. Raises `ModelError` where the header is not
    sound. The map follows the file: one that is cut while it is mapped can end the process, as with any mapped
    file. The look-ups of metadata raise `ModelError` with the key for a value of another type or beyond its
    limits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(open_regular(path), "rb") as file:
            status = os.fstat(file.fileno())
            self.size = status.st_size
            self.mtime_ns = status.st_mtime_ns
            if self.size == 0:
                raise ModelError(f"{path} of 0 bytes", "a GGUF file")
            try:
                self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ModelError(f"{path}: {error}", "a file that can be mapped") from None
        try:
            header = parse_header(self._map, str(path))
        except BaseException:
            self._map.close()
            raise
        self.metadata: Mapping[str, Value] = header.metadata
        self.tensors: Mapping[str, TensorInfo] = header.tensors
        self._header_size = header.size

    @property
    def header_bytes(self) -> bytes:
        """Everything before the tensors: metadata, and the tensors' names, types and shapes."""
        return self._map[: self._header_size]

    def read(self, info: TensorInfo) -> NDArray[np.uint8]:
        """A read-only view of the bytes of a tensor, or of a part of one; valid while it is held, also after
        `close`."""
        return np.frombuffer(self._map, np.uint8, info.end - info.begin, info.begin)

    def release(self, info: TensorInfo) -> None:
        """Give the pages of these bytes back to the system; they are read again from the file if needed."""
        begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = info.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Unmap the file; while views are held, it stays mapped until the last one goes."""
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- metadata ----------------------------------------------------------------------------------------

    def refuse(self, key: str, supported: str) -> NoReturn:
        """Raise the error that `key` has a value outside of what is supported, or none."""
        if key not in self.metadata:
            raise ModelError(f"{self.path} without {key}", f"{key} as {supported}")
        value = self.metadata[key]
        shown = f"an array of {value.count}" if isinstance(value, Array) else shorten(value)
        raise ModelError(f"{self.path}: {key} = {shown}", supported)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]. Without a default the key is required."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(key, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        """As `integer`, or None where the key is absent."""
        return self.integer(key, low, high) if key in self.metadata else None

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Without a default the key is required."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            self.refuse(key, "a finite number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """As `number`, or None where the key is absent."""
        return self.number(key) if key in self.metadata else None

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Without a default the key is required."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        """An array of strings, which is required."""
        array = self.metadata.get(key)
        if not isinstance(array, Array) or array.dtype:
            self.refuse(key, "an array of strings")
        return read_strings(self._map, array, f"{self.path}: {key}")

    def numbers(self, key: str) -> NDArray[Any]:
        """An array of numbers (bools as 0 and 1), which is required."""
        array = self.metadata.get(key)
        if not isinstance(array, Array) or not array.dtype:
            self.refuse(key, "an array of numbers")
        return read_numbers(self._map, array)
