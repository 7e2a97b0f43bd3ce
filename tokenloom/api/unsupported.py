"""Features of the OpenAI API and of vLLM's extensions that this server does not have, refused by name.

Ignoring such a field would give an answer that looks right and is not; a field that cannot change the answer
is listed as harmless instead.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from tokenloom.api.errors import unsupported

_Harmless = Callable[[Any], bool]


def _never(value: Any) -> bool:
    return False


def _empty(value: Any) -> bool:
    return value in ([], {}, "", False)


def _one_of(*values: object) -> _Harmless:
    return lambda value: any(type(value) is type(item) and value == item for item in values)


def _is_text_format(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text"


# Field: (which values ask for nothing, what to say about all others).
REFUSED: dict[str, tuple[_Harmless, str]] = {
    "tools": (_empty, "tool calling is not there yet"),
    "tool_choice": (_one_of("none"), "tool calling is not there yet; only 'none' is accepted"),
    "functions": (_empty, "function calling is not there yet"),
    "function_call": (_one_of("none"), "function calling is not there yet; only 'none' is accepted"),
    "response_format": (
        _is_text_format,
        'structured output is not there yet; only {"type": "text"} is accepted',
    ),
    "structured_outputs": (_empty, "structured output is not there yet"),
    "structural_tag": (_never, "structured output is not there yet"),
    "guided_json": (_never, "structured output is not there yet"),
    "guided_regex": (_never, "structured output is not there yet"),
    "guided_choice": (_empty, "structured output is not there yet"),
    "guided_grammar": (_never, "structured output is not there yet"),
    "guided_decoding_backend": (_never, "structured output is not there yet"),
    "guided_whitespace_pattern": (_never, "structured output is not there yet"),
    "grammar": (_empty, "structured output is not there yet"),
    "json_schema": (_empty, "structured output is not there yet"),
    "regex": (_empty, "structured output is not there yet"),
    "logits_processors": (_empty, "code in a request is never run"),
    "logit_processors": (_empty, "code in a request is never run"),
    "use_beam_search": (_one_of(False), "beam search is not there"),
    "length_penalty": (_one_of(1, 1.0), "it belongs to beam search, which is not there"),
    "early_stopping": (_one_of(False), "it belongs to beam search, which is not there"),
    "suffix": (_empty, "insertion into a text is not there"),
    "modalities": (_one_of(["text"], []), "the models served here give text only"),
    "audio": (_never, "the models served here give text only"),
    "prediction": (_never, "predicted outputs are not there"),
    "web_search_options": (_never, "this server fetches nothing from the network"),
    "reasoning_effort": (_one_of("none"), "the models served here have no reasoning mode"),
    "verbosity": (_one_of("medium"), "the models served here do not know it"),
    "thinking_token_budget": (_never, "the models served here have no reasoning mode"),
    "prompt_embeds": (_empty, "prompts are texts or token ids"),
    "truncate_prompt_tokens": (_never, "a prompt is served whole or refused"),
    "truncation_side": (_one_of("right"), "the beginning of a text is kept"),
    "pooling_type": (_never, "the field is called pooling"),
    "embed_dtype": (_one_of("float32"), "embeddings are float32"),
    "endianness": (_one_of("little"), "embeddings in base64 are little-endian"),
    "use_activation": (_never, "embeddings are normalised or not: the field is called normalize"),
    "chat_template": (_empty, "only the model's own chat template is used"),
    "documents": (_empty, "put documents into the messages"),
    "mm_processor_kwargs": (_empty, "the models served here take text only"),
    "media_io_kwargs": (_empty, "the models served here take text only"),
    "kv_transfer_params": (_empty, "pages are not moved between servers"),
    "vllm_xargs": (_empty, "there are no custom sampler arguments"),
    "return_tokens_as_token_ids": (_one_of(False), "use return_token_ids"),
    "logprob_token_ids": (_empty, "ask for the best tokens with top_logprobs or logprobs"),
    "repetition_detection": (_never, "it is not there"),
    "lora_request": (_empty, "give the name of an adapter as the model"),
    "adapter": (_empty, "give the name of an adapter as the model"),
}

# Fields that change nothing about the answer.
HARMLESS_FIELDS = frozenset(
    {
        "metadata",
        "store",
        "service_tier",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "include_reasoning",
        "spaces_between_special_tokens",
        "best_of",
        "request_id",
    }
)


def refuse_unsupported(fields: Mapping[str, Any], served: Container[str]) -> None:
    """Raise `ApiError` 400, code `unsupported_feature`, for the first field that asks for more. The endpoint
    has the `served` ones."""
    for name, value in fields.items():
        entry = None if name in served else REFUSED.get(name)
        if entry is not None and not entry[0](value):
            raise unsupported(name, entry[1])
        if name == "best_of" and value not in (1, fields.get("n", 1)):
            raise unsupported("best_of", "all n choices are returned; ask for no more than you want to see")
