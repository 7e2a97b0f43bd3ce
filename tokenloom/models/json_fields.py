"""JSON from a stranger's directory, read field by field: a refusal names file, field and limit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from tokenloom.errors import ModelError
from tokenloom.errors import shorten as shorten
from tokenloom.regular_file import open_regular as open_regular

MAX_CONFIG_BYTES = 8 << 20
"""Largest config.json or generation_config.json that is read; real ones have a few kilobytes."""


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. Raises `ModelError` if it is absent, above `max_bytes`, or no object."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ModelError(f"{path} of {size} bytes", f"at most {max_bytes} bytes")
        return parse_json(file.read(max_bytes + 1), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; `where` names it in errors.

    Stricter than `json`: UTF-8 only, no NaN or Infinity, no key twice in one object (two readers of such a
    file may disagree on what it says). Raises `ModelError`.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except RecursionError:
        raise ModelError(f"{where}: JSON nested too deeply", "a JSON object") from None
    except ValueError as error:  # bad UTF-8, bad JSON, integers of thousands of digits, the two hooks
        raise ModelError(f"{where}: {error}", "a JSON object in UTF-8") from None
    if not isinstance(value, dict):
        raise ModelError(f"{where}: JSON of type {type(value).__name__}", "a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)
    return result


class Fields:
    """Typed look-ups in one JSON object. A field that is absent or null takes its default.

    `file` and `prefix` (such as "rope_scaling.") name a field in errors. Every method raises `ModelError`.
    """

    def __init__(self, data: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self.data = data
        self.file = file
        self.prefix = prefix

    def refuse(self, name: str, supported: str) -> NoReturn:
        """Raise the error that `name` has a value outside of what is supported."""
        field = self.prefix + name
        if name not in self.data:
            raise ModelError(f"{self.file} without {field}", f"{field} as {supported}")
        raise ModelError(f"{self.file}: {field} = {shorten(self.data[name])}", supported)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]. Without a default the field is required."""
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in [low, high], or None where it is absent or null."""
        return None if self.data.get(name) is None else self.integer(name, low, high)

    def number(
        self, name: str, low: float, high: float, default: float | None = None, *, above: bool = False
    ) -> float:
        """A finite number in [low, high]; `above` excludes `low` itself. Without a default it is required."""
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        limit = f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
        if not is_number(value) or not low <= value <= high or (above and value == low):
            self.refuse(name, limit)
        return float(value)

    def optional_number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
        """As `number`, or None where the field is absent or null."""
        return None if self.data.get(name) is None else self.number(name, low, high, above=above)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...] | None:
        """One token id or a list of them, as a tuple without repeats; None where it is absent or null."""
        value = self.data.get(name)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                self.refuse(name, f"token ids from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is an int or a finite float that fits a float (and no bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value)
