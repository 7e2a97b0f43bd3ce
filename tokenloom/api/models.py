"""The small endpoints: models, health, version, metrics."""

from __future__ import annotations

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import tokenloom
from tokenloom.api.context import context_of
from tokenloom.api.errors import RETRY_AFTER_SECONDS
from tokenloom.api.metrics import CONTENT_TYPE
from tokenloom.api.responses import Health, Model, ModelList, Version
from tokenloom.errors import EngineDead
from tokenloom.serving.adapter_service import ServedAdapter
from tokenloom.serving.client import ModelCard


def json_response(
    value: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A Struct as a JSON response."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def _model(card: ModelCard) -> Model:
    return Model(id=card.name, created=card.created, root=card.name, max_model_len=card.max_context)


def _adapter(card: ModelCard, served: ServedAdapter) -> Model:
    return Model(
        id=served.name,
        created=int(served.entry.added),
        root=served.entry.source or served.name,
        parent=card.name,
        max_model_len=card.max_context,
    )


async def list_models(request: Request) -> Response:
    """The served models: one, and its adapters."""
    context = context_of(request)
    card = context.ready_card()
    adapters = (context.adapters.find(name) for name in context.adapters.names())
    return json_response(
        ModelList(data=[_model(card), *(_adapter(card, served) for served in adapters if served)])
    )


async def get_model(request: Request) -> Response:
    """One model by its id."""
    name = request.path_params["model"]
    if not name:
        raise HTTPException(404)
    context = context_of(request)
    card = context.card_for(name)
    served = None if name == card.name else context.adapters.find(name)
    return json_response(_adapter(card, served) if served else _model(card))


async def health(request: Request) -> Response:
    """200 when requests are served; 503 with the state while the engine loads, restarts or has failed."""
    client = context_of(request).client
    state = client.state
    try:
        name = client.card.name
    except EngineDead:
        name = None
    if state == "ready":
        return json_response(Health(status="ok", state=state, model=name, num_in_flight=client.num_in_flight))
    detail = getattr(client, "failure", "") or None
    body = Health(
        status="unavailable", state=state, model=name, num_in_flight=client.num_in_flight, detail=detail
    )
    return json_response(body, 503, {"Retry-After": str(RETRY_AFTER_SECONDS)})


async def version(request: Request) -> Response:
    """The version of the server, and the numerics that its outputs are exact within."""
    try:
        numerics = context_of(request).client.card.numerics_id
    except EngineDead:
        numerics = None
    return json_response(Version(version=tokenloom.__version__, numerics=numerics))


async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    context = context_of(request)
    context.metrics.adapters.reports = await context.adapters.report()
    return Response(context.metrics.render(context.client), headers={"Content-Type": CONTENT_TYPE})
