"""A safetensors file of somebody else, read into memory.

Checkpoints are mapped. An adapter is small, and its directory may be written to while it is served; a mapped file
that is cut short ends the process that looks at it, so here every number is copied and the file is looked at
again afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.models.json_fields import open_regular, parse_json
from tokenloom.models.safetensors_header import TensorEntry, parse_entries, parse_header

MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 4 << 20
"""A header has about 150 bytes a tensor; the largest models have some thousand linears."""

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""The types that are read, by the format's name."""


class TensorFile:
    """One open file; a context manager. `entries` lists its tensors, `metadata` is the object of that name.

    Raises `ModelError` if it is absent, no regular file, too large, cut short, or its header is not sound.
    """

    entries: dict[str, TensorEntry]
    metadata: Mapping[str, Any]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = open_regular(path)
        try:
            self._stamp = _stamp(self._fd)
            self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def _read_header(self) -> None:
        size = self._stamp[1]
        if size > MAX_FILE_BYTES:
            raise ModelError(f"{self.path} of {size} bytes", f"at most {MAX_FILE_BYTES} bytes")
        length = parse_header(os.pread(self._fd, 8, 0), size, str(self.path))
        if length > MAX_HEADER_BYTES:
            raise ModelError(
                f"{self.path} with a header of {length} bytes", f"at most {MAX_HEADER_BYTES} bytes"
            )
        header = os.pread(self._fd, length, 8)
        self.entries = parse_entries(header, size, str(self.path))
        metadata = parse_json(header, f"{self.path} (header)").get("__metadata__")
        self.metadata = metadata if isinstance(metadata, dict) else {}

    def read(self, name: str) -> NDArray[Any]:
        """A read-only copy of a tensor of one of `DTYPES`. Raises `ModelError` if the file ends before it does."""
        entry = self.entries[name]
        found = np.empty(entry.shape, DTYPES[entry.dtype])
        waiting = found.reshape(-1).view(np.uint8).data
        place = entry.begin
        while waiting.nbytes:
            count = os.preadv(self._fd, [waiting], place)
            if count == 0:
                raise ModelError(f"{self.path}, which was cut while it was read", "a complete file")
            waiting, place = waiting[count:], place + count
        found.flags.writeable = False
        return found

    def check_unchanged(self) -> None:
        """Raise `ModelError` if the file was written to since it was opened."""
        if _stamp(self._fd) != self._stamp:
            raise ModelError(f"{self.path}, which was changed while it was read", "a complete file")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def _stamp(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_mtime_ns, status.st_size
