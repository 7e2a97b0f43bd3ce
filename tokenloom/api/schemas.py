"""What clients may send: the OpenAI requests, with the extra fields that vLLM's clients know.

A null field stands for its default. Limits of the sampling fields are those of `SamplingParams`; the Structs
only fix the JSON types.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}

PromptField = Annotated[
    Any,
    Meta(description="A text, texts, token ids, or lists of token ids.", extra_json_schema=_PROMPT_SCHEMA),
]
Salt = Annotated[str, Meta(min_length=1, max_length=256)]
Priority = Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31, description="Lower is more urgent.")]


class StreamOptions(Struct, kw_only=True):
    """`include_usage` adds a last chunk with the usage; `continuous_usage_stats` puts it on every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SloFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """What the request should keep to, in milliseconds: `tpot_ms` per output token after the first, on average, and
    `ttft_ms` to the first one."""

    tpot_ms: float | None = None
    ttft_ms: float | None = None


class SamplingFields(Struct, kw_only=True):
    """The fields that chat and completions share."""

    model: str = ""
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    min_tokens: int = 0
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    return_token_ids: bool = False
    exactness: Annotated[
        Literal["exact", "distribution"],
        Meta(description="distribution: speculation keeps the law of a sampled text, not the text."),
    ] = "exact"
    slo: Annotated[
        SloFields | str | None,
        Meta(description="Objectives, or the name of a class of the server (--slo-class)."),
    ] = None
    priority: Priority = 0
    cache_salt: Salt | None = None


class ContentPart(Struct, kw_only=True):
    """A part of a message; only text is served."""

    type: str
    text: str | None = None


class ChatMessage(Struct, kw_only=True):
    """One message. Roles are system, developer (as system), user and assistant."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    tool_call_id: str | None = None


class ChatCompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/chat/completions.

    Where neither `add_generation_prompt` nor `continue_final_message` is given, a last message of the
    assistant is continued (prefill), any other is answered.
    """

    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_special_tokens: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions."""

    prompt: PromptField
    max_tokens: Annotated[int | None, Meta(description="16 where none is given.")] = None
    logprobs: int | None = None
    add_special_tokens: bool = True


class EmbeddingRequest(Struct, kw_only=True):
    """POST /v1/embeddings."""

    model: str = ""
    input: PromptField
    encoding_format: Annotated[
        Literal["float", "base64"], Meta(description="base64: the bytes of little-endian float32.")
    ] = "float"
    dimensions: Annotated[
        int | None, Meta(description="Cut the vectors; for models that were trained for it only.")
    ] = None
    pooling: Annotated[
        Literal["mean", "last"] | None, Meta(description="The server's --pooling-type where none is given.")
    ] = None
    normalize: Annotated[bool, Meta(description="Make the Euclidean length 1.")] = True
    truncate_prompt_tokens: Annotated[
        int | None, Meta(description="Keep the beginning, this many tokens; -1: as many as the model takes.")
    ] = None
    add_special_tokens: bool = True
    user: str = ""
    priority: Priority = 0
    cache_salt: Salt | None = None


class TokenizeRequest(Struct, kw_only=True):
    """POST /tokenize: either `prompt` or `messages`."""

    model: str = ""
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class DetokenizeRequest(Struct, kw_only=True):
    """POST /detokenize."""

    model: str = ""
    tokens: list[int]
    skip_special_tokens: bool = False


class LoadAdapterRequest(Struct, kw_only=True):
    """POST /v1/load_lora_adapter: the directory `lora_path` of the server's machine, as peft saved it.

    A name that is taken is refused, or with `load_inplace` given to the new adapter; requests that run keep the
    old one.
    """

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadAdapterRequest(Struct, kw_only=True):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = ""
