"""Look-ups in a `quantization_config`: each refusal names the field and its value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from tokenloom.errors import ModelError
from tokenloom.quantization.packed_parts import GROUP_STEP

_MAX_SIZE = 1 << 20
"""Above every published group or block; a linear has no more inputs."""


class Written:
    """One object in `file` at `path`, such as "quantization_config". Every method raises `ModelError` with the
    field's name and value."""

    def __init__(self, data: Mapping[str, Any], file: str, path: str, method: object = None) -> None:
        self.data = data
        self._file = file
        self._path = path
        self._method = data.get("quant_method") if method is None else method

    def refuse(self, name: str, supported: str) -> NoReturn:
        of = "" if name == "quant_method" else f" (quant_method {shorten(self._method)})"
        if name not in self.data:
            raise ModelError(f"{self._file} without {self._path}.{name}{of}", supported)
        raise ModelError(f"{self._file}: {self._path}.{name} = {shorten(self.data[name])}{of}", supported)

    def inner(self, name: str) -> Written:
        """The object in a field."""
        value = self.data.get(name)
        if not isinstance(value, Mapping):
            self.refuse(name, "an object")
        return Written(value, self._file, f"{self._path}.{name}", self._method)

    def bits(self, name: str, *allowed: int) -> int:
        value = self.data.get(name)
        if type(value) is not int or value not in allowed:
            self.refuse(name, " or ".join(map(str, allowed)))
        return value

    def group(self) -> int:
        """The group size; 0 for all inputs, which is written as -1."""
        group = self.data.get("group_size")
        if type(group) is not int or (group != -1 and (group < 1 or group % GROUP_STEP or group > _MAX_SIZE)):
            self.refuse("group_size", f"a multiple of {GROUP_STEP}, or -1 (one group a row)")
        return max(group, 0)

    def flag(self, name: str, default: bool) -> bool:
        value = self.data.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "true or false")
        return default if value is None else value

    def choice(self, name: str, *allowed: object) -> Any:
        """One of `allowed`, None among them where the field may be absent or null."""
        value = self.data.get(name)
        if not any(type(value) is type(item) and value == item for item in allowed):
            self.refuse(name, " or ".join("null" if item is None else repr(item) for item in allowed))
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of names, or of lists of names, flat; empty where it is absent or null."""
        value = self.data.get(name)
        flat: list[str] = []
        for item in value if isinstance(value, list) else [] if value is None else [None]:
            for text in item if isinstance(item, list) else [item]:
                if not isinstance(text, str) or not text:
                    self.refuse(name, "a list of names of modules")
                flat.append(text)
        return tuple(flat)

    def empty(self, name: str, reason: str) -> None:
        """Nothing, null or an empty object."""
        if self.data.get(name):
            self.refuse(name, reason)

    def pair(self, name: str) -> tuple[int, int]:
        """Two sizes from 1 to `_MAX_SIZE`."""
        value = self.data.get(name)
        if (
            not isinstance(value, list)
            or len(value) != 2
            or any(type(v) is not int or not 1 <= v <= _MAX_SIZE for v in value)
        ):
            self.refuse(name, f"two sizes from 1 to {_MAX_SIZE}, [outputs, inputs]")
        return value[0], value[1]


def shorten(value: object, limit: int = 100) -> str:
    """`repr(value)`, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
