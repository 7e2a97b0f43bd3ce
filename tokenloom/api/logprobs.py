"""Logprobs in the forms of the two APIs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenloom.api.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from tokenloom.engine.request import TokenLogprobs
from tokenloom.text.tokenizer import Tokenizer

# JSON has no -inf: what the model rules out gets this, as in the OpenAI API.
LOWEST = -9999.0


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprobs]) -> ChatLogprobs:
    """The chat form: text, bytes and the best tokens of each position."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=tokenizer.token_text(entry.token_id),
                logprob=_finite(entry.logprob),
                bytes=list(tokenizer.token_bytes(entry.token_id)),
                top_logprobs=[
                    TopLogprob(
                        token=tokenizer.token_text(token),
                        logprob=_finite(logprob),
                        bytes=list(tokenizer.token_bytes(token)),
                    )
                    for token, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )


def completion_logprobs(
    tokenizer: Tokenizer, entries: Iterable[TokenLogprobs], offsets: Sequence[int], num_top: int
) -> CompletionLogprobs:
    """The completions form: parallel lists; `num_top` is what the client asked for.

    The chosen token is always among the best ones, as OpenAI has it. Tokens with the same text share a key;
    the likeliest keeps it.
    """
    result = CompletionLogprobs(text_offset=list(offsets), token_logprobs=[], tokens=[], top_logprobs=[])
    for entry in entries:
        text = tokenizer.token_text(entry.token_id)
        result.tokens.append(text)
        result.token_logprobs.append(_finite(entry.logprob))
        best: dict[str, float] = {}
        for token, logprob in entry.top[:num_top]:
            best.setdefault(tokenizer.token_text(token), _finite(logprob))
        best.setdefault(text, _finite(entry.logprob))
        result.top_logprobs.append(best)
    return result


def join_logprobs(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """One after the other."""
    return CompletionLogprobs(
        text_offset=first.text_offset + second.text_offset,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        tokens=first.tokens + second.tokens,
        top_logprobs=first.top_logprobs + second.top_logprobs,
    )


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs] | None, num_top: int
) -> PromptLogprobs:
    """vLLM's form: null for the first token, then the given token and the `num_top` best by token id."""
    result: PromptLogprobs = [None]
    for entry in entries or ():
        position: dict[str, PromptLogprob] = {}
        for rank, (token, logprob) in enumerate(entry.top[:num_top], 1):
            position[str(token)] = PromptLogprob(
                logprob=_finite(logprob), rank=rank, decoded_token=tokenizer.token_text(token)
            )
        position[str(entry.token_id)] = PromptLogprob(
            logprob=_finite(entry.logprob),
            rank=entry.rank,
            decoded_token=tokenizer.token_text(entry.token_id),
        )
        result.append(position)
    return result
