"""POST /v1/completions."""

from __future__ import annotations

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from tokenloom.api.body import read_struct
from tokenloom.api.context import context_of, fingerprint
from tokenloom.api.generation import ChoiceDelta, Generation, Job, Prompt
from tokenloom.api.logprobs import completion_logprobs, join_logprobs, prompt_logprobs
from tokenloom.api.params import check_lengths, completion_params
from tokenloom.api.prompts import MAX_CHOICES, encode_prompts
from tokenloom.api.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from tokenloom.api.schemas import CompletionRequest
from tokenloom.api.streaming import GenerationResponse, new_response_id
from tokenloom.engine.request import TokenLogprobs
from tokenloom.errors import InvalidParameter
from tokenloom.text.output_text import token_offsets
from tokenloom.text.tokenizer import Tokenizer


async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    context = context_of(request)
    context.ready_card()
    fields = await read_struct(request, CompletionRequest, context.max_body_bytes)
    card = context.card_for(fields.model)
    params = completion_params(fields, card)
    context.check_priority(fields.priority)
    slo = context.slo_for(request, fields.slo)
    tokenizer = context.client.tokenizer
    encoded, texts = await encode_prompts(
        tokenizer,
        fields.prompt,
        add_special_tokens=fields.add_special_tokens,
        vocab_size=card.vocab_size,
        max_context=card.max_context,
    )
    if len(encoded) * params.n > MAX_CHOICES:
        raise InvalidParameter(
            "n", params.n, f"at most {MAX_CHOICES // len(encoded)} for {len(encoded)} prompts"
        )
    context.check_room(card, len(encoded))
    prompts = []
    for number, (ids, text) in enumerate(zip(encoded, texts, strict=True)):
        name = "prompt" if len(encoded) == 1 else f"prompt[{number}]"
        check_lengths(len(ids), fields.max_tokens, card, name, "max_tokens")
        echo = ""
        if fields.echo:
            echo = tokenizer.decode(ids, params.skip_special_tokens) if text is None else text
        prompts.append(Prompt(ids, echo))
    job = Job(
        response_id=new_response_id("cmpl"),
        log_id=request.state.request_id,
        model=fields.model,
        prompts=prompts,
        params=params,
        priority=fields.priority,
        tenant=fields.cache_salt or "",
        exactness=fields.exactness,
        slo=slo,
    )
    generation = Generation(context, job)
    form = CompletionFormat(generation, fields, tokenizer, fingerprint(card, generation.adapter))
    return GenerationResponse(generation, form, stream=fields.stream, options=fields.stream_options)


class CompletionFormat:
    """Writes a generation as `text_completion`, whole or in chunks of the same shape."""

    def __init__(
        self, generation: Generation, fields: CompletionRequest, tokenizer: Tokenizer, system_fingerprint: str
    ) -> None:
        self._generation = generation
        self._fields = fields
        self._tokenizer = tokenizer
        self._fingerprint = system_fingerprint
        include_usage = fields.stream_options is not None and fields.stream_options.include_usage
        self._no_usage = None if include_usage else UNSET

    def _logprobs(self, delta: ChoiceDelta) -> CompletionLogprobs | None:
        """Logprobs of a delta; those of the echoed prompt come with the first one of its choice."""
        num_top = self._fields.logprobs
        if num_top is None:
            return None
        result = completion_logprobs(self._tokenizer, delta.logprobs, delta.offsets, num_top)
        if self._fields.echo and delta.first:
            result = join_logprobs(self._echo_logprobs(delta.choice // self._fields.n, num_top), result)
        return result

    def _echo_logprobs(self, number: int, num_top: int) -> CompletionLogprobs:
        ids = self._generation.job.prompts[number].token_ids
        offsets = token_offsets(self._tokenizer, ids, self._fields.skip_special_tokens)
        # Nothing comes before the first token, so it has no logprob.
        head = TokenLogprobs(ids[0], 0.0, 0, ())
        entries = [head, *(self._generation.prompt_logprobs[number] or ())]
        result = completion_logprobs(self._tokenizer, entries, offsets, num_top)
        result.token_logprobs[0] = None
        result.top_logprobs[0] = None
        return result

    def _choice(self, delta: ChoiceDelta) -> CompletionChoice:
        choice = CompletionChoice(
            index=delta.choice,
            text=delta.text,
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
        )
        if delta.finish_reason is not None:
            choice.stop_reason = delta.stop
        if self._fields.return_token_ids:
            choice.token_ids = delta.token_ids
            if delta.first:
                number = delta.choice // self._fields.n
                choice.prompt_token_ids = list(self._generation.job.prompts[number].token_ids)
        return choice

    def _response(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        job = self._generation.job
        return Completion(
            id=job.response_id,
            created=self._generation.created,
            model=self._generation.model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage or self._no_usage,
        )

    def chunks(self, delta: ChoiceDelta, usage: Usage | None) -> list[msgspec.Struct]:
        """One chunk, unless there is nothing to show yet."""
        wanted = (
            delta.text
            or delta.finish_reason is not None
            or delta.logprobs
            or (self._fields.return_token_ids and delta.token_ids)
        )
        return [self._response([self._choice(delta)], usage)] if wanted else []

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The chunk of `include_usage`."""
        return self._response([], usage)

    def whole(self, choices: list[ChoiceDelta], usage: Usage) -> msgspec.Struct:
        """The response without streaming."""
        written = [self._choice(choice) for choice in choices]
        if self._fields.prompt_logprobs is not None:
            for choice in written:
                entries = self._generation.prompt_logprobs[choice.index // self._fields.n]
                choice.prompt_logprobs = prompt_logprobs(
                    self._tokenizer, entries, self._fields.prompt_logprobs
                )
        return self._response(written, usage)
