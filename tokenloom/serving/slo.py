"""Service level objectives as users write them: milliseconds, or the name of a class of the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import inf
from typing import Any, Final

from tokenloom.config import Config
from tokenloom.engine.request import NO_SLO, Slo
from tokenloom.errors import InvalidParameter

FIELDS: Final = ("tpot_ms", "ttft_ms")
MIN_MS: Final = 0.01
MAX_MS: Final = 3_600_000.0

SloChoice = Slo | Mapping[str, Any] | str | None
"""The name of a class, {"tpot_ms": ..., "ttft_ms": ...} with both optional, an `Slo` in seconds, or None."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SloClasses:
    """The classes that `config` names, and the class of each API key that has one.

    Raises `InvalidParameter` for what cannot be read, for double names, and for keys of unknown classes.
    """

    def __init__(self, config: Config) -> None:
        self._classes = _read_classes(config.scheduler.slo_class)
        self.keys = _read_keys(config.server.slo_key, self._classes)

    def find(self, choice: SloChoice) -> Slo:
        """What `choice` stands for; None: nothing is promised. Raises `InvalidParameter`, which names `slo` or
        the field below it."""
        if choice is None:
            return NO_SLO
        if isinstance(choice, Slo):
            ms = (1e3 * seconds for seconds in choice)
            return slo_of({n: v for n, v in zip(FIELDS, ms, strict=True) if v != inf})
        if isinstance(choice, Mapping):
            return slo_of(choice)
        if isinstance(choice, str) and choice in self._classes:
            return self._classes[choice]
        known = ", ".join(sorted(self._classes)) or "none, see --slo-class"
        limit = f"an object with tpot_ms or ttft_ms, or the name of a class ({known})"
        raise InvalidParameter("slo", choice, limit)


def slo_of(fields: Mapping[str, Any], name: str = "slo") -> Slo:
    """The SLO of `tpot_ms` and `ttft_ms`; both may be left out or None.

    Raises `InvalidParameter` under the name `name`.field for another field, and for what is no number from
    `MIN_MS` to `MAX_MS`.
    """
    seconds = {}
    for field, value in fields.items():
        if field not in FIELDS:
            raise InvalidParameter(f"{name}.{field}"[:128], value, "left out; known are " + ", ".join(FIELDS))
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not MIN_MS <= value <= MAX_MS:
            limit = f"milliseconds from {MIN_MS:g} to {MAX_MS:.0f}"
            raise InvalidParameter(f"{name}.{field}", value, limit)
        seconds[field.removesuffix("_ms")] = value / 1e3
    return Slo(**seconds)


def _read_classes(given: Iterable[str]) -> dict[str, Slo]:
    """Each text is NAME=FIELD:MS,FIELD:MS. Texts from the environment were cut at their commas, so what has no = goes
    on with the class before it."""
    found: dict[str, dict[str, Any]] = {}
    fields: dict[str, Any] | None = None
    for part in (part.strip() for text in given for part in text.split(",")):
        name, equals, objective = part.rpartition("=")
        if equals:
            if not _NAME.fullmatch(name) or name in found:
                limit = "NAME=tpot_ms:40,ttft_ms:500, where each name (letters, digits, . _ -) comes once"
                raise InvalidParameter("slo_class", part, limit)
            fields = found[name] = {}
        field, colon, value = objective.partition(":")
        if fields is None or not colon or field in fields:
            limit = "NAME=tpot_ms:40,ttft_ms:500 (either may be left out)"
            raise InvalidParameter("slo_class", part, limit)
        fields[field] = _number(value)
    return {name: slo_of(fields, f"slo_class {name}") for name, fields in found.items()}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _read_keys(given: Iterable[str], classes: Mapping[str, Slo]) -> dict[str, Slo]:
    """Each text is KEY=CLASS. No message has a key in it."""
    found: dict[str, Slo] = {}
    for number, text in enumerate(given, 1):
        key, _, name = text.rpartition("=")
        if not key or key in found:
            raise InvalidParameter("slo_key", f"entry {number}", "KEY=CLASS, where each key comes once")
        if name not in classes:
            known = ", ".join(sorted(classes)) or "none, see --slo-class"
            raise InvalidParameter("slo_key", f"entry {number}", f"KEY=CLASS with a known class ({known})")
        found[key] = classes[name]
    return found
