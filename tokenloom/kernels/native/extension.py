"""The compiled module, which an install without a C++ compiler does not have."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from tokenloom.errors import UnsupportedFeature


@cache
def missing() -> str | None:
    """Why there are no native kernels, or None where there are."""
    try:
        load()
    except UnsupportedFeature as error:
        return error.detail
    return None


def load() -> ModuleType:
    """The module. Raises `UnsupportedFeature` if it was not built or cannot be loaded."""
    try:
        return import_module("tokenloom.kernels.native._native")
    except ModuleNotFoundError:
        cure = "the extension was not built; install a C++20 compiler (g++ or clang++) and install tokenloom again"
        raise UnsupportedFeature("native kernels", cure) from None
    except ImportError as error:
        raise UnsupportedFeature("native kernels", f"the extension does not load: {error}") from None


def isas() -> list[str]:
    """Instruction sets that were compiled and that this processor has, the best first."""
    names: list[str] = load().isas()
    return names


def thread_pool(num_threads: int) -> Any:
    """Compute threads for packing and for steps, the caller's own included."""
    return load().ThreadPool(num_threads)
