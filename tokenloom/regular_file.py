"""Opening a file that somebody else put there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tokenloom.errors import ModelError


def open_regular(path: Path) -> int:
    """A read-only file descriptor of a regular file; the caller closes it.

    Raises `ModelError` for anything else. O_NONBLOCK: opening a FIFO in the directory must not hang.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"{path}: {reason}", "a readable file") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelError(f"{path}, which is not a regular file", "a readable file")
    return fd
