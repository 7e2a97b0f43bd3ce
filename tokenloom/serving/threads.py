"""How many threads the matrix library of a process may use."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path

from tokenloom.config import MAX_THREADS


def num_threads(threads: int) -> int:
    """`threads`, or where it is 0 one per core that this process may run on, at most `MAX_THREADS`."""
    if threads > 0:
        return threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def thread_environment(threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that is to use that many threads: BLAS reads it when numpy is loaded.

    Where `threads` is 0, what the environment says already stays.
    """
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    wanted = dict.fromkeys(names, str(num_threads(threads)))
    return {**environment, **wanted} if threads > 0 else {**wanted, **environment}


def set_blas_threads(threads: int) -> bool:
    """Change the number of threads of the OpenBLAS that is loaded already; False if there is none.

    For an engine inside a process that has imported numpy before it knew the configuration.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return False
    found = False
    for library in sorted(set(re.findall(r"/\S*openblas\S*", maps.read_text()))):
        handle = ctypes.CDLL(library)
        for name in (
            "scipy_openblas_set_num_threads64_",
            "scipy_openblas_set_num_threads",
            "openblas_set_num_threads",
        ):
            if hasattr(handle, name):
                getattr(handle, name)(num_threads(threads))
                found = True
                break
    return found
