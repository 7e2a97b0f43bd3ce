"""The names of adapters: which content a name stands for now.

A name can be given another content at any time, in one transaction. A request looks its name up once and keeps the
content id, so what it gets does not change while it runs.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tokenloom.errors import InvalidParameter, ModelError, shorten
from tokenloom.models.json_fields import parse_json

MAX_NAMES: Final = 100_000

_VERSION = 2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]*(?:/[A-Za-z0-9][A-Za-z0-9._@:-]*)*")
_MAX_NAME = 128
_ID = re.compile(r"[0-9a-f]{32}")
_BUSY_SECONDS = 10.0
_COLUMNS = "name, content_id, version, added, source, base_model_name, drafts"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS adapters (
    name TEXT PRIMARY KEY NOT NULL,
    content_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    added REAL NOT NULL,
    source TEXT,
    base_model_name TEXT,
    drafts TEXT NOT NULL DEFAULT '{}'
) STRICT, WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class RegisteredAdapter:
    """A name and its content. `version` counts from 1 and rises with each new content of the name; `added` is
    the time of that, in seconds since 1970; `source` the directory that it was read from; `base_model_name` what
    its configuration says; `drafts` the contents that go with it for draft models, by the names of these."""

    name: str
    content_id: str
    version: int
    added: float
    source: str | None
    base_model_name: str | None
    drafts: Mapping[str, str]


class AdapterRegistry:
    """Names in memory, or in the SQLite file `path`, which several processes may use. Threads may share it.

    Raises `ModelError` for a file that is no registry, or one of a newer version.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = path
        self._mutex = threading.Lock()
        try:
            if path is not None:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(
                ":memory:" if path is None else path,
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
        except (sqlite3.Error, OSError, ValueError) as error:
            raise ModelError(f"{path}: {error}", "a registry of adapters") from None
        try:
            self._prepare()
        except BaseException:
            self._database.close()
            raise

    def _prepare(self) -> None:
        with self._transaction() as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if not 0 <= version <= _VERSION:
                raise ModelError(f"{self._path} of version {version}", f"versions up to {_VERSION}")
            database.execute(_SCHEMA)
            if version == 1:
                database.execute("ALTER TABLE adapters ADD COLUMN drafts TEXT NOT NULL DEFAULT '{}'")
            database.execute(f"PRAGMA user_version = {_VERSION}")
        if self._path is not None:
            with self._errors():
                self._write_ahead()
                self._database.execute("PRAGMA synchronous = FULL")

    def _write_ahead(self) -> None:
        """Readers do not wait for a writer. SQLite does not wait its busy time where several processes ask for
        this at once."""
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
            else:
                return

    def set(
        self,
        name: str,
        content_id: str,
        *,
        source: str | None = None,
        base_model_name: str | None = None,
        drafts: Mapping[str, str] = MappingProxyType({}),
        now: float | None = None,
    ) -> RegisteredAdapter:
        """Let `name` stand for `content_id` from now on (`now`: seconds since 1970), with `drafts`.

        The same content again changes its source and drafts only. Raises `InvalidParameter` for a name or id that
        cannot be one, and where there are too many names.
        """
        check_name(name)
        for content in (content_id, *drafts.values()):
            if _ID.fullmatch(content) is None:
                raise InvalidParameter("content_id", content, "32 hexadecimal digits in lower case")
        for param, text in (("source", source), ("base_model_name", base_model_name)):
            if text is not None and any("\ud800" <= sign <= "\udfff" for sign in text):
                raise InvalidParameter(param, text, "text that UTF-8 can hold")
        with self._transaction() as database:
            before = self._find(name)
            if before is None:
                (count,) = database.execute("SELECT count(*) FROM adapters").fetchone()
                if count >= MAX_NAMES:
                    raise InvalidParameter("adapter name", name, f"one of at most {MAX_NAMES} names")
            is_same = before is not None and before.content_id == content_id
            version = 1 if before is None else before.version + (not is_same)
            added = before.added if before is not None and is_same else time.time() if now is None else now
            row = (name, content_id, version, added, source, base_model_name, json.dumps(dict(drafts)))
            database.execute(
                f"INSERT OR REPLACE INTO adapters ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", row
            )
        return _entry(row)

    def get(self, name: str) -> RegisteredAdapter | None:
        """What `name` stands for now; None for a name that is not registered."""
        if not _is_name(name):
            return None
        with self._mutex, self._errors():
            return self._find(name)

    def remove(self, name: str) -> bool:
        """Forget the name; whether it was there. Its content stays in the store."""
        if not _is_name(name):
            return False
        with self._transaction() as database:
            return database.execute("DELETE FROM adapters WHERE name = ?", (name,)).rowcount > 0

    def list(self) -> tuple[RegisteredAdapter, ...]:
        """All names, sorted."""
        with self._mutex, self._errors():
            rows = self._database.execute(f"SELECT {_COLUMNS} FROM adapters ORDER BY name").fetchall()
        return tuple(map(_entry, rows))

    def close(self) -> None:
        """Close the file."""
        with self._mutex:
            self._database.close()

    def _find(self, name: str) -> RegisteredAdapter | None:
        row = self._database.execute(f"SELECT {_COLUMNS} FROM adapters WHERE name = ?", (name,)).fetchone()
        return None if row is None else _entry(row)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and one at a time over threads and processes."""
        with self._mutex, self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ModelError(
                f"{self._path}: {error}", "a registry of adapters that can be written"
            ) from error


def _entry(row: tuple[Any, ...]) -> RegisteredAdapter:
    """The entry in a row of `_COLUMNS`. Raises `ModelError` for what `set` did not write."""
    name, content_id, version, added, source, base_model_name, drafts = row
    found = parse_json(drafts.encode(), "a registry of adapters")
    if not all(isinstance(content, str) and _ID.fullmatch(content) for content in found.values()):
        raise ModelError(f"{shorten(drafts)} in a registry of adapters", "content ids by name")
    return RegisteredAdapter(name, content_id, version, added, source, base_model_name, found)


def check_name(name: str) -> None:
    """Raise `InvalidParameter` unless `name` can be that of an adapter: parts of letters, digits and ._@:- that
    are joined by slashes and start with a letter or digit."""
    if not _is_name(name):
        raise InvalidParameter(
            "adapter name",
            name,
            f"letters, digits, '.', '_', '@', ':' and '-', with '/' between parts, up to {_MAX_NAME} characters",
        )


def _is_name(name: str) -> bool:
    return isinstance(name, str) and len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None
