"""The adapters that a server offers: their names, who uses which, and how they come and go while it runs.

A name stands for one content at a time. A request leases the content that its name stands for when it starts, and
keeps it to its end, whatever becomes of the name; the engine forgets a content when no name and no lease has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from tokenloom.adapters.registry import RegisteredAdapter
from tokenloom.adapters.watch import Scan, changes, scan
from tokenloom.config import AdapterOptions
from tokenloom.engine.adapter_pool import AdapterUse
from tokenloom.errors import EngineDead, InvalidParameter, ModelError, UnsupportedFeature
from tokenloom.serving.adapter_library import (
    AdapterLibrary,
    check_adapter_name,
    named_directories,
    reported,
)
from tokenloom.serving.adapter_packer import PreparedAdapter
from tokenloom.serving.client import EngineClient
from tokenloom.serving.packer_client import PackerClient

log = logging.getLogger(__name__)

WATCH_SECONDS: Final = 2.0
REPORT_SECONDS: Final = 2.0
"""How long an engine that is in the middle of a step may take to say what it holds."""

_T = TypeVar("_T")


@dataclass(slots=True)
class ServedAdapter:
    """A name and its content. `last_used` is in seconds since 1970, 0 for never."""

    entry: RegisteredAdapter
    prepared: PreparedAdapter
    pinned: bool = False
    num_requests: int = 0
    last_used: float = 0.0

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def content_id(self) -> str:
        return self.entry.content_id


class AdapterReport(NamedTuple):
    """A served adapter and how the engine uses its content (None: the engine did not say, or has not met it)."""

    served: ServedAdapter
    use: AdapterUse | None


class AdapterLease:
    """The content that one request has; "" for the base model. `release` may be called more than once."""

    def __init__(self, content_id: str, release: Callable[[], None]) -> None:
        self.content_id = content_id
        self._release = release
        self._held = bool(content_id)

    def release(self) -> None:
        if self._held:
            self._held = False
            self._release()


NO_ADAPTER: Final = AdapterLease("", lambda: None)
"""That of requests to the base model."""


class AdapterService:
    """Adapters over the model that is called `model`, in the engine of `client`.

    `library` None: there are none, and none can be loaded. All methods but `load_configured` run on one asyncio
    loop; adapters are prepared one after another, by a process of idle priority.
    """

    def __init__(
        self, client: EngineClient, library: AdapterLibrary | None, *, model: str, options: AdapterOptions
    ) -> None:
        self._client = client
        self._library = library
        self._model = model
        self._options = options
        self._served: dict[str, ServedAdapter] = {}
        self._leases: Counter[PreparedAdapter] = Counter()
        self._turn = asyncio.Lock()
        self._worker = ThreadPoolExecutor(1, "tokenloom-adapters")
        self._packer = None if library is None else PackerClient(library.packer)
        self._uses: dict[str, AdapterUse] = {}
        self._known: Scan = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    # --- who there is ------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """The names, sorted."""
        return tuple(sorted(self._served))

    def find(self, model: str) -> ServedAdapter | None:
        """What a request means by `model`: the name of an adapter, alone or behind that of the model and ':'."""
        return self._served.get(model.removeprefix(f"{self._model}:"))

    def name_of(self, content_id: str) -> str | None:
        """A name that stands for a content now, None where there is none."""
        return next((name for name, one in self._served.items() if one.content_id == content_id), None)

    def lease(self, name: str) -> AdapterLease:
        """The content that `name` stands for now, for one request. Raises KeyError for an unknown name."""
        served = self._served[name]
        served.num_requests += 1
        served.last_used = time.time()
        self._leases[served.prepared] += 1
        return AdapterLease(served.content_id, partial(self._release, served.prepared))

    async def report(self) -> list[AdapterReport]:
        """All adapters by name; where the engine does not answer, as it said last."""
        if self._served:
            with contextlib.suppress(EngineDead, TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS):
                    self._uses = {use.adapter: use for use in await self._client.adapters.uses()}
        return [
            AdapterReport(self._served[name], self._uses.get(self._served[name].content_id))
            for name in self.names()
        ]

    # --- coming and going --------------------------------------------------------------------------------

    def load_configured(self) -> None:
        """Load what was served before, the adapters of the options, and those of the watched directory; the engine
        is told when it starts. Raises for one that was named in the options; others are reported and left out."""
        library = self._library
        if library is None:
            return
        for entry, prepared in library.restore_all().values():
            with reported(entry.name):
                check_adapter_name(entry.name, self._model)
                self._served[entry.name] = ServedAdapter(entry, prepared)
        named = named_directories(self._options.adapter)
        for name, directory in named.items():
            self._take(library, name, directory)
        if self._options.adapter_dir:
            self._known = scan(self._options.adapter_dir, tuple(library.packer.drafts))
            for name in self._known:
                if name in named:
                    self._report_taken(name)
                    continue
                with reported(name):
                    self._take(library, name, self._watched(name))
            for name in self.names():
                if self._is_watched(name) and name not in self._known:
                    library.registry.remove(name)
                    del self._served[name]
        for served in self._served.values():
            prepared = served.prepared
            self._client.adapters.expect(prepared.content_id, prepared.image, prepared.draft_files)

    async def confirm(self) -> None:
        """Wait until the first engine has answered for what `load_configured` found. Raises what it says of an
        adapter that was named in the options; others that it does not take are reported and left out."""
        await self._client.adapters.uses()
        named = named_directories(self._options.adapter)
        for name in self.names():
            error = self._client.adapters.refusal(self._served[name].content_id)
            if error is None:
                continue
            if name in named:
                raise error
            log.error("adapter %s is left out: %s", name, error)
            del self._served[name]

    def _take(self, library: AdapterLibrary, name: str, directory: str) -> None:
        check_adapter_name(name, self._model)
        prepared, base = library.packer.prepare(directory)
        self._served[name] = ServedAdapter(_register(library, name, prepared, directory, base), prepared)

    async def load(self, name: str, directory: str | Path, *, replace: bool = True) -> ServedAdapter:
        """Let `name` stand for the adapter in `directory`, from the next request on.

        Raises as `PackerClient.prepare`; `InvalidParameter` for a bad name, one that is taken unless it may be
        replaced, and too little memory; `EngineDead`. Nothing has changed then.
        """
        library, packer = self._need_library()
        async with self._turn:
            before = self._served.get(name)
            if before is not None and not replace:
                raise InvalidParameter("adapter name", name, "one that is not taken")
            check_adapter_name(name, self._model)
            prepared, base = await self._in_worker(packer.prepare, directory)
            try:
                adapters = self._client.adapters
                await adapters.load(prepared.content_id, prepared.image, prepared.draft_files)
                entry = await self._in_worker(_register, library, name, prepared, directory, base)
            except BaseException:
                await self._drop(prepared)
                raise
            served = self._served[name] = ServedAdapter(entry, prepared)
            log.info(
                "adapter %s is %s, of rank %d, from %s", name, entry.content_id, prepared.rank, directory
            )
            if before is not None:
                served.num_requests, served.last_used = before.num_requests, before.last_used
                await self._leave(before)
                if before.pinned:
                    with contextlib.suppress(EngineDead), reported(name):
                        await self._set_pin(served, on=True)
            return served

    async def unload(self, name: str) -> None:
        """Forget the name. Raises KeyError for an unknown one."""
        library, _ = self._need_library()
        async with self._turn:
            served = self._served[name]
            await self._in_worker(library.registry.remove, name)
            del self._served[name]
            log.info("adapter %s is not served any more", name)
            await self._leave(served)

    async def pin(self, name: str, on: bool) -> None:
        """Keep the adapter in memory from its next use on, or no longer. Raises KeyError for an unknown name,
        `InvalidParameter` where there is no room, and `EngineDead`."""
        async with self._turn:
            await self._set_pin(self._served[name], on)

    async def _set_pin(self, served: ServedAdapter, on: bool) -> None:
        if not self._is_pinned_by_others(served):
            await self._client.adapters.pin(served.content_id, on)
        served.pinned = on

    def _is_pinned_by_others(self, served: ServedAdapter) -> bool:
        return any(
            other.pinned and other is not served and other.content_id == served.content_id
            for other in self._served.values()
        )

    async def _leave(self, served: ServedAdapter) -> None:
        """A name has given its content up."""
        if served.pinned and not self._is_pinned_by_others(served):
            # An engine that is not there has nothing pinned, and the next one will be told less.
            with contextlib.suppress(EngineDead):
                await self._client.adapters.pin(served.content_id, on=False)
        await self._drop(served.prepared)

    def _held(self) -> set[PreparedAdapter]:
        """What names stand for, and what requests have."""
        return {*self._leases, *(served.prepared for served in self._served.values())}

    async def _drop(self, prepared: PreparedAdapter) -> None:
        """Forget those of its contents that are held no longer. The turn must be taken: nobody is about to hold them
        then."""
        if self._library is None:
            return
        held = self._held()
        same = next((other for other in held if other.content_id == prepared.content_id), None)
        if same is None:
            self._client.adapters.retire(prepared.content_id)
        else:
            # What goes with it for draft models may differ, and files of that go below.
            self._client.adapters.expect(same.content_id, same.image, same.draft_files)
        for content_id in set(prepared.contents).difference(*(other.contents for other in held)):
            with reported(content_id):
                await self._in_worker(self._library.packer.discard, content_id)

    def _release(self, prepared: PreparedAdapter) -> None:
        self._leases[prepared] -= 1
        if not self._leases[prepared]:
            del self._leases[prepared]
            if prepared not in self._held():
                self._start(self._drop_in_turn(prepared))

    async def _drop_in_turn(self, prepared: PreparedAdapter) -> None:
        async with self._turn:
            await self._drop(prepared)

    def _need_library(self) -> tuple[AdapterLibrary, PackerClient]:
        if self._library is None or self._packer is None:
            raise UnsupportedFeature("adapters", "the engine of this server has none")
        return self._library, self._packer

    async def _in_worker(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    # --- the watched directory ---------------------------------------------------------------------------

    def start(self) -> None:
        """Watch the directory, where there is one."""
        if self._library is not None and self._options.adapter_dir:
            self._start(self._watch())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        parts = tuple(self._library.packer.drafts) if self._library is not None else ()
        before = self._known
        problem = ""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                now = await self._in_worker(scan, self._options.adapter_dir, parts)
            except ModelError as error:
                if str(error) != problem:
                    problem = str(error)
                    log.error("%s", problem)
                continue
            problem = ""
            wanted, before = changes(before, now, self._known), now
            known = dict(self._known)
            for name in wanted.read:
                if not await self._follow(name):
                    continue
                known[name] = now[name]
            for name in wanted.forget:
                del known[name]
                if self._is_watched(name):
                    with contextlib.suppress(KeyError), reported(name):
                        await self.unload(name)
            self._known = known

    async def _follow(self, name: str) -> bool:
        """Load what has come or changed; False: try again without a change, the engine was not there."""
        if name in self._served and not self._is_watched(name):
            self._report_taken(name)
            return True
        try:
            with reported(name):
                await self.load(name, self._watched(name))
        except EngineDead:
            return False
        return True

    def _report_taken(self, name: str) -> None:
        log.error("adapter %s in %s has the name of another one", name, self._options.adapter_dir)

    def _watched(self, name: str) -> str:
        return os.path.join(os.path.abspath(self._options.adapter_dir), name)

    def _is_watched(self, name: str) -> bool:
        return name in self._served and self._served[name].entry.source == self._watched(name)

    async def close(self) -> None:
        """Stop watching; the library is not used any more."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._packer is not None:
            await asyncio.to_thread(self._packer.close)
        await asyncio.to_thread(self._worker.shutdown)


def _register(
    library: AdapterLibrary, name: str, prepared: PreparedAdapter, directory: str | Path, base: str | None
) -> RegisteredAdapter:
    source = os.path.abspath(directory)
    return library.registry.set(
        name,
        prepared.content_id,
        source=source,
        base_model_name=base,
        drafts=prepared.draft_contents,
    )
