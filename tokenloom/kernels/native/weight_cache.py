"""Packed weights on disk, so that the next start reads instead of packing.

```
| 8 bytes: magic | 8 bytes: N | N bytes: JSON {"key", "weights": [...]} | padding to 4096 | data, each part at 4096 |
```
A file is found by its key (content of the checkpoint, formats, version of the layout), written beside its
place and renamed, and every part carries a digest that is checked when it is read. The digest notices damage,
not forgery: who can write to the directory can write the checkpoint as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.weights import PackedTable

log = logging.getLogger(__name__)

LAYOUT_VERSION: Final = 1
"""Rises when the packed layout (native/src/kernels.hpp) or this file's changes."""

_MAGIC: Final = b"tlpacked"
_ALIGN: Final = 4096
_MAX_HEADER: Final = 64 << 20
_TYPES: Mapping[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class WeightCache:
    """One directory of packed weights. `pool` is a native ThreadPool, on which digests are computed."""

    def __init__(self, directory: str | Path, pool: Any) -> None:
        self._directory = Path(directory)
        self._pool = pool
        self._native = extension.load()

    def path(self, key: str) -> Path:
        """Where the weights of `key` lie."""
        name = hashlib.blake2b(f"{LAYOUT_VERSION}:{key}".encode(), digest_size=16).hexdigest()
        return self._directory / f"{name}.packed"

    def load(self, key: str) -> dict[str, Any] | None:
        """The weights of `key`, or None where there are none or the file is damaged (which is logged)."""
        path = self.path(key)
        try:
            with path.open("rb") as file:
                return self._read(file.fileno(), key, os.fstat(file.fileno()).st_size)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not used: %s", path, error)
            return None

    def save(self, key: str, weights: Mapping[str, Any]) -> None:
        """Keep the weights. Raises `ModelError` where the directory cannot be written."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._directory, suffix=".part")
        except OSError as error:
            raise ModelError(f"weight_cache: {error}", "a directory that can be written") from None
        try:
            with os.fdopen(handle, "wb") as file:
                self._write(file, key, weights)
            os.replace(temporary, self.path(key))
        except OSError as error:
            Path(temporary).unlink(missing_ok=True)
            raise ModelError(
                f"weight_cache: {error}", "a directory with room for the packed weights"
            ) from None

    def _write(self, file: Any, key: str, weights: Mapping[str, Any]) -> None:
        parts: list[NDArray[Any]] = []
        entries: list[dict[str, Any]] = []
        position = 0

        def add(array: NDArray[Any]) -> dict[str, Any]:
            nonlocal position
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            parts.append(raw)
            place = {"at": position, "bytes": len(raw), "digest": self._native.digest(self._pool, raw)}
            position += -(-len(raw) // _ALIGN) * _ALIGN
            return place

        for name, weight in weights.items():
            if isinstance(weight, self._native.PackedWeight):
                entry = {
                    "kind": "packed", "format": weight.format, "paired": weight.paired, "shape": weight.shape,
                    "group": weight.group, "data": add(weight.data), "scales": add(weight.scales),
                }  # fmt: skip
            else:
                values = weight.values if isinstance(weight, PackedTable) else weight
                kind = "table" if isinstance(weight, PackedTable) else "vector"
                entry = {"kind": kind, "dtype": values.dtype.name, "shape": values.shape, "data": add(values)}
            entries.append({"name": name, **entry})
        header = json.dumps({"key": key, "weights": entries}).encode()
        file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        file.write(bytes(-file.tell() % _ALIGN))
        for part in parts:
            file.write(part.data)
            file.write(bytes(-len(part) % _ALIGN))

    def _read(self, file: int, key: str, size: int) -> dict[str, Any]:
        prefix = os.pread(file, 16, 0)
        length = int.from_bytes(prefix[8:], "little")
        if prefix[:8] != _MAGIC or length > min(size, _MAX_HEADER):
            raise ValueError("no file of packed weights")
        header = json.loads(os.pread(file, length, 16))
        if header["key"] != key:
            raise ValueError("it holds other weights")
        base = -(-(16 + length) // _ALIGN) * _ALIGN

        def fill(place: Mapping[str, Any], out: NDArray[Any]) -> None:
            raw = out.reshape(-1).view(np.uint8)
            if len(raw) != place["bytes"] or not 0 <= place["at"] <= size - len(raw):
                raise ValueError("a part has another size")
            _read_fully(file, base + place["at"], raw)
            if self._native.digest(self._pool, raw) != place["digest"]:
                raise ValueError("a part is damaged (its digest differs)")

        weights: dict[str, Any] = {}
        for entry in header["weights"]:
            shape = tuple(int(n) for n in entry["shape"])
            if entry["kind"] == "packed":
                weight = self._native.empty_weight(
                    entry["format"], bool(entry["paired"]), *shape, int(entry["group"])
                )
                fill(entry["data"], weight.data)
                fill(entry["scales"], weight.scales)
                weights[entry["name"]] = weight
                continue
            values = np.empty(shape, _TYPES[entry["dtype"]])
            fill(entry["data"], values)
            weights[entry["name"]] = PackedTable(values) if entry["kind"] == "table" else values
        return weights


def _read_fully(file: int, position: int, out: NDArray[np.uint8]) -> None:
    done = 0
    while done < len(out):
        # A buffer of uint8 is writable memory, whatever the stubs say.
        count = os.preadv(file, [cast(Any, out[done:].data)], position + done)
        if count == 0:
            raise ValueError("the file is cut short")
        done += count
