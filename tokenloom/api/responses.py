"""What clients get back. Unset fields are left out of the JSON; null ones are part of the OpenAI format."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

FinishReason = Literal["stop", "length", "abort", "error"]


class PromptTokensDetails(Struct, kw_only=True):
    """`cached_tokens` came from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(Struct, kw_only=True):
    """Guessed tokens that were verified: those that came true, and the others. The output is the same without."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Struct, kw_only=True):
    """Tokens of a request, over all its prompts and choices. `completion_tokens_details` is there where the server
    speculates."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TopLogprob(Struct, kw_only=True):
    """One of the best tokens of a position. `bytes` is its exact UTF-8, perhaps part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, kw_only=True):
    """The chosen token of a position and the best ones there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True):
    """Logprobs of the raw distribution, before penalties and temperature, one entry per token."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct, kw_only=True):
    """Parallel lists. `text_offset` is where a token begins in the choice's text, in characters."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(Struct, kw_only=True):
    """vLLM's entry of `prompt_logprobs`, keyed by token id."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class AssistantMessage(Struct, kw_only=True):
    """The answer of one choice."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Struct, kw_only=True):
    """One of the n answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    """POST /v1/chat/completions without streaming."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatDelta(Struct, kw_only=True):
    """What a chunk adds to a choice."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, kw_only=True):
    """One choice in a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True):
    """One server-sent event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(Struct, kw_only=True):
    """One completion: choices of prompt p have the indices p * n to p * n + n - 1. Also what a chunk adds."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct, kw_only=True):
    """POST /v1/completions, whole or one server-sent event."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class EmbeddingItem(Struct, kw_only=True):
    """The embedding of one input: numbers, or the base64 of their bytes as little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Struct, kw_only=True):
    """Tokens over all inputs; nothing is generated."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingList(Struct, kw_only=True):
    """POST /v1/embeddings: one item per input, in their order."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class Model(Struct, kw_only=True):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tokenloom"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(Struct, kw_only=True):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeResponse(Struct, kw_only=True):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct, kw_only=True):
    """POST /detokenize."""

    prompt: str


class Health(Struct, kw_only=True):
    """GET /health: 200 when `state` is ready, else 503."""

    status: Literal["ok", "unavailable"]
    state: str
    model: str | None = None
    num_in_flight: int
    detail: str | None = None


class Version(Struct, kw_only=True):
    """GET /version."""

    version: str
    numerics: str | None = None


class AdapterInfo(Struct, kw_only=True):
    """An adapter. `bytes` are those of its tensors as saved, `resident_bytes` what it takes of the memory for KV pages
    now (0: it is not there); `created` and `last_used` are in seconds since 1970; `drafts` are the contents that go
    with it for draft models, by the names of these."""

    name: str
    object: Literal["adapter"] = "adapter"
    content_id: str
    version: int
    parent: str
    base_model_name: str | None
    source: str | None
    rank: int
    bytes: int
    created: int
    resident_bytes: int
    requests_live: int
    sequences_running: int
    requests_total: int
    last_used: float | None
    pinned: bool
    drafts: dict[str, str]


class AdapterList(Struct, kw_only=True):
    """GET /admin/adapters."""

    object: Literal["list"] = "list"
    data: list[AdapterInfo]


OpenApiDocument = dict[str, Any]
