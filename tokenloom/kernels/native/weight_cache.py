"""Packed weights on disk, which the next start maps instead of packing: engines on one machine share them.

```
| magic, 8 | N, 8 | digest, 16 | JSON, N bytes | padding to 4096 | data, each part padded to 4096 |
```
A file is found by its key (checkpoint, formats, layout version), written beside its place and renamed. It is
used only if it holds exactly what this start would pack: the JSON has a digest, names and forms are compared
with the program's, the sizes must add up to the file's before anything is allocated, and every part has a
digest. Anything else counts as absent. The digests notice damage, not forgery: who can write to the directory
can change the weights. A file in use may be removed or replaced, but not cut short.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import logging
import mmap
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

import msgspec
import numpy as np

from tokenloom.errors import InvalidParameter
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.packed_forms import Sources, WeightForm, assemble, byte_parts, form_of

log = logging.getLogger(__name__)

LAYOUT_VERSION: Final = 2
"""Rises when the packed layout (native/src/kernels.hpp), the rounding at packing or this file's layout
changes."""

_MAGIC: Final = b"tlpacked"
_ALIGN: Final = 4096
_DIGEST_BYTES: Final = 16
_PREFIX: Final = len(_MAGIC) + 8 + _DIGEST_BYTES
_MAX_HEADER: Final = 16 << 20
_MAX_SCANNED: Final = 10_000
_NEVER_A_DIRECTORY: Final = (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PART_NAME: Final = re.compile(r"packed-([1-9][0-9]{0,8})-[0-9a-f]{8}\.part")


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    num_bytes: Annotated[int, msgspec.Meta(ge=0)]
    digest: int


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    form: WeightForm
    parts: list[_Part]


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    weights: list[_Entry]


_decode_header = msgspec.json.Decoder(_Header).decode


class WeightCache:
    """One directory of packed weights, which is made when the first are kept.

    `pool` is a native ThreadPool, on which digests are computed. `expect` says what would be packed from
    sources as they are stored (`expected_forms`). Raises `InvalidParameter` for a path that cannot be a
    directory; nothing else that is wrong with the directory or its files ends a start.
    """

    def __init__(
        self, directory: str | Path, pool: Any, expect: Callable[[Sources], Mapping[str, WeightForm]]
    ) -> None:
        self._directory = Path(directory)
        _check_directory(self._directory)
        self._pool = pool
        self._expect = expect
        self._native = extension.load()

    def path(self, key: str) -> Path:
        """Where the weights of `key` lie."""
        name = hashlib.blake2b(_versioned(key).encode(), digest_size=16).hexdigest()
        return self._directory / f"{name}.packed"

    def load(self, key: str, sources: Sources) -> dict[str, Any] | None:
        """The weights of `key`, or None where there is no file or not exactly what would be packed from
        `sources` (which is logged)."""
        path = self.path(key)
        wanted = self._expect(sources)
        try:
            with _open_regular(path) as file:
                return self._read(file.fileno(), key, wanted)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, MemoryError, msgspec.DecodeError) as error:
            log.warning("%s is not used, the weights are packed anew: %s", path, error)
            return None

    def save(self, key: str, weights: Mapping[str, Any]) -> None:
        """Keep the weights, in place of what may be there. Where that fails, the log says why."""
        temporary = self._directory / f"packed-{os.getpid()}-{secrets.token_hex(4)}.part"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self._directory)
            try:
                with open(temporary, "xb") as file:
                    _lock(file)
                    self._write(file, key, weights)
                    file.flush()
                    os.replace(temporary, self.path(key))
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
        except (OSError, ValueError) as error:
            log.warning(
                "weight_cache %s: the packed weights are not kept, the next start packs again: %s",
                self._directory,
                error,
            )

    def _write(self, file: BinaryIO, key: str, weights: Mapping[str, Any]) -> None:
        data = {name: byte_parts(weight) for name, weight in weights.items()}
        entries = [
            _Entry(
                name,
                form_of(weights[name]),
                [_Part(len(part), self._native.digest(self._pool, part)) for part in parts],
            )
            for name, parts in data.items()
        ]
        header = msgspec.json.encode(_Header(_versioned(key), entries))
        if len(header) > _MAX_HEADER:
            raise ValueError(f"a header of {len(header)} bytes, above {_MAX_HEADER}")
        file.write(_MAGIC + len(header).to_bytes(8, "little") + _header_digest(header) + header)
        file.write(bytes(-(_PREFIX + len(header)) % _ALIGN))
        for part in itertools.chain.from_iterable(data.values()):
            file.write(part.data)
            file.write(bytes(-len(part) % _ALIGN))

    def _read(self, file: int, key: str, wanted: Mapping[str, WeightForm]) -> dict[str, Any]:
        size = os.fstat(file).st_size
        header, position = _read_header(file, size)
        if header.key != _versioned(key):
            raise ValueError("it holds other weights")
        if [(entry.name, entry.form) for entry in header.weights] != list(wanted.items()):
            raise ValueError("its weights are not those of the program, by name or form")
        if (
            position + sum(_aligned(part.num_bytes) for entry in header.weights for part in entry.parts)
            != size
        ):
            raise ValueError("the sizes of its parts do not add up to its own")
        mapped = np.frombuffer(mmap.mmap(file, size, access=mmap.ACCESS_READ), np.uint8)
        weights: dict[str, Any] = {}
        for entry in header.weights:
            parts = []
            for part in entry.parts:
                parts.append(mapped[position : position + part.num_bytes])
                # This also brings the pages in, on all threads.
                if self._native.digest(self._pool, parts[-1]) != part.digest:
                    raise ValueError(f"{entry.name} is damaged (its digest differs)")
                position += _aligned(part.num_bytes)
            weights[entry.name] = assemble(entry.form, parts)
        return weights


def _check_directory(path: Path) -> None:
    """Raise `InvalidParameter` if there is something else at the path, or on the way to it."""
    try:
        found = stat.S_ISDIR(os.stat(path).st_mode)
        reason = "there is a file"
    except FileNotFoundError:
        found = not os.path.islink(path)
        reason = "there is a link to nothing"
    except (OSError, ValueError) as error:
        # A directory that cannot be reached now (permissions, a lost mount) may be one: the log tells then.
        found = isinstance(error, OSError) and error.errno not in _NEVER_A_DIRECTORY
        reason = getattr(error, "strerror", None) or str(error)
    if not found:
        raise InvalidParameter(
            "weight_cache", str(path), f"a directory or a path where one can be made; {reason}"
        )


def _versioned(key: str) -> str:
    return f"{LAYOUT_VERSION}:{key}"


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _header_digest(header: bytes) -> bytes:
    return hashlib.blake2b(header, digest_size=_DIGEST_BYTES).digest()


# --- reading ---------------------------------------------------------------------------------------------


def _open_regular(path: Path) -> BinaryIO:
    """The file, open for reading. Raises OSError, and ValueError for what is no regular file."""
    # O_NONBLOCK: opening a FIFO must not hang.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError("it is not a regular file")
    return os.fdopen(file, "rb", buffering=0)


def _read_header(file: int, size: int) -> tuple[_Header, int]:
    """The header and the position of the first part. Raises ValueError and `msgspec.DecodeError`."""
    prefix = os.pread(file, _PREFIX, 0)
    length = int.from_bytes(prefix[8:16], "little")
    if len(prefix) < _PREFIX or prefix[:8] != _MAGIC or length > min(size - _PREFIX, _MAX_HEADER):
        raise ValueError("no file of packed weights")
    header = os.pread(file, length, _PREFIX)
    if _header_digest(header) != prefix[16:]:
        raise ValueError("its header is damaged (the digest differs)")
    return _decode_header(header), _aligned(_PREFIX + length)


# --- unfinished files ------------------------------------------------------------------------------------


def _lock(file: BinaryIO) -> None:
    """Hold the file as long as it is open: the lock goes with the process, however that ends."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(directory: Path) -> None:
    """Remove what processes left that were killed while they wrote; they can be as big as the weights."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in itertools.islice(entries, _MAX_SCANNED)]
    for name in names:
        match = _PART_NAME.fullmatch(name)
        if match and _is_abandoned(directory / name, int(match[1])):
            with contextlib.suppress(OSError):
                os.unlink(directory / name)


def _is_abandoned(path: Path, pid: int) -> bool:
    """Whether no process has the number `pid`, or it is ours, and nobody holds the lock.

    Containers that share a directory count their processes apart: a number without a process may belong to a
    neighbour that writes, and one that is ours to a server before us, killed as the same first process.
    """
    is_ours = pid == os.getpid()
    if not is_ours and _is_running(pid):
        return False
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: only the number tells.
        return not is_ours
    finally:
        os.close(file)
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        # Anything else, such as a process of another user, is there.
        return error.errno != errno.ESRCH
    return True
