"""From the fields of a request to `SamplingParams`, with errors under the names that the client used."""

from __future__ import annotations

from collections.abc import Mapping

from tokenloom.api.errors import ApiError, unsupported
from tokenloom.api.schemas import ChatCompletionRequest, CompletionRequest, SamplingFields
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import InvalidParameter
from tokenloom.serving.client import ModelCard

DEFAULT_COMPLETION_TOKENS = 16


def chat_params(fields: ChatCompletionRequest, card: ModelCard) -> SamplingParams:
    """Sampling parameters of a chat request. Raises `InvalidParameter`."""
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidParameter("top_logprobs", fields.top_logprobs, "used together with logprobs: true")
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    max_tokens_name = chat_max_tokens_name(fields)
    max_tokens = chat_max_tokens(fields)
    _check_some_output(max_tokens, max_tokens_name, fields.prompt_logprobs is not None)
    if max_tokens is None and "max_tokens" in card.default_sampling:
        max_tokens = int(card.default_sampling["max_tokens"])
    renamed = {"logprobs": "top_logprobs", "max_tokens": max_tokens_name}
    return _sampling_params(fields, card, max_tokens, logprobs, fields.prompt_logprobs, renamed)


def chat_max_tokens(fields: ChatCompletionRequest) -> int | None:
    """The bound of the output that the client asked for, if any."""
    return fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens


def chat_max_tokens_name(fields: ChatCompletionRequest) -> str:
    """The field that bounds the output, as the client wrote it."""
    return "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"


def completion_params(fields: CompletionRequest, card: ModelCard) -> SamplingParams:
    """Sampling parameters of a completion request; `echo` with `logprobs` asks for the prompt's too."""
    prompt_logprobs = fields.prompt_logprobs
    if fields.echo and fields.logprobs is not None:
        prompt_logprobs = max(fields.logprobs, prompt_logprobs or 0)
    _check_some_output(fields.max_tokens, "max_tokens", fields.echo or prompt_logprobs is not None)
    renamed = {} if fields.prompt_logprobs is not None else {"prompt_logprobs": "logprobs"}
    max_tokens = DEFAULT_COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    return _sampling_params(fields, card, max_tokens, fields.logprobs, prompt_logprobs, renamed)


def _check_some_output(max_tokens: int | None, name: str, prompt_is_asked: bool) -> None:
    if max_tokens == 0 and not prompt_is_asked:
        raise InvalidParameter(
            name, 0, "at least 1 (0 only with echo of a completion or with prompt_logprobs)"
        )


def _sampling_params(
    fields: SamplingFields,
    card: ModelCard,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    renamed: Mapping[str, str],
) -> SamplingParams:
    _check_stream(fields)
    if fields.n > card.max_running:
        raise InvalidParameter("n", fields.n, f"at most {card.max_running}, the sequences that run at once")
    defaults = card.default_sampling
    try:
        params = SamplingParams(
            n=fields.n,
            temperature=_first(fields.temperature, defaults.get("temperature"), 1.0),
            top_p=_first(fields.top_p, defaults.get("top_p"), 1.0),
            top_k=int(_first(fields.top_k, defaults.get("top_k"), 0)),
            min_p=_first(fields.min_p, defaults.get("min_p"), 0.0),
            repetition_penalty=_first(fields.repetition_penalty, defaults.get("repetition_penalty"), 1.0),
            presence_penalty=fields.presence_penalty,
            frequency_penalty=fields.frequency_penalty,
            logit_bias=fields.logit_bias,  # type: ignore[arg-type]  # JSON keys are strings; SamplingParams reads them
            allowed_token_ids=None if fields.allowed_token_ids is None else tuple(fields.allowed_token_ids),
            bad_words=tuple(fields.bad_words),
            min_tokens=fields.min_tokens,
            max_tokens=max_tokens,
            stop=(fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop),
            stop_token_ids=tuple(fields.stop_token_ids),
            include_stop_str_in_output=fields.include_stop_str_in_output,
            ignore_eos=fields.ignore_eos,
            skip_special_tokens=fields.skip_special_tokens,
            seed=fields.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        params.check_vocabulary(card.vocab_size)
    except InvalidParameter as error:
        if error.param not in renamed:
            raise
        raise InvalidParameter(renamed[error.param], error.value, error.limit, code=error.code) from None
    return params


def _check_stream(fields: SamplingFields) -> None:
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(
            400,
            "stream_options: it may be given only with stream: true.",
            param="stream_options",
            code="invalid_value",
        )
    if fields.stream and fields.prompt_logprobs is not None:
        raise unsupported("prompt_logprobs", "it does not go with stream: true")


def _first(given: float | None, model_default: float | None, default: float) -> float:
    if given is not None:
        return given
    return default if model_default is None else model_default


def check_lengths(
    num_prompt: int, max_tokens: int | None, card: ModelCard, prompt_name: str, max_name: str
) -> None:
    """Raise `InvalidParameter`, code context_length_exceeded, unless prompt and output fit the context.

    `max_tokens` is what the client asked for; without it the output ends where the context does.
    """
    most = card.max_context
    needed = num_prompt if max_tokens == 0 else num_prompt + 1
    if needed > most:
        room = "" if num_prompt > most else ", and one token of output must fit too"
        message = (
            f"This model's maximum context length is {most} tokens, "
            f"but the prompt has {num_prompt} tokens{room}."
        )
        name = prompt_name.partition("[")[0]
        raise InvalidParameter(
            name, num_prompt, f"at most {most}", code="context_length_exceeded", message=message
        )
    if max_tokens is not None and num_prompt + max_tokens > most:
        message = (
            f"{max_name}: got {max_tokens}, but it must be at most {most - num_prompt}: "
            f"this model's maximum context length is {most} tokens and {prompt_name} has {num_prompt}."
        )
        raise InvalidParameter(
            max_name,
            max_tokens,
            f"at most {most - num_prompt}",
            code="context_length_exceeded",
            message=message,
        )
