"""How the faces talk to an engine, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from tokenloom.engine.adapter_pool import AdapterUse
from tokenloom.engine.plan import StepRecord
from tokenloom.engine.request import Request, SequenceDelta
from tokenloom.errors import TokenloomError
from tokenloom.runtime.adapter_host import AdapterFile
from tokenloom.text.tokenizer import Tokenizer

EngineState = Literal["loading", "ready", "restarting", "failed", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What the API says about the served model. `max_context` is in tokens, `created` in Unix seconds;
    `max_requests` is how many may be in flight before 429; `default_sampling` is what generation_config.json
    says, by the names of `SamplingParams`. Embeddings have `hidden_size` numbers, and may be cut to the lengths
    in `matryoshka` (empty: any, None: none). `speculates` says whether tokens are guessed."""

    name: str
    created: int
    max_context: int
    vocab_size: int
    max_running: int
    max_requests: int
    numerics_id: str = ""
    default_sampling: dict[str, float | int] = field(default_factory=dict)
    hidden_size: int = 0
    matryoshka: tuple[int, ...] | None = None
    speculates: bool = False


class AdapterControl(Protocol):
    """Tells the engine of adapters, and each engine after it; by content id."""

    def expect(self, content_id: str, image: Path, drafts: Mapping[str, AdapterFile] = ...) -> None:
        """Have each engine to come told of the adapter whose image is at `image`, and of `drafts`, which go with it
        for draft models."""

    def refusal(self, content_id: str) -> TokenloomError | None:
        """Why an engine did not take the adapter when it was told of it again; None if it did."""

    async def load(self, content_id: str, image: Path, drafts: Mapping[str, AdapterFile] = ...) -> None:
        """Let requests have the adapter whose image is at `image`, and `drafts` go with it from now on. Raises what
        the engine found wrong with them, or `EngineDead`; they are then unknown as before."""

    async def pin(self, content_id: str, on: bool) -> None:
        """Keep the adapter in the pool, or no longer. Raises as `Engine.pin_adapter`, or `EngineDead`."""

    def retire(self, content_id: str) -> None:
        """No request will have the adapter any more."""

    async def uses(self) -> list[AdapterUse]:
        """How the engine uses its adapters now. Raises `EngineDead`."""


class EngineClient(Protocol):
    """An engine as the API process sees it."""

    @property
    def state(self) -> EngineState: ...

    @property
    def card(self) -> ModelCard:
        """Raises `EngineDead` before the engine was ready once."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def num_in_flight(self) -> int:
        """Requests accepted and not yet ended."""

    @property
    def num_restarts(self) -> int:
        """Times that a dead engine was started again."""

    @property
    def adapters(self) -> AdapterControl:
        """What the engine is told of adapters."""

    def generate(self, request: Request) -> AsyncIterator[SequenceDelta]:
        """Serve one request; the iterator ends after the delta with `last`.

        Closing the iterator (or cancelling its task) before that cancels the request and frees all it holds.
        Raises `InvalidParameter`, `QueueFull`, or `EngineDead` when the engine ends under the request.
        """

    def subscribe(self, observer: StepObserver) -> None:
        """Have `observer` called with the record of every step (perhaps in bursts)."""

    async def start(self) -> None:
        """Start the engine; returns at once, `state` tells when it is ready."""

    async def close(self) -> None:
        """Cancel what runs and stop the engine."""


class StepObserver(Protocol):
    """Receives step records, for metrics."""

    def __call__(self, record: StepRecord) -> None: ...
