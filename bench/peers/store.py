"""Finished measurements, one JSON line each, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


class Key(NamedTuple):
    """What a measurement is a measurement of."""

    model: str
    scale: str
    threads: int
    precision: str
    engine: str
    workload: str
    round: int


class Store:
    """The file of measurements in the directory of results."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: list[Record] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self._records.append(json.loads(line))
                except json.JSONDecodeError:  # the run was stopped while it wrote this line
                    continue

    def add(self, key: Key, content: Record) -> None:
        """Keep a measurement, at once on disk."""
        record = key._asdict() | content
        self._records.append(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    def has(self, key: Key) -> bool:
        """Whether there is an undisturbed measurement of `key`; errors and disturbed ones are tried again."""
        return any(key_of(record) == key and is_good(record) for record in self._records)

    def all(self) -> list[Record]:
        """Every line, disturbed ones and errors included, in the order in which they were made."""
        return list(self._records)


def key_of(record: Record) -> Key:
    """The key of a stored record."""
    return Key(**{name: record[name] for name in Key._fields})


def is_good(record: Record) -> bool:
    """Whether the record counts: it was measured, and nothing else used the machine."""
    return bool(record.get("quiet")) and "error" not in record
