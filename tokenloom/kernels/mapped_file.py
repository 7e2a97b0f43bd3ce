"""Files mapped into memory without a file descriptor each: Python's own mapping keeps one open, and a process with a
thousand adapters has no thousand to spare."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FAILED = ctypes.c_void_p(-1).value


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file that is not empty, read-only [size]; unmapped with the last view of them. The file must
    not become shorter meanwhile. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address in (None, _FAILED):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(fd)
    buffer = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(buffer, _libc().munmap, address, size).atexit = False
    data = np.ctypeslib.as_array(buffer)
    data.flags.writeable = False
    return data


def read_ahead(data: NDArray[Any]) -> None:
    """Have the system read a contiguous part of a mapped file, without waiting for it. It may decline."""
    if data.nbytes and hasattr(mmap, "MADV_WILLNEED"):
        start = data.ctypes.data
        before = start % mmap.PAGESIZE
        _libc().madvise(start - before, data.nbytes + before, mmap.MADV_WILLNEED)
