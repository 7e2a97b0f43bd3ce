"""The compiled module, which an install that could not build it does not have."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Final

from tokenloom.errors import UnsupportedFeature

_MODULE: Final = "tokenloom.kernels.native._native"

_NOT_THERE: Final = (
    "there is no extension for this Python; an install builds it where it finds a C++20 compiler and cmake "
    "(`pip install -v .` in the sources shows why not)"
)


@cache
def missing() -> str | None:
    """Why there are no native kernels, or None where there are."""
    try:
        load()
    except UnsupportedFeature as error:
        return error.detail
    return None


def load() -> ModuleType:
    """The module. Raises `UnsupportedFeature` if it is not there or cannot be loaded."""
    try:
        return import_module(_MODULE)
    except ImportError as error:
        # A module that the extension itself wants and does not find is an error of loading.
        absent = isinstance(error, ModuleNotFoundError) and error.name == _MODULE
        reason = _NOT_THERE if absent else f"the extension does not load: {error}"
        raise UnsupportedFeature("native kernels", reason) from None


def isas() -> list[str]:
    """Instruction sets that were compiled and that this processor has, the best first."""
    names: list[str] = load().isas()
    return names


def thread_pool(num_threads: int) -> Any:
    """Compute threads for packing and for steps, the caller's own included."""
    return load().ThreadPool(num_threads)
