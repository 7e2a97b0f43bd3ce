"""A directory whose sub-directories are adapters: what came, changed or went since the last look.

The server scans it now and then; `changes` compares two scans. Something counts once it looks the same twice, so
that files that are still being copied are left alone, and a directory that is being replaced does not go and come.
What cannot be read in spite of that is tried again as soon as one of its files changes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenloom.adapters.peft_config import CONFIG_FILE
from tokenloom.adapters.peft_directory import WEIGHTS_FILE
from tokenloom.errors import ModelError

MAX_DIRECTORIES = 10_000


class FileStamp(NamedTuple):
    """Times of the last change in nanoseconds, and size in bytes. Archives and copies set `mtime_ns` as they like;
    `ctime_ns` is the system's own, and tells a file from another that has taken its place."""

    mtime_ns: int
    ctime_ns: int
    size: int


class AdapterStamp(NamedTuple):
    """Stamps of the two files of an adapter; None: there is no such file. `parts` are those of the files of adapters
    in its sub-directories that were asked for."""

    config: FileStamp
    weights: FileStamp | None
    parts: tuple[FileStamp | None, ...] = ()


Scan = Mapping[str, AdapterStamp]
"""Stamps by the names of the sub-directories."""


class Changes(NamedTuple):
    """Names of adapters to read (new ones and those with other files than known) and to forget, sorted."""

    read: tuple[str, ...]
    forget: tuple[str, ...]


def scan(directory: str | Path, parts: Sequence[str] = ()) -> Scan:
    """The sub-directories of `directory` that hold an adapter_config.json; hidden ones are left out. `parts` are
    names of sub-directories of theirs whose files count too.

    Raises `ModelError` if it cannot be listed, or has more than `MAX_DIRECTORIES`.
    """
    found: dict[str, AdapterStamp] = {}
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: {error}", "a directory of adapters that can be listed") from None
    if len(names) > MAX_DIRECTORIES:
        raise ModelError(f"{directory} with {len(names)} directories", f"at most {MAX_DIRECTORIES} adapters")
    for name in sorted(names):
        known = stamp(Path(directory, name), parts)
        if known is not None:
            found[name] = known
    return found


def stamp(directory: Path, parts: Sequence[str] = ()) -> AdapterStamp | None:
    """The stamps of the adapter in `directory`, and of those in its sub-directories `parts`; None without an
    adapter_config.json."""
    config = _stamp(directory / CONFIG_FILE)
    if config is None:
        return None
    inner = [_stamp(directory / part / file) for part in parts for file in (CONFIG_FILE, WEIGHTS_FILE)]
    return AdapterStamp(config, _stamp(directory / WEIGHTS_FILE), tuple(inner))


def changes(before: Scan, now: Scan, known: Scan) -> Changes:
    """What to do after the scans `before` and `now`.

    `known` has the stamp of each adapter when it was last read, with or without success; whoever acts on the
    result brings it up to date.
    """
    settled = {name: stamp for name, stamp in now.items() if before.get(name) == stamp}
    return Changes(
        read=tuple(sorted(name for name, stamp in settled.items() if known.get(name) != stamp)),
        forget=tuple(sorted(name for name in known if name not in before and name not in now)),
    )


def _stamp(path: Path) -> FileStamp | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileStamp(status.st_mtime_ns, status.st_ctime_ns, status.st_size)
