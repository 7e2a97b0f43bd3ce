"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenloom.api.body import read_struct
from tokenloom.api.context import ApiContext, context_of
from tokenloom.api.generation import closing
from tokenloom.api.prompts import encode_prompts, prompt_names
from tokenloom.api.responses import EmbeddingItem, EmbeddingList, EmbeddingUsage, PromptTokensDetails
from tokenloom.api.schemas import EmbeddingRequest
from tokenloom.api.streaming import ClientGone, new_response_id, unless_disconnected
from tokenloom.engine.request import Request, SequenceDelta
from tokenloom.errors import InvalidParameter, TokenloomError
from tokenloom.serving.adapter_service import AdapterLease
from tokenloom.serving.client import ModelCard
from tokenloom.serving.outputs import finished_vector
from tokenloom.serving.requests import check_dimensions, embedding_request, num_kept

log = logging.getLogger("tokenloom.requests")


async def embeddings(request: HttpRequest) -> Response:
    """Turn one or several texts into vectors."""
    context = context_of(request)
    context.ready_card()
    fields = await read_struct(request, EmbeddingRequest, context.max_body_bytes)
    card = context.card_for(fields.model)
    check_dimensions(fields.dimensions, card)
    context.check_priority(fields.priority)
    encoded, _ = await encode_prompts(
        context.client.tokenizer,
        fields.input,
        add_special_tokens=fields.add_special_tokens,
        vocab_size=card.vocab_size,
        max_context=card.max_context,
        param="input",
        keep=num_kept(fields.truncate_prompt_tokens, card),
    )
    for name, ids in zip(prompt_names("input", len(encoded)), encoded, strict=True):
        if len(ids) > card.max_context:
            raise _too_long(name, len(ids), card)
    context.check_room(card, _num_at_once(len(encoded), card))
    response_id = new_response_id("embd")
    model, lease = context.lease(fields.model)
    requests = [
        embedding_request(
            ids,
            fields.pooling or context.config.model.pooling_type,
            request_id=f"{response_id}-{number}",
            priority=fields.priority,
            tenant=fields.cache_salt or "",
            adapter=lease.content_id,
        )
        for number, ids in enumerate(encoded)
    ]
    served = Served(model, card, lease)
    return EmbeddingResponse(context, served, requests, fields, log_id=request.state.request_id)


def _too_long(name: str, num_tokens: int, card: ModelCard) -> InvalidParameter:
    message = (
        f"This model's maximum context length is {card.max_context} tokens, but {name} has {num_tokens}."
    )
    return InvalidParameter(
        name.partition("[")[0],
        num_tokens,
        f"at most {card.max_context}",
        code="context_length_exceeded",
        message=message,
    )


def _num_at_once(num_inputs: int, card: ModelCard) -> int:
    """More than run at once would only fill the queue, and keep others out."""
    return min(num_inputs, card.max_running, card.max_requests)


class Served(NamedTuple):
    """What the answer calls the model, the card of the base, and the adapter over it."""

    name: str
    card: ModelCard
    lease: AdapterLease


class EmbeddingResponse(Response):
    """Has every input served as a request of its own, and sends the vectors in the order of the inputs.

    If one fails, or the client leaves, the others are cancelled.
    """

    def __init__(
        self,
        context: ApiContext,
        served: Served,
        requests: Sequence[Request],
        fields: EmbeddingRequest,
        *,
        log_id: str,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._context = context
        self._served = served
        self._requests = requests
        self._fields = fields
        self._log_id = log_id
        self._items: list[msgspec.Raw | None] = [None] * len(requests)
        self._num_cached = 0
        self._started = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientGone):
                body = await unless_disconnected(receive, self._collect())
                await Response(body, media_type="application/json")(scope, receive, send)
        finally:
            self._served.lease.release()

    async def _collect(self) -> bytes:
        outcome: Literal["stop", "abort", "error"] = "abort"
        waiting = enumerate(self._requests)
        num_tasks = _num_at_once(len(self._requests), self._served.card)
        tasks = [asyncio.create_task(self._serve(waiting)) for _ in range(num_tasks)]
        try:
            await asyncio.gather(*tasks)
            outcome = "stop"
        except Exception:
            outcome = "error"
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._finish(outcome)
        data: list[Any] = self._items
        return msgspec.json.encode(EmbeddingList(data=data, model=self._served.name, usage=self._usage()))

    async def _serve(self, waiting: Iterator[tuple[int, Request]]) -> None:
        """Serve one request after the other; each takes the place in the queue that the last one left."""
        for number, request in waiting:
            async with closing(self._context.client.generate(request)) as stream:
                async for delta in stream:
                    if delta.last:
                        self._take(number, delta)

    def _take(self, number: int, delta: SequenceDelta) -> None:
        """Write one vector. A whole answer at once may be a hundred megabytes, which would keep others waiting."""
        if delta.embedding is None:
            raise TokenloomError(f"the engine gave no embedding of input {number}")
        try:
            vector = finished_vector(delta.embedding, self._fields.normalize, self._fields.dimensions)
        except TokenloomError as error:
            raise TokenloomError(f"input {number}: {error}") from None
        written: list[float] | str = vector.tolist()
        if self._fields.encoding_format == "base64":
            written = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        self._items[number] = msgspec.Raw(msgspec.json.encode(EmbeddingItem(index=number, embedding=written)))
        self._num_cached += delta.num_cached_tokens
        metrics = self._context.metrics
        metrics.count("prompt_tokens", len(self._requests[number].prompt_token_ids))
        metrics.count("prompt_tokens_cached", delta.num_cached_tokens)
        if delta.timings is not None:
            metrics.on_choice_end(delta.timings, 0, first_choice=True)

    def _usage(self) -> EmbeddingUsage:
        num_tokens = sum(len(request.prompt_token_ids) for request in self._requests)
        return EmbeddingUsage(
            prompt_tokens=num_tokens,
            total_tokens=num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached),
        )

    def _finish(self, outcome: Literal["stop", "abort", "error"]) -> None:
        """Account for the end, whatever it was: one log line per API request."""
        metrics = self._context.metrics
        seconds = time.monotonic() - self._started
        for item in self._items:
            metrics.count_finished(outcome if item is None else "stop")
        if outcome == "stop":
            metrics.observe("e2e_request_latency_seconds", seconds)
        usage = self._usage()
        log.info(
            "request %s x_request_id=%s model=%s inputs=%d tokens_in=%d tokens_cached=%d finish=%s total_ms=%.1f",
            self._requests[0].request_id.rpartition("-")[0],
            self._log_id,
            self._served.name,
            len(self._requests),
            usage.prompt_tokens,
            self._num_cached,
            outcome,
            seconds * 1e3,
        )
