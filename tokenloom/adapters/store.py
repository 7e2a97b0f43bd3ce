"""Adapters kept by content in a data directory, so that a running request can rely on what it started with.

```
<directory>/<content id>.safetensors    the modules under the names that peft gives their tensors, scales as metadata
<directory>/.lock                       held (flock) while a file is added or removed
<directory>/.adding                     a file that is being written; renamed when it is complete and on the disk
```
A file does not depend on a program: where its modules lie is found when it is opened. Everything under a content
id was checked against it, so damage is noticed and never served.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenloom.adapters.adapter import Adapter, LoraModule, content_id, place_modules
from tokenloom.adapters.peft_directory import PREFIX, group_tensors
from tokenloom.adapters.tensor_file import DTYPES, TensorFile
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.kernels.program import Program
from tokenloom.models.checkpoint import SafetensorsFile
from tokenloom.models.json_fields import is_number, parse_json

DEFAULT_MAX_BYTES: Final = 16 << 30

_ID = re.compile(r"[0-9a-f]{32}")
_SUFFIX = ".safetensors"
_ADDING = ".adding"
_LOCK = ".lock"
_SCALES = "scales"
_NAMES = {np.dtype(dtype).name: name for name, dtype in DTYPES.items()}


class AdapterStore:
    """The adapters in one directory, which is made (mode 0700) where it is not there. Any number of processes may
    use it at a time.

    `max_bytes` limits the bytes of all its files. Raises `InvalidParameter` for a path that cannot be a directory.
    """

    def __init__(self, directory: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.directory = Path(directory)
        self._max_bytes = max_bytes
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise InvalidParameter(
                "adapter directory", str(directory), f"a directory that can be written to ({error})"
            ) from None

    def path(self, content_id: str) -> Path:
        """Where the adapter of this id lies, if it is there. Raises `InvalidParameter` for what is no id."""
        if not isinstance(content_id, str) or _ID.fullmatch(content_id) is None:
            raise InvalidParameter("content_id", content_id, "32 hexadecimal digits in lower case")
        return self.directory / f"{content_id}{_SUFFIX}"

    def add(self, adapter: Adapter) -> Path:
        """Keep `adapter`; its file, which is on the disk when this returns.

        One that is there already is verified, and replaced if it is damaged. Raises `ModelError` where the store
        would exceed its limit, and `OSError` where the disk does not take the file; the store is then as before.
        It waits while another process adds or removes one.
        """
        path = self.path(adapter.content_id)
        header = _header(adapter.modules)
        size = 8 + len(header) + adapter.num_bytes
        with self._locked():
            if _is_sound(path, adapter.content_id):
                return path
            others = sum(status.st_size for name, status in self._files() if name != path.name)
            if others + size > self._max_bytes:
                raise ModelError(
                    f"an adapter of {size} bytes beside {others} bytes in {self.directory}",
                    f"at most {self._max_bytes} bytes of adapters; remove some, or raise the limit",
                )
            temporary = self.directory / _ADDING
            try:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
                _write(temporary, header, adapter.modules)
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            _sync(self.directory)
        return path

    def open(
        self, content_id: str, program: Program, *, source_rows: Mapping[str, tuple[int, ...]]
    ) -> Adapter:
        """The adapter of this id over `program`, its arrays views of the mapped file, which stay valid when it is
        removed. Every byte is read once, to verify it.

        Raises `ModelError` where it is not there, is damaged, or does not fit the program.
        """
        modules = _read(self.path(content_id), content_id)
        return place_modules(modules, program, source_rows=source_rows)

    def remove(self, content_id: str) -> bool:
        """Remove the adapter of this id; whether it was there."""
        path = self.path(content_id)
        with self._locked():
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            _sync(self.directory)
        return True

    def ids(self) -> tuple[str, ...]:
        """The content ids that are kept, sorted."""
        return tuple(sorted(name.removesuffix(_SUFFIX) for name, _ in self._files()))

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(status.st_size for _, status in self._files())

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if not entry.name.endswith(_SUFFIX) or not _ID.fullmatch(entry.name.removesuffix(_SUFFIX)):
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
                    yield entry.name, entry.stat()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _sorted_arrays(modules: tuple[LoraModule, ...]) -> list[tuple[str, NDArray[Any]]]:
    """Tensors by name, those of wider types first, so that each is aligned to its type."""
    arrays = [
        (f"{PREFIX}{module.name}.lora_{part}.weight", array)
        for module in modules
        for part, array in (("A", module.a), ("B", module.b))
    ]
    return sorted(arrays, key=lambda item: (-item[1].dtype.itemsize, item[0]))


def _header(modules: tuple[LoraModule, ...]) -> bytes:
    scales = {module.name: module.scale for module in modules}
    header: dict[str, Any] = {"__metadata__": {"format": "np", _SCALES: json.dumps(scales)}}
    offset = 0
    for name, array in _sorted_arrays(modules):
        end = offset + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode("ascii")
    return text + b" " * (-len(text) % 8)


def _write(path: Path, header: bytes, modules: tuple[LoraModule, ...]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, array in _sorted_arrays(modules):
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Put the names in the directory on the disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some file systems do not sync directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _is_sound(path: Path, content_id: str) -> bool:
    try:
        _read(path, content_id)
    except ModelError:
        return False
    return True


def _read(path: Path, wanted: str) -> list[LoraModule]:
    """The modules in a file of the store. Raises `ModelError` unless their content id is `wanted`."""
    if not os.path.lexists(path):
        raise ModelError(f"no adapter {wanted} in {path.parent}", "the adapters that were added")
    with TensorFile(path) as file:
        found, problems = group_tensors(file)
        written = file.metadata.get(_SCALES)
    scales = parse_json(written.encode(), str(path)) if isinstance(written, str) else {}
    if problems or set(scales) != set(found) or not all(map(is_number, scales.values())):
        raise _damaged(path)
    mapped = SafetensorsFile(path)
    modules: list[LoraModule] = []
    for name, tensors in found.items():
        if set(tensors) != {"A", "B"}:
            raise _damaged(path)
        a, b = mapped.read(tensors["A"]), mapped.read(tensors["B"])
        if a.ndim != 2 or b.ndim != 2:
            raise _damaged(path)
        modules.append(LoraModule(name, a, b, float(scales[name])))
    if content_id(modules) != wanted:
        raise _damaged(path)
    return modules


def _damaged(path: Path) -> ModelError:
    return ModelError(f"{path}, which is damaged", "an adapter as it was added; remove it and add it again")
