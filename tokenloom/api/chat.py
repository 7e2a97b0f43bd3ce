"""POST /v1/chat/completions."""

from __future__ import annotations

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from tokenloom.api.body import read_struct
from tokenloom.api.context import context_of, fingerprint
from tokenloom.api.generation import ChoiceDelta, Generation, Job, Prompt
from tokenloom.api.logprobs import chat_logprobs, prompt_logprobs
from tokenloom.api.params import chat_max_tokens, chat_max_tokens_name, chat_params, check_lengths
from tokenloom.api.prompts import encode_chat
from tokenloom.api.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from tokenloom.api.schemas import ChatCompletionRequest
from tokenloom.api.streaming import GenerationResponse, new_response_id
from tokenloom.text.tokenizer import Tokenizer


async def chat_completions(request: Request) -> Response:
    """Answer a conversation, or continue its last message."""
    context = context_of(request)
    context.ready_card()
    fields = await read_struct(request, ChatCompletionRequest, context.max_body_bytes)
    card = context.card_for(fields.model)
    params = chat_params(fields, card)
    context.check_priority(fields.priority)
    slo = context.slo_for(request, fields.slo)
    context.check_room(card, 1)
    tokenizer = context.client.tokenizer
    ids, continued = await encode_chat(
        tokenizer,
        fields.messages,
        add_generation_prompt=fields.add_generation_prompt,
        continue_final_message=fields.continue_final_message,
        variables=fields.chat_template_kwargs,
        add_special_tokens=fields.add_special_tokens,
        max_context=card.max_context,
    )
    check_lengths(len(ids), chat_max_tokens(fields), card, "messages", chat_max_tokens_name(fields))
    job = Job(
        response_id=new_response_id("chatcmpl"),
        log_id=request.state.request_id,
        model=fields.model,
        prompts=[Prompt(ids, continued if fields.echo else "")],
        params=params,
        priority=fields.priority,
        tenant=fields.cache_salt or "",
        exactness=fields.exactness,
        slo=slo,
    )
    generation = Generation(context, job)
    form = ChatFormat(generation, fields, tokenizer, fingerprint(card, generation.adapter))
    return GenerationResponse(generation, form, stream=fields.stream, options=fields.stream_options)


class ChatFormat:
    """Writes a generation as `chat.completion` or as its chunks."""

    def __init__(
        self,
        generation: Generation,
        fields: ChatCompletionRequest,
        tokenizer: Tokenizer,
        system_fingerprint: str,
    ) -> None:
        self._generation = generation
        self._fields = fields
        self._tokenizer = tokenizer
        self._fingerprint = system_fingerprint
        include_usage = fields.stream_options is not None and fields.stream_options.include_usage
        # OpenAI: with include_usage every other chunk has a null usage.
        self._no_usage = None if include_usage else UNSET

    def _logprobs(self, delta: ChoiceDelta) -> ChatLogprobs | None:
        if not self._fields.logprobs:
            return None
        return chat_logprobs(self._tokenizer, delta.logprobs)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatChunk:
        job = self._generation.job
        return ChatChunk(
            id=job.response_id,
            created=self._generation.created,
            model=self._generation.model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage or self._no_usage,
        )

    def chunks(self, delta: ChoiceDelta, usage: Usage | None) -> list[msgspec.Struct]:
        """The role goes out alone, before the first text of a choice."""
        chunks: list[msgspec.Struct] = []
        wants_ids = self._fields.return_token_ids
        if delta.first:
            opening = ChatChunkChoice(index=delta.choice, delta=ChatDelta(role="assistant", content=""))
            chunk = self._chunk([opening], usage)
            if wants_ids:
                chunk.prompt_token_ids = list(self._generation.job.prompts[0].token_ids)
            chunks.append(chunk)
        ended = delta.finish_reason is not None
        if delta.text or ended or delta.logprobs or (wants_ids and delta.token_ids):
            choice = ChatChunkChoice(
                index=delta.choice,
                delta=ChatDelta(content=delta.text) if delta.text or not ended else ChatDelta(),
                logprobs=self._logprobs(delta) if delta.logprobs else None,
                finish_reason=delta.finish_reason,
            )
            if ended:
                choice.stop_reason = delta.stop
            if wants_ids:
                choice.token_ids = delta.token_ids
            chunks.append(self._chunk([choice], usage))
        return chunks

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The chunk of `include_usage`."""
        return self._chunk([], usage)

    def whole(self, choices: list[ChoiceDelta], usage: Usage) -> msgspec.Struct:
        """The response without streaming."""
        generation = self._generation
        job = generation.job
        wants_ids = self._fields.return_token_ids
        num_prompt_top = self._fields.prompt_logprobs
        return ChatCompletion(
            id=job.response_id,
            created=generation.created,
            model=generation.model,
            system_fingerprint=self._fingerprint,
            choices=[
                ChatChoice(
                    index=choice.choice,
                    message=AssistantMessage(content=choice.text),
                    logprobs=self._logprobs(choice),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop,
                    token_ids=choice.token_ids if wants_ids else UNSET,
                )
                for choice in choices
            ],
            usage=usage,
            prompt_token_ids=list(job.prompts[0].token_ids) if wants_ids else UNSET,
            prompt_logprobs=(
                UNSET
                if num_prompt_top is None
                else prompt_logprobs(self._tokenizer, generation.prompt_logprobs[0], num_prompt_top)
            ),
        )
