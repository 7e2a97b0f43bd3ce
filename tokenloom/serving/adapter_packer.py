"""Adapters that are read, checked, kept by content, and packed for the engine.

```
<directory>/adapters/<content>.safetensors         as they were read (tokenloom.adapters.store)
            images/<content>-<layout>.image        in the pages that the engine copies
```
All of this happens outside the step loop: an engine is only told where an image is. Who may use the directory, and
what is called how, is the matter of others.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from tokenloom.adapters.adapter import Adapter
from tokenloom.adapters.peft_directory import read_adapter
from tokenloom.adapters.store import AdapterStore
from tokenloom.errors import ModelError
from tokenloom.kernels.adapter_image import AdapterImage, make_image
from tokenloom.kernels.program import Program
from tokenloom.models.model_files import open_checkpoint
from tokenloom.models.weight_sources import source_rows
from tokenloom.runtime.adapter_host import AdapterFile

log = logging.getLogger(__name__)

_SUFFIX: Final = ".image"


class PackingTarget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What adapters are packed for: the model at the path `model`, which `describe_model` reads with `max_context`
    and `weights`, in an engine that takes pages of `page_bytes` bytes with numbers of `dtype`."""

    model: str
    max_context: int | None
    weights: str
    dtype: str
    page_bytes: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter that the engine can be told of: its content id, highest rank, bytes as it was saved, pages in
    the pool, and the file with them. `drafts` are the adapters of draft models that go with it, by the names of
    these."""

    content_id: str
    rank: int
    num_bytes: int
    num_pages: int
    image: Path
    drafts: tuple[tuple[str, PreparedAdapter], ...] = ()

    @property
    def contents(self) -> tuple[str, ...]:
        """The content ids of all that it has in the data directory."""
        return (self.content_id, *(prepared.content_id for _, prepared in self.drafts))

    @property
    def draft_contents(self) -> dict[str, str]:
        """The content ids of `drafts`."""
        return {name: prepared.content_id for name, prepared in self.drafts}

    @property
    def draft_files(self) -> dict[str, AdapterFile]:
        """What an engine is told of `drafts`."""
        return {name: AdapterFile(prepared.content_id, str(prepared.image)) for name, prepared in self.drafts}


class AdapterPacker:
    """Packs adapters for `target`, whose model has the layers of `program`, into `directory`.

    `drafts` are draft models of it. An adapter may have one of its own for each, in its sub-directory of that name.
    Only one thread of one process may prepare at a time. Raises OSError for a directory that cannot be used.
    """

    def __init__(
        self,
        target: PackingTarget,
        program: Program,
        directory: Path,
        drafts: Mapping[str, tuple[PackingTarget, Program]] = MappingProxyType({}),
    ) -> None:
        self.target = target
        self.drafts = {name: AdapterPacker(*draft, directory) for name, draft in drafts.items()}
        self.directory = directory
        self.layout = f"{target.dtype}-{target.page_bytes}-{_products_id(program)}"
        self._program = program
        self._rows = source_rows(program)
        self._images = directory / "images"
        self._images.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._store = AdapterStore(directory / "adapters")

    def image_path(self, content_id: str) -> Path:
        """Where the image of this content lies once it is packed."""
        return self._images / f"{content_id}-{self.layout}{_SUFFIX}"

    def prepare(self, directory: str | Path) -> tuple[PreparedAdapter, str | None]:
        """Read, check, keep and pack the adapter in `directory`, with those of draft models in it; also what it says
        its base model is called.

        Raises `ModelError` for one that cannot be served, and where there is no room for it.
        """
        with self._writing():
            # All are checked before one is kept.
            adapter = self._read(directory)
            theirs = {
                name: packer._read(_part_of(directory, name))
                for name, packer in self.drafts.items()
                if os.path.lexists(Path(directory, name))
            }
            drafts = [(name, self.drafts[name]._kept(found)) for name, found in theirs.items()]
            return replace(self._kept(adapter), drafts=tuple(drafts)), adapter.base_model_name

    def restore(self, content_id: str, drafts: Mapping[str, str] = MappingProxyType({})) -> PreparedAdapter:
        """An adapter that was prepared before, verified, with the contents that went with it for draft models. What
        these do not take any more is reported and left out. Raises `ModelError` if it is damaged or not there."""
        with self._writing():
            adapter = self._store.open(content_id, self._program, source_rows=self._rows)
            self._check_rank(adapter)
            prepared = self._packed(adapter)
        found: list[tuple[str, PreparedAdapter]] = []
        for name, packer in self.drafts.items():
            if name in drafts:
                try:
                    found.append((name, packer.restore(drafts[name])))
                except ModelError as error:
                    log.error("the adapter of %s that goes with %s is left out: %s", name, content_id, error)
        return replace(prepared, drafts=tuple(found))

    def discard(self, content_id: str) -> None:
        """Remove the files of an adapter that no name stands for. An engine that has its image mapped may go on."""
        with self._writing():
            self._store.remove(content_id)
            for path in self._images.glob(f"{content_id}-*{_SUFFIX}"):
                path.unlink(missing_ok=True)

    def discard_all_but(self, kept: Collection[str]) -> None:
        """Remove all files but those of these contents."""
        with self._writing():
            for content in set(self._store.ids()) - set(kept):
                self._store.remove(content)
            for path in self._images.iterdir():
                if path.suffix != _SUFFIX or path.name.partition("-")[0] not in kept:
                    path.unlink()

    @property
    def layouts(self) -> str:
        """The layouts of its images and those of draft models, for comparison."""
        return " ".join([self.layout, *(f"{name}:{packer.layout}" for name, packer in self.drafts.items())])

    def _read(self, directory: str | Path) -> Adapter:
        with open_checkpoint(Path(self.target.model)) as checkpoint:
            adapter = read_adapter(directory, self._program, source_rows=self._rows, checkpoint=checkpoint)
        self._check_rank(adapter, f" in {directory}")
        return adapter

    def _kept(self, adapter: Adapter) -> PreparedAdapter:
        self._store.add(adapter)
        return self._packed(adapter)

    def _check_rank(self, adapter: Adapter, where: str = "") -> None:
        if adapter.max_rank > self.target.max_rank:
            found = f"an adapter of rank {adapter.max_rank}{where}"
            raise ModelError(found, f"ranks up to {self.target.max_rank}")

    def _packed(self, adapter: Adapter) -> PreparedAdapter:
        path = self.image_path(adapter.content_id)
        pages = _sound_pages(path)
        if pages is None:
            image = make_image(
                self._program,
                adapter.blocks,
                adapter.embedding,
                self.target.dtype,
                page_bytes=self.target.page_bytes,
            )
            image.save(path)
            pages = image.layout.num_pages
        return PreparedAdapter(adapter.content_id, adapter.max_rank, adapter.num_bytes, pages, path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelError(f"{self.directory}: {error}", "a data directory with room") from None


def _part_of(directory: str | Path, name: str) -> Path:
    """The sub-directory `name`. Who may have one directory read may not have another one read by a link. Raises
    `ModelError`."""
    real = Path(os.path.realpath(directory))
    path = Path(os.path.realpath(real / name))
    if not path.is_relative_to(real):
        raise ModelError(f"{Path(directory, name)}, which links out of {directory}", "a directory in it")
    return path


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
