"""What this machine has that matters for serving: processor, memory and bandwidth, compiler, BLAS."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

FEATURES = {
    "avx2": ("avx2",),
    "avx512f": ("avx512f",),
    "avx512_bf16": ("avx512_bf16",),
    "avx512_vnni": ("avx512_vnni",),
    "neon": ("neon", "asimd"),
}
"""Features that kernels care about, and the names that the kernel of the system gives them."""

PACKAGES = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "msgspec", "pyzmq", "starlette", "uvicorn")
COMPILERS = ("c++", "g++", "clang++")


def _fields(path: str) -> dict[str, str]:
    """First value of each `name : value` line of a /proc file; empty where there is no such file."""
    found: dict[str, str] = {}
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def processor() -> dict[str, Any]:
    """Model name, cores that this process may use, and which of `FEATURES` are there."""
    info = _fields("/proc/cpuinfo")
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "features": {name: bool(flags.intersection(names)) for name, names in FEATURES.items()},
    }


def memory() -> dict[str, Any]:
    """Total and available memory in GiB (0 where the system does not say)."""
    info = _fields("/proc/meminfo")

    def gib(name: str) -> float:
        return round(int(info.get(name, "0 kB").split()[0]) / (1 << 20), 1)

    return {"total_gib": gib("MemTotal"), "available_gib": gib("MemAvailable")}


def bandwidth(megabytes: int = 128, repeats: int = 4) -> dict[str, float]:
    """GB/s of copying and of reading an array of `megabytes` MiB with numpy; the best of `repeats`.

    Copying counts bytes read plus bytes written. Reading is a dot product, on the threads of the BLAS.
    """
    source = np.ones(megabytes << 18, np.float32)
    target = np.empty_like(source)
    copies, reads = [], []
    for _ in range(repeats):
        start = perf_counter()
        np.copyto(target, source)
        copied = perf_counter()
        np.dot(source, source)
        reads.append(perf_counter() - copied)
        copies.append(copied - start)
    return {
        "copy_gb_s": round(2 * source.nbytes / min(copies) / 1e9, 1),
        "read_gb_s": round(source.nbytes / min(reads) / 1e9, 1),
    }


def compiler() -> str:
    """The C++ compiler found first on the path and its version, or an empty string."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            result = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        first = result.stdout.splitlines()
        return f"{name}: {first[0]}" if first else name
    return ""


def blas() -> dict[str, Any]:
    """The BLAS that numpy was built with, and how many threads it uses (0 where it does not say)."""
    config: Any = np.show_config(mode="dicts")
    built = config.get("Build Dependencies", {}).get("blas", {})
    return {
        "name": built.get("name", "unknown"),
        "version": built.get("version", "unknown"),
        "threads": _blas_threads(),
    }


def _blas_threads() -> int:
    np.dot(np.ones(2), np.ones(2))
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return 0
    libraries = {line.split()[-1] for line in maps.splitlines() if "openblas" in line}
    for library in sorted(libraries):
        handle = ctypes.CDLL(library)
        for prefix in ("scipy_openblas", "openblas"):
            for suffix in ("64_", ""):
                ask = getattr(handle, f"{prefix}_get_num_threads{suffix}", None)
                if ask is not None:
                    return int(ask())
    return 0


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that serving uses."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
