"""What every handler shares, and the checks that come before any work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec
from starlette.requests import Request

from tokenloom.api.errors import unavailable
from tokenloom.api.metrics import Metrics
from tokenloom.api.schemas import SloFields
from tokenloom.config import Config
from tokenloom.engine.request import Slo
from tokenloom.errors import EngineDead, InvalidParameter, ModelNotFound, QueueFull
from tokenloom.serving.adapter_service import NO_ADAPTER, AdapterLease, AdapterService
from tokenloom.serving.client import EngineClient, ModelCard
from tokenloom.serving.slo import SloClasses, slo_of

QUEUE_RETRY_SECONDS = 1.0
MAX_SHOWN_ID = 24
MAX_SHOWN_NAMES = 50
SHOWN_CONTENT_DIGITS = 12


@dataclass(frozen=True, slots=True)
class ApiContext:
    """The engine, the configuration, the metrics, the adapters and the SLO classes of one application."""

    client: EngineClient
    config: Config
    metrics: Metrics
    adapters: AdapterService
    slos: SloClasses

    @property
    def max_body_bytes(self) -> int:
        return self.config.server.max_body_mb << 20

    def ready_card(self) -> ModelCard:
        """The served model; raises 503 while the engine cannot take requests."""
        state = self.client.state
        if state != "ready":
            raise unavailable(f"The engine is {state}.")
        try:
            card = self.client.card
        except EngineDead as error:
            raise unavailable(str(error)) from None
        self.metrics.bind(card.name)
        return card

    def card_for(self, model: str) -> ModelCard:
        """The card of the model that a request names ("" for the served one), or of that below the adapter that it
        names; raises 404 or 503."""
        card = self.ready_card()
        if model and model != card.name and self.adapters.find(model) is None:
            raise self._not_found(card, model)
        return card

    def lease(self, model: str) -> tuple[str, AdapterLease]:
        """What the answer calls the model that a request names, and the adapter that it is served with, which is to
        be released when it has ended. Raises 404 or 503."""
        card = self.ready_card()
        if not model or model == card.name:
            return card.name, NO_ADAPTER
        served = self.adapters.find(model)
        if served is None:
            raise self._not_found(card, model)
        return served.name, self.adapters.lease(served.name)

    def _not_found(self, card: ModelCard, model: str) -> ModelNotFound:
        names = self.adapters.names()
        shown = names[:MAX_SHOWN_NAMES]
        more = (f"and {len(names) - len(shown)} more adapters",) if len(names) > len(shown) else ()
        return ModelNotFound(model[:200], (card.name, *shown, *more))

    def check_priority(self, priority: int) -> None:
        """Raise `InvalidParameter` for a priority that the scheduler would not look at."""
        if priority and self.config.scheduler.policy != "priority":
            limit = "0, unless the server runs with --policy priority"
            raise InvalidParameter("priority", priority, limit)

    def slo_for(self, request: Request, given: SloFields | str | None) -> Slo:
        """What a request asks for, or else the class of its API key. Raises `InvalidParameter`."""
        if given is None:
            key_slo = request.state.slo
            return key_slo if isinstance(key_slo, Slo) else self.slos.find(None)
        return self.slos.find(given) if isinstance(given, str) else slo_of(msgspec.structs.asdict(given))

    def check_room(self, card: ModelCard, num_prompts: int) -> None:
        """Raise `QueueFull` unless `num_prompts` more requests may be in flight."""
        if num_prompts > card.max_requests:
            raise InvalidParameter("prompt", f"{num_prompts} prompts", f"at most {card.max_requests} prompts")
        if self.client.num_in_flight + num_prompts > card.max_requests:
            raise QueueFull(self.client.num_in_flight, QUEUE_RETRY_SECONDS)


def context_of(request: Request) -> ApiContext:
    """The context of the application that handles `request`."""
    context = request.app.state.context
    if not isinstance(context, ApiContext):
        raise TypeError("the application was not made by create_app")
    return context


def fingerprint(card: ModelCard, adapter: str) -> str:
    """OpenAI's `system_fingerprint`: equal fingerprints and seeds give equal outputs. `adapter` is the content id of
    the request's adapter, "" for none."""
    numerics = card.numerics_id
    if len(numerics) > MAX_SHOWN_ID:
        numerics = hashlib.sha256(numerics.encode()).hexdigest()[:12]
    return f"tokenloom-{numerics or 'unknown'}" + (f"-{adapter[:SHOWN_CONTENT_DIGITS]}" if adapter else "")
