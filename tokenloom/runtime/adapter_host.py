"""The adapters that an engine may fetch: images on the disk, mapped, and copied into the pool page by page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.engine import Engine
from tokenloom.errors import InvalidParameter, ModelError, UnsupportedFeature
from tokenloom.kernels.adapter_image import AdapterImage
from tokenloom.kernels.backend import Backend

_READ_AHEAD: Final = 8 << 20
"""Bytes behind a slice that the system is asked to read meanwhile."""


class AdapterFormat(NamedTuple):
    """What images must be made for: the type of their numbers, and the bytes of a page."""

    dtype: str
    page_bytes: int


class AdapterFile(NamedTuple):
    """An adapter by its content id, and the path of its image."""

    content_id: str
    path: str


class Companions(Protocol):
    """Adapters of another model that go with those of an engine."""

    def know(self, file: AdapterFile) -> None:
        """Nothing of it is read yet. Raises `ModelError` or `InvalidParameter`; it is then known or unknown as
        before."""

    def go_with(self, adapter: str, companion: str) -> None:
        """From now on, `companion` (known; "": none) goes with `adapter` of the engine."""

    def forget_unused(self) -> None:
        """Forget those that go with no adapter."""


class AdapterHost:
    """The `AdapterSource` of a `LocalExecutor`: known adapters by content id, and their mapped images.

    `companions` are adapters of other models (drafts), by the names of these; they are forgotten with the adapter
    that they go with. Only the thread that steps the engine may use it.
    """

    def __init__(self, backend: Backend, form: AdapterFormat) -> None:
        self.format = form
        self.companions: dict[str, Companions] = {}
        self._backend = backend
        self._images: dict[str, AdapterImage] = {}

    def add(self, adapter: str, path: Path) -> bool:
        """Know the adapter whose image is at `path`; a known one stays as it is. Whether it was unknown. Nothing of
        it is read yet but the layout. Raises `ModelError` for what is no image, or one of another format."""
        if adapter in self._images:
            return False
        image = AdapterImage.open(path)
        found = AdapterFormat(image.layout.dtype, image.layout.page_bytes)
        if found != self.format:
            raise ModelError(f"{path} of {found}", f"{self.format}")
        image.will_need(0, min(image.layout.num_pages, _READ_AHEAD // found.page_bytes))
        self._images[adapter] = image
        return True

    def num_pages(self, adapter: str) -> int:
        """Pages of a known adapter; KeyError for an unknown one."""
        return self._images[adapter].layout.num_pages

    def copy(self, adapter: str, first: int, pages: NDArray[np.int32]) -> None:
        """Copy pages first, first + 1, ... of the adapter to these pages of the pool."""
        image = self._images[adapter]
        end = first + len(pages)
        ahead = max(_READ_AHEAD // self.format.page_bytes, 1)
        image.will_need(end, min(ahead, image.layout.num_pages - end))
        self._backend.write_pages(pages, self.format.page_bytes, image.pages[first:end])

    def bind(self, adapter: str, slot: int, pages: NDArray[np.int32]) -> None:
        """Rows of `slot` have the adapter, which lies in `pages`, from now on."""
        self._backend.bind_adapter(slot, self._images[adapter], pages)

    def unbind(self, slot: int, pages: NDArray[np.int32]) -> None:
        """Nobody has `slot` any more; its pages go back to the pool."""
        if slot >= 0:
            self._backend.unbind_adapter(slot)
        self._backend.clear_pages(pages, self.format.page_bytes)

    def forget(self, adapter: str) -> None:
        """Nobody will ask for the adapter again."""
        self._images.pop(adapter, None)
        for companions in self.companions.values():
            companions.go_with(adapter, "")


def offer_adapter(
    engine: Engine,
    host: AdapterHost | None,
    adapter: str,
    image: Path,
    drafts: Mapping[str, AdapterFile] = MappingProxyType({}),
) -> None:
    """Let requests of `engine`, whose source is `host`, have the adapter whose image is at `image`. `drafts` are
    what goes with it, by the name of the draft model; other models of the engine have nothing that does.

    Raises `ModelError` as `AdapterHost.add`, `InvalidParameter` where the pool could never hold one of them, and
    `UnsupportedFeature` for an executor without adapters, and a draft that the engine does not have; they are then
    known or unknown as before.
    """
    if host is None:
        raise UnsupportedFeature("adapters", "the executor of this engine has none")
    if unknown := sorted(drafts.keys() - host.companions.keys()):
        raise UnsupportedFeature(f"an adapter of {unknown[0]}", "the engine has no draft model of that name")
    is_new = host.add(adapter, image)
    try:
        engine.adapters.check(adapter)
        for name, file in drafts.items():
            host.companions[name].know(file)
    except (InvalidParameter, ModelError):
        # One that is known may serve other names, and requests that run or wait.
        if is_new:
            host.forget(adapter)
        for companions in host.companions.values():
            companions.forget_unused()
        raise
    engine.adapters.revive(adapter)
    for name, companions in host.companions.items():
        companions.go_with(adapter, drafts[name].content_id if name in drafts else "")
