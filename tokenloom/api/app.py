"""The ASGI application."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from tokenloom.api.auth import Gate
from tokenloom.api.context import ApiContext
from tokenloom.api.endpoints import ENDPOINTS
from tokenloom.api.errors import ApiError, handle_error, handle_http_exception
from tokenloom.api.metrics import Metrics
from tokenloom.api.openapi import docs, openapi_json
from tokenloom.config import Config
from tokenloom.errors import TokenloomError
from tokenloom.serving.adapter_service import AdapterService
from tokenloom.serving.client import EngineClient
from tokenloom.serving.slo import SloClasses


def create_app(client: EngineClient, config: Config, adapters: AdapterService | None = None) -> Starlette:
    """The HTTP face of `client`, with `adapters` over its model (None: without). The application's lifespan starts
    and closes both. Raises `InvalidParameter` for SLO classes and keys that cannot be read."""
    slos = SloClasses(config)
    served = adapters or AdapterService(client, None, model="", options=config.adapters)
    metrics = Metrics(served.name_of)
    client.subscribe(functools.partial(metrics.on_step, client))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        await client.start()
        served.start()
        try:
            yield
        finally:
            await client.close()
            await served.close()

    routes = [Route(entry.path, entry.handler, methods=[entry.method]) for entry in ENDPOINTS]
    routes += [Route("/openapi.json", openapi_json), Route("/docs", docs)]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Gate, api_key=config.server.api_key, slo_keys=slos.keys)],
        exception_handlers={
            ApiError: handle_error,
            TokenloomError: handle_error,
            HTTPException: handle_http_exception,
        },
    )
    # A redirect would drop the body of a POST in many clients; a wrong path is a 404.
    app.router.redirect_slashes = False
    app.state.context = ApiContext(client, config, metrics, served, slos)
    return app
