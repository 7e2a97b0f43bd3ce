"""The adapters that a process offers: read, checked, kept in the data directory, and packed for the engine.

```
<data directory>/lock                                   held by the one process that uses the directory
                 adapters/<content>.safetensors         as they were read (tokenloom.adapters.store)
                 adapters.sqlite                        names (tokenloom.adapters.registry)
                 images/<content>-<layout>.image        in the pages that the engine copies
```
All of this happens outside the step loop: an engine is only told where an image is. What no name stands for is
removed at the next start.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenloom.adapters.adapter import Adapter
from tokenloom.adapters.peft_directory import read_adapter
from tokenloom.adapters.registry import AdapterRegistry, RegisteredAdapter, check_name
from tokenloom.adapters.store import AdapterStore
from tokenloom.errors import EngineDead, InvalidParameter, ModelError, TokenloomError
from tokenloom.kernels.adapter_image import AdapterImage, make_image
from tokenloom.kernels.program import Program
from tokenloom.models.model_files import open_checkpoint
from tokenloom.models.weight_sources import source_rows
from tokenloom.runtime.adapter_host import AdapterFormat

log = logging.getLogger(__name__)

_SUFFIX: Final = ".image"


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter that the engine can be told of: its content id, highest rank, bytes as it was saved, pages in
    the pool, and the file with them."""

    content_id: str
    rank: int
    num_bytes: int
    num_pages: int
    image: Path


class AdapterLibrary:
    """Adapters over the model in `model`, whose layers are `program`, for an engine that takes `form`.

    `data_dir` "" is a temporary directory that goes with `close`. Threads may share it, but only one prepares at a
    time. Raises `InvalidParameter` for a data directory that cannot be used, or that another process uses.
    """

    def __init__(
        self, model: Path, program: Program, form: AdapterFormat, *, data_dir: str = "", max_rank: int = 256
    ) -> None:
        self.format = form
        self._model = model
        self._program = program
        self._rows = source_rows(program)
        self._max_rank = max_rank
        self._layout = f"{form.dtype}-{form.page_bytes}-{_products_id(program)}"
        self._temporary = None if data_dir else tempfile.TemporaryDirectory(prefix="tokenloom-data-")
        self._directory = Path(self._temporary.name if self._temporary else data_dir).expanduser()
        self._images = self._directory / "images"
        try:
            # The engine is told of files by their paths.
            os.fspath(self._images).encode()
            self._images.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidParameter(
                "data_dir", data_dir, f"a directory that can be written to ({error})"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._store = AdapterStore(self._directory / "adapters")
            self.registry = AdapterRegistry(self._directory / "adapters.sqlite")
        except BlockingIOError:
            os.close(self._lock)
            limit = "a directory that no other process uses"
            raise InvalidParameter("data_dir", data_dir, limit) from None
        except BaseException:
            os.close(self._lock)
            raise

    def prepare(self, directory: str | Path) -> tuple[PreparedAdapter, str | None]:
        """Read, check, keep and pack the adapter in `directory`; also what it says its base model is called.

        Raises `ModelError` for one that cannot be served, and where there is no room for it.
        """
        with self._writing(), open_checkpoint(self._model) as checkpoint:
            adapter = read_adapter(directory, self._program, source_rows=self._rows, checkpoint=checkpoint)
            self._check_rank(adapter)
            self._store.add(adapter)
            return self._packed(adapter), adapter.base_model_name

    def restore(self, content_id: str) -> PreparedAdapter:
        """An adapter that was prepared before, verified. Raises `ModelError` if it is damaged or not there."""
        with self._writing():
            adapter = self._store.open(content_id, self._program, source_rows=self._rows)
            self._check_rank(adapter)
            return self._packed(adapter)

    def discard(self, content_id: str) -> None:
        """Remove the files of an adapter that no name stands for. An engine that has its image mapped may go on."""
        with self._writing():
            self._store.remove(content_id)
            for path in self._images.glob(f"{content_id}-*{_SUFFIX}"):
                path.unlink(missing_ok=True)

    def restore_all(self) -> dict[str, tuple[RegisteredAdapter, PreparedAdapter]]:
        """What the names of earlier runs stand for. One that is damaged, or does not fit this model, is reported and
        left alone; files that belong to no name are removed."""
        found: dict[str, tuple[RegisteredAdapter, PreparedAdapter]] = {}
        for entry in self.registry.list():
            try:
                found[entry.name] = entry, self.restore(entry.content_id)
            except TokenloomError as error:
                log.error("adapter %s is left out: %s", entry.name, error)
        kept = {entry.content_id for entry in self.registry.list()}
        with self._writing():
            for content in set(self._store.ids()) - kept:
                self._store.remove(content)
            for path in self._images.iterdir():
                if path.suffix != _SUFFIX or path.name.partition("-")[0] not in kept:
                    path.unlink()
        return found

    def close(self) -> None:
        """Give the data directory back; a temporary one is removed."""
        self.registry.close()
        os.close(self._lock)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _check_rank(self, adapter: Adapter) -> None:
        if adapter.max_rank > self._max_rank:
            raise ModelError(f"an adapter of rank {adapter.max_rank}", f"ranks up to {self._max_rank}")

    def _packed(self, adapter: Adapter) -> PreparedAdapter:
        path = self._images / f"{adapter.content_id}-{self._layout}{_SUFFIX}"
        pages = _sound_pages(path)
        if pages is None:
            image = make_image(
                self._program,
                adapter.blocks,
                adapter.embedding,
                self.format.dtype,
                page_bytes=self.format.page_bytes,
            )
            image.save(path)
            pages = image.layout.num_pages
        return PreparedAdapter(adapter.content_id, adapter.max_rank, adapter.num_bytes, pages, path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelError(f"{self._directory}: {error}", "a data directory with room") from None


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


def _sound_pages(path: Path) -> int | None:
    """Pages of an image that was written before; None where there is none, or a damaged one."""
    try:
        image = AdapterImage.open(path)
    except ModelError:
        return None
    return image.layout.num_pages if image.is_sound() else None


def _products_id(program: Program) -> str:
    """Digest of what an image depends on beside the adapter: the products, their order and shapes."""
    shapes = {spec.name: spec.shape for spec in program.weights}
    products = [(name, is_paired, *shapes[name]) for name, is_paired in program.products()]
    return hashlib.blake2b(repr(products).encode(), digest_size=6).hexdigest()
