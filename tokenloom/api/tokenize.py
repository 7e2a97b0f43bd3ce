"""POST /tokenize and POST /detokenize."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from tokenloom.api.body import read_struct
from tokenloom.api.context import context_of
from tokenloom.api.errors import ApiError
from tokenloom.api.models import json_response
from tokenloom.api.prompts import MAX_TOTAL_TOKENS, check_token_ids, encode_chat, off_loop
from tokenloom.api.responses import DetokenizeResponse, TokenizeResponse
from tokenloom.api.schemas import DetokenizeRequest, TokenizeRequest
from tokenloom.errors import InvalidParameter


async def tokenize(request: Request) -> Response:
    """The token ids that a prompt, or messages, would have."""
    context = context_of(request)
    fields = await read_struct(request, TokenizeRequest, context.max_body_bytes)
    card = context.card_for(fields.model)
    tokenizer = context.client.tokenizer
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError(
            400, "Give either prompt or messages.", param="prompt", code="missing_required_parameter"
        )
    if fields.prompt is not None:
        prompt, special = fields.prompt, fields.add_special_tokens is not False
        ids = await off_loop(len(prompt), lambda: tokenizer.encode(prompt, special))
    else:
        ids, _ = await encode_chat(
            tokenizer,
            fields.messages or [],
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            variables=fields.chat_template_kwargs,
            add_special_tokens=fields.add_special_tokens is True,
        )
    if len(ids) > MAX_TOTAL_TOKENS:
        name = "messages" if fields.prompt is None else "prompt"
        raise InvalidParameter(name, f"{len(ids)} tokens", f"at most {MAX_TOTAL_TOKENS} tokens")
    texts = None
    if fields.return_token_strs:
        texts = await off_loop(4 * len(ids), lambda: [tokenizer.token_text(token) for token in ids])
    return json_response(
        TokenizeResponse(count=len(ids), max_model_len=card.max_context, tokens=ids, token_strs=texts)
    )


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    context = context_of(request)
    fields = await read_struct(request, DetokenizeRequest, context.max_body_bytes)
    card = context.card_for(fields.model)
    if len(fields.tokens) > MAX_TOTAL_TOKENS:
        raise InvalidParameter("tokens", f"{len(fields.tokens)} tokens", f"at most {MAX_TOTAL_TOKENS} tokens")
    check_token_ids("tokens", fields.tokens, card.vocab_size)
    tokenizer = context.client.tokenizer
    text = await off_loop(
        4 * len(fields.tokens), lambda: tokenizer.decode(fields.tokens, fields.skip_special_tokens)
    )
    return json_response(DetokenizeResponse(prompt=text))
