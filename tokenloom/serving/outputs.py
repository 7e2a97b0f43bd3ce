"""What `LLM` returns, in the shape that users of vLLM know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.pooling import normalized, vector_of
from tokenloom.engine.request import Request, RequestTimings, SequenceDelta, TokenLogprobs
from tokenloom.errors import TokenloomError
from tokenloom.text.output_text import output_text_of
from tokenloom.text.tokenizer import Tokenizer


class Logprob(NamedTuple):
    """Natural-log probability of a token under the raw distribution, its rank from 1, and its text."""

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobMap = dict[int, Logprob]
"""Of one position: the chosen (or given) token first, then the best ones in falling order."""


@dataclass(slots=True)
class CompletionOutput:
    """One sample. `stop_reason` is the stop string or stop token id that ended it, None otherwise.

    `token_ids` has every token that was generated, also the one that ended the text; `text` is without it
    unless `include_stop_str_in_output`. `cumulative_logprob` and `logprobs` are None where none were asked.
    `num_drafted_tokens` were guessed for it and verified, `num_accepted_tokens` of them came true; the output is the
    same without.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobMap] | None
    finish_reason: Literal["stop", "length", "cancelled", "error"] | None
    stop_reason: str | int | None
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True)
class RequestOutput:
    """One request with its samples in `outputs`. `prompt` is None where token ids were given.

    `prompt_logprobs` starts with None, since nothing precedes the first token. `metrics` are times in seconds
    of the engine's clock. `num_cached_tokens` counts the prompt tokens found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobMap | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestTimings | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class EmbeddingOutput:
    """The vector of a prompt, as floats that are exactly its float32 numbers."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """The length of the vector."""
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """One request of `LLM.embed`; the fields are those of `RequestOutput`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool
    metrics: RequestTimings | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class Collected:
    """The deltas of one request, put together."""

    request: Request
    prompt: str | None = None
    token_ids: list[list[int]] = field(init=False)
    logprobs: list[list[TokenLogprobs]] = field(init=False)
    ends: list[SequenceDelta | None] = field(init=False)
    prompt_logprobs: list[TokenLogprobs] | None = None

    def __post_init__(self) -> None:
        samples = range(self.request.params.n)
        self.token_ids = [[] for _ in samples]
        self.logprobs = [[] for _ in samples]
        self.ends = [None for _ in samples]

    def add(self, delta: SequenceDelta) -> None:
        """Append what one step gave."""
        sample = delta.sample
        self.token_ids[sample].extend(delta.token_ids)
        self.logprobs[sample].extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.ends[sample] = delta

    def output(self, tokenizer: Tokenizer, decode_token: Callable[[int], str]) -> RequestOutput:
        """The finished request as users see it."""
        request = self.request
        ends = [end for end in self.ends if end is not None]
        prompt_logprobs: list[TokenLogprobMap | None] | None = None
        if request.params.prompt_logprobs is not None:
            prompt_logprobs = [
                None,
                *(_logprob_map(entry, decode_token) for entry in self.prompt_logprobs or ()),
            ]
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            prompt_logprobs=prompt_logprobs,
            outputs=[self._completion(i, tokenizer, decode_token) for i in range(request.params.n)],
            finished=len(ends) == len(self.ends),
            metrics=next((end.timings for end in ends if end.last), None),
            num_cached_tokens=max((end.num_cached_tokens for end in ends), default=0),
        )

    def embedding(self, *, normalize: bool, dimensions: int | None) -> EmbeddingRequestOutput:
        """The finished request of a prompt whose embedding was asked for.

        Raises `TokenloomError` where the model gave no finite numbers.
        """
        [end] = self.ends
        if end is None or end.embedding is None:
            raise TokenloomError(f"request {self.request.request_id} has no embedding")
        return EmbeddingRequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            outputs=EmbeddingOutput(finished_vector(end.embedding, normalize, dimensions).tolist()),
            finished=True,
            metrics=end.timings,
            num_cached_tokens=end.num_cached_tokens,
        )

    def _completion(
        self, sample: int, tokenizer: Tokenizer, decode_token: Callable[[int], str]
    ) -> CompletionOutput:
        params = self.request.params
        end = self.ends[sample]
        stop = end.stop if end is not None else None
        finish_reason = end.finish_reason if end is not None else None
        token_ids = self.token_ids[sample]
        shown: Sequence[int] = token_ids
        if ended_by_token(finish_reason, stop) and not params.include_stop_str_in_output:
            shown = token_ids[:-1]
        text = output_text_of(tokenizer, self.request.prompt_token_ids, params)
        parts = [text.push(token).text for token in shown]
        parts.append(text.finish())
        entries = self.logprobs[sample] if params.logprobs is not None else None
        return CompletionOutput(
            index=sample,
            text="".join(parts),
            token_ids=token_ids,
            cumulative_logprob=None if entries is None else sum(entry.logprob for entry in entries),
            logprobs=None if entries is None else [_logprob_map(entry, decode_token) for entry in entries],
            finish_reason=finish_reason,
            stop_reason=stop,
            num_drafted_tokens=0 if end is None else end.num_drafted,
            num_accepted_tokens=0 if end is None else end.num_accepted,
        )


def finished_vector(embedding: bytes, normalize: bool, dimensions: int | None) -> NDArray[np.float32]:
    """float32 [W] of a delta's `embedding`, or its first `dimensions` numbers; with `normalize` the Euclidean
    length is 1.

    Raises `TokenloomError` for numbers that are not finite, which have no form in JSON and no direction.
    """
    vector = vector_of(embedding)[:dimensions]
    if not np.isfinite(vector).all():
        raise TokenloomError("the model's hidden state is not finite: this prompt has no embedding")
    return normalized(vector) if normalize else vector


def ended_by_token(finish_reason: str | None, stop: str | int | None) -> bool:
    """Whether a sequence ended with an end-of-sequence or stop token, whose text is not shown by default."""
    return finish_reason == "stop" and not isinstance(stop, str)


def _logprob_map(entry: TokenLogprobs, decode_token: Callable[[int], str]) -> TokenLogprobMap:
    result = {entry.token_id: Logprob(entry.logprob, entry.rank, decode_token(entry.token_id))}
    for rank, (token, logprob) in enumerate(entry.top, 1):
        if token not in result:
            result[token] = Logprob(logprob, rank, decode_token(token))
    return result
