"""Adapters of an engine in this process, under their names or where they lie."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tokenloom.adapters.watch import AdapterStamp, scan, stamp
from tokenloom.config import AdapterOptions, Config
from tokenloom.engine.engine import Engine
from tokenloom.errors import InvalidParameter, TokenloomError
from tokenloom.runtime.adapter_host import AdapterHost, offer_adapter
from tokenloom.serving.adapter_library import (
    AdapterLibrary,
    check_adapter_name,
    named_directories,
    reported,
)
from tokenloom.serving.adapter_packer import PreparedAdapter
from tokenloom.serving.assembly import EngineParts, open_library

log = logging.getLogger(__name__)


class LocalAdapters:
    """What `LLM` knows of adapters. Nobody may step the engine meanwhile.

    The library is opened by the first use, or at once where the configuration names adapters.
    """

    def __init__(self, config: Config, parts: EngineParts) -> None:
        self._config = config
        self._engine: Engine = parts.engine
        self._host: AdapterHost | None = parts.adapters
        self._model = parts.card.name
        self._library: AdapterLibrary | None = None
        self._names: dict[str, PreparedAdapter] = {}
        self._paths: dict[str, tuple[AdapterStamp | None, PreparedAdapter]] = {}
        if config.adapters.adapter or config.adapters.adapter_dir or config.adapters.data_dir:
            self._open()

    def load(self, name: str, directory: str | Path) -> None:
        """Let `name` stand for the adapter in `directory` from now on. Raises as `AdapterPacker.prepare`, and
        `InvalidParameter` for a name that cannot be one, and an adapter that the pool has no room for."""
        check_adapter_name(name, self._model)
        library = self._open()
        prepared, base = library.packer.prepare(directory)
        try:
            self._offer(prepared)
            library.registry.set(
                name,
                prepared.content_id,
                source=os.path.abspath(directory),
                base_model_name=base,
                drafts=prepared.draft_contents,
            )
        except BaseException:
            self._drop(prepared)
            raise
        before, self._names[name] = self._names.get(name), prepared
        self._drop(before)

    def unload(self, name: str) -> None:
        """Forget the name. Raises `InvalidParameter` where it stands for nothing."""
        library = self._open()
        if name not in self._names:
            raise self._unknown(name)
        library.registry.remove(name)
        self._drop(self._names.pop(name))

    def names(self) -> tuple[str, ...]:
        """The names, sorted."""
        return tuple(sorted(self._names))

    def resolve(self, adapter: str | Path | None) -> str:
        """The content id for a name or a directory; "" for the base model (None or ""). A directory is read again
        when its files have changed."""
        if not adapter:
            return ""
        if not isinstance(adapter, (str, Path)):
            raise InvalidParameter("adapter", adapter, "the name of an adapter, or its directory")
        self._open()
        if isinstance(adapter, str) and adapter in self._names:
            return self._names[adapter].content_id
        if not os.path.isdir(adapter):
            raise self._unknown(str(adapter))
        return self._at(os.path.realpath(adapter))

    def close(self) -> None:
        """Give the data directory back."""
        if self._library is not None:
            self._library.close()

    def _at(self, path: str) -> str:
        packer = self._open().packer
        found, before = stamp(Path(path), tuple(packer.drafts)), self._paths.get(path)
        if before is not None and before[0] == found:
            return before[1].content_id
        prepared, _ = packer.prepare(path)
        self._offer(prepared)
        self._paths[path] = found, prepared
        if before is not None:
            self._drop(before[1])
        return prepared.content_id

    def _open(self) -> AdapterLibrary:
        if self._library is None:
            self._library = open_library(self._config)
            try:
                for name, (_, prepared) in self._library.restore_all().items():
                    with reported(name):
                        self._offer(prepared)
                        self._names[name] = prepared
                self._load_configured(self._config.adapters)
            except BaseException:
                self._library.close()
                self._library = None
                raise
        return self._library

    def _load_configured(self, options: AdapterOptions) -> None:
        """Those that were named must be there; of a directory, what cannot be read is reported and left out."""
        named = named_directories(options.adapter)
        for name, directory in named.items():
            self.load(name, directory)
        for name in scan(options.adapter_dir) if options.adapter_dir else ():
            if name in named:
                log.error("adapter %s in %s has the name of another one", name, options.adapter_dir)
                continue
            with reported(name):
                self.load(name, Path(options.adapter_dir, name))

    def _offer(self, prepared: PreparedAdapter) -> None:
        image, drafts = prepared.image, prepared.draft_files
        offer_adapter(self._engine, self._host, prepared.content_id, image, drafts)

    def _drop(self, prepared: PreparedAdapter | None) -> None:
        """Forget those contents that a name or path had, of which it was the last."""
        if prepared is None:
            return
        held = {*self._names.values(), *(entry for _, entry in self._paths.values())}
        if all(other.content_id != prepared.content_id for other in held):
            self._engine.adapters.retire(prepared.content_id)
        for content_id in set(prepared.contents).difference(*(other.contents for other in held)):
            self._open().packer.discard(content_id)

    def _unknown(self, name: str) -> TokenloomError:
        known = ", ".join(self.names()) or "none"
        return InvalidParameter("adapter", name, f"a directory, or the name of an adapter (loaded: {known})")
