"""Every endpoint in one table: the routes, /openapi.json and /docs are made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from tokenloom.api import adapters, models, tokenize
from tokenloom.api.chat import chat_completions
from tokenloom.api.completions import completions
from tokenloom.api.embeddings import embeddings
from tokenloom.api.responses import (
    AdapterInfo,
    AdapterList,
    ChatChunk,
    ChatCompletion,
    Completion,
    DetokenizeResponse,
    EmbeddingList,
    Health,
    Model,
    ModelList,
    TokenizeResponse,
    Version,
)
from tokenloom.api.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)

Handler = Callable[[Request], Awaitable[Response]]


class Endpoint(NamedTuple):
    """A path with its method, handler and types; `chunk` is the type of its server-sent events.

    A response type of None is plain text.
    """

    method: str
    path: str
    handler: Handler
    request: Any
    response: Any
    chunk: Any = None

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip()


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(
        "POST", "/v1/chat/completions", chat_completions, ChatCompletionRequest, ChatCompletion, ChatChunk
    ),
    Endpoint("POST", "/v1/completions", completions, CompletionRequest, Completion, Completion),
    Endpoint("POST", "/v1/embeddings", embeddings, EmbeddingRequest, EmbeddingList),
    Endpoint("GET", "/v1/models", models.list_models, None, ModelList),
    Endpoint("GET", "/v1/models/{model:path}", models.get_model, None, Model),
    Endpoint("POST", "/v1/load_lora_adapter", adapters.load_lora_adapter, LoadAdapterRequest, None),
    Endpoint("POST", "/v1/unload_lora_adapter", adapters.unload_lora_adapter, UnloadAdapterRequest, None),
    Endpoint("GET", "/admin/adapters", adapters.list_adapters, None, AdapterList),
    Endpoint("POST", "/admin/adapters/{name:path}/pin", adapters.pin_adapter, None, AdapterInfo),
    Endpoint("POST", "/admin/adapters/{name:path}/unpin", adapters.unpin_adapter, None, AdapterInfo),
    Endpoint("POST", "/tokenize", tokenize.tokenize, TokenizeRequest, TokenizeResponse),
    Endpoint("POST", "/detokenize", tokenize.detokenize, DetokenizeRequest, DetokenizeResponse),
    Endpoint("GET", "/health", models.health, None, Health),
    Endpoint("GET", "/ping", models.health, None, Health),
    Endpoint("GET", "/version", models.version, None, Version),
    Endpoint("GET", "/metrics", models.metrics, None, None),
)
