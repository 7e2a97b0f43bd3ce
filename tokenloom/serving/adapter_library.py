"""The adapters that a process offers: their names, and the data directory that keeps them.

```
<data directory>/lock                  held by the one process that uses the directory
                 adapters.sqlite       names (tokenloom.adapters.registry)
                 adapters/ images/     contents (tokenloom.serving.adapter_packer)
```
What no name stands for is removed at the next start.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from tokenloom.adapters.registry import AdapterRegistry, RegisteredAdapter, check_name
from tokenloom.errors import EngineDead, InvalidParameter, TokenloomError
from tokenloom.kernels.program import Program
from tokenloom.serving.adapter_packer import AdapterPacker, PackingTarget, PreparedAdapter

log = logging.getLogger(__name__)


class AdapterLibrary:
    """Adapters for `target`, whose model has the layers of `program`, and for its `drafts`, by name.

    `data_dir` "" is a temporary directory that goes with `close`. Threads may share it, but only one prepares at a
    time. Raises `InvalidParameter` for a data directory that cannot be used, or that another process uses.
    """

    def __init__(
        self,
        target: PackingTarget,
        program: Program,
        *,
        data_dir: str = "",
        drafts: Mapping[str, tuple[PackingTarget, Program]] = MappingProxyType({}),
    ) -> None:
        self._temporary = None if data_dir else tempfile.TemporaryDirectory(prefix="tokenloom-data-")
        directory = Path(self._temporary.name if self._temporary else data_dir).expanduser()
        try:
            # The engine is told of files by their paths.
            os.fspath(directory).encode()
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except (OSError, ValueError) as error:
            raise _unusable(data_dir, error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.packer = AdapterPacker(target, program, directory, drafts)
            self.registry = AdapterRegistry(directory / "adapters.sqlite")
        except BlockingIOError:
            os.close(self._lock)
            limit = "a directory that no other process uses"
            raise InvalidParameter("data_dir", data_dir, limit) from None
        except OSError as error:
            os.close(self._lock)
            raise _unusable(data_dir, error) from None
        except BaseException:
            os.close(self._lock)
            raise

    def restore_all(self) -> dict[str, tuple[RegisteredAdapter, PreparedAdapter]]:
        """What the names of earlier runs stand for. One that is damaged, or does not fit this model, is reported and
        left alone; files that belong to no name are removed."""
        found: dict[str, tuple[RegisteredAdapter, PreparedAdapter]] = {}
        entries = self.registry.list()
        for entry in entries:
            try:
                found[entry.name] = entry, self.packer.restore(entry.content_id, entry.drafts)
            except TokenloomError as error:
                log.error("adapter %s is left out: %s", entry.name, error)
        # Also what draft models have that are not served now.
        self.packer.discard_all_but(
            {content for entry in entries for content in (entry.content_id, *entry.drafts.values())}
        )
        return found

    def close(self) -> None:
        """Give the data directory back; a temporary one is removed."""
        self.registry.close()
        os.close(self._lock)
        if self._temporary is not None:
            self._temporary.cleanup()


def check_adapter_name(name: str, model: str) -> None:
    """Raise `InvalidParameter` unless `name` can stand beside the `model` in requests, alone and as model:name."""
    check_name(name)
    if ":" in name:
        raise InvalidParameter(
            "adapter name", name, "a name without ':', which requests put behind the model's"
        )
    if name == model:
        raise InvalidParameter("adapter name", name, "another name than that of the model")


def named_directories(options: Iterable[str]) -> dict[str, str]:
    """The directories that options of the form NAME=DIRECTORY give, by name. Raises `InvalidParameter` for one of
    another form, and for a name that is given twice."""
    found: dict[str, str] = {}
    for text in options:
        name, sign, directory = text.partition("=")
        if not (name and sign and directory):
            raise InvalidParameter("adapter", text, "NAME=DIRECTORY")
        if name in found:
            raise InvalidParameter("adapter", text, f"another name than that of {found[name]}")
        found[name] = directory
    return found


@contextmanager
def reported(name: str) -> Iterator[None]:
    """Log errors of an adapter; a dead engine is none of them."""
    try:
        yield
    except EngineDead:
        raise
    except TokenloomError as error:
        log.error("adapter %s: %s", name, error)


def _unusable(data_dir: str, error: Exception) -> InvalidParameter:
    return InvalidParameter("data_dir", data_dir, f"a directory that can be written to ({error})")
