"""From texts, token ids and messages to token ids, off the event loop where the text is long."""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from tokenloom.api.errors import missing, unsupported
from tokenloom.api.schemas import ChatMessage
from tokenloom.errors import InvalidParameter
from tokenloom.text.tokenizer import Tokenizer

T = TypeVar("T")

MAX_PROMPTS = 2048
MAX_CHOICES = 4096
MAX_TOTAL_TOKENS = 1 << 20
# Encoding some 10,000 characters takes a few milliseconds; longer texts would delay the streams of others.
INLINE_CHARS = 8192
# Unicode normalisation makes at most four characters one.
_SHRINKING = 4
_BLANKS = tuple(c for c in map(chr, range(0x3001)) if c.isspace())
_longest_pieces: weakref.WeakKeyDictionary[Tokenizer, int] = weakref.WeakKeyDictionary()
ROLES = ("system", "developer", "user", "assistant")
_RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self"}
)
_FORMS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


async def off_loop(num_chars: int, work: Callable[[], T]) -> T:
    """The result of `work`, in a thread if the text is long (the tokenizer releases the interpreter lock)."""
    if num_chars <= INLINE_CHARS:
        return work()
    return await asyncio.to_thread(work)


async def encode_prompts(
    tokenizer: Tokenizer,
    prompt: Any,
    *,
    add_special_tokens: bool,
    vocab_size: int,
    max_context: int,
    param: str = "prompt",
    keep: int | None = None,
) -> tuple[list[list[int]], list[str | None]]:
    """Token ids of every prompt of a request, and its text where it was given as text.

    Raises `InvalidParameter` for what is none of the four forms of the field `param`, for too many prompts or
    tokens, for token ids outside the vocabulary, and, before it is tokenised, for a text that `max_context`
    cannot hold. With `keep`, only the beginning of each prompt is kept, at most so many tokens.
    """
    texts, token_lists = _split_forms(prompt, param)
    names = prompt_names(param, max(len(texts), len(token_lists)))
    if texts:

        def check_and_encode() -> list[list[int]]:
            if keep is not None:
                return tokenizer.encode_truncated(texts, keep, add_special_tokens)
            for name, text in zip(names, texts, strict=True):
                refuse_too_long(tokenizer, text, max_context, name)
            return tokenizer.encode_batch(texts, add_special_tokens)

        encoded = await off_loop(sum(map(len, texts)), check_and_encode)
    else:
        encoded = [ids[:keep] for ids in token_lists]
        for name, ids in zip(names, token_lists, strict=True):
            check_token_ids(name, ids, vocab_size)
    total = sum(map(len, encoded))
    if len(encoded) > 1 and total > MAX_TOTAL_TOKENS:
        limit = f"at most {MAX_TOTAL_TOKENS} tokens over all {param}s"
        raise InvalidParameter(param, f"{total} tokens", limit)
    for name, ids in zip(names, encoded, strict=True):
        if not ids:
            raise InvalidParameter(name, ids, "at least one token long")
    return encoded, list(texts) if texts else [None] * len(encoded)


def prompt_names(param: str, count: int) -> list[str]:
    """What to call each prompt in a message to the client."""
    return [param] if count == 1 else [f"{param}[{number}]" for number in range(count)]


def refuse_too_long(tokenizer: Tokenizer, text: str, max_context: int, name: str) -> None:
    """Raise `InvalidParameter`, code context_length_exceeded, for a text that cannot fit, however tokenised.

    Tokenising megabytes to refuse them takes seconds. Blanks are not counted, since a special token may take
    in any number of them. Tokenizers that do not simply join bytes may do so with anything.
    """
    if len(text) <= INLINE_CHARS or tokenizer.pieces is None:
        return
    longest = _SHRINKING * _longest_piece(tokenizer)
    if len(text) <= longest * max_context:
        return
    num_chars = len(text) - sum(map(text.count, _BLANKS))
    if num_chars > longest * max_context:
        fewest = -(-num_chars // longest)
        raise InvalidParameter(
            name.partition("[")[0],
            fewest,
            f"at most {max_context} tokens",
            code="context_length_exceeded",
            message=f"This model's maximum context length is {max_context} tokens, "
            f"but {name} has at least {fewest} tokens ({len(text)} characters).",
        )


def _longest_piece(tokenizer: Tokenizer) -> int:
    """Length in bytes, thus at least in characters, of the longest token."""
    longest = _longest_pieces.get(tokenizer)
    if longest is None:
        longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
        longest = _longest_pieces[tokenizer] = max(longest, 1)
    return longest


def _split_forms(prompt: Any, param: str) -> tuple[list[str], list[list[int]]]:
    """Texts, or else lists of token ids."""
    if isinstance(prompt, str):
        return [prompt], []
    if not isinstance(prompt, list):
        raise InvalidParameter(param, prompt, _FORMS)
    if not prompt:
        raise InvalidParameter(param, prompt, f"at least one {param}")
    if isinstance(prompt[0], str | list) and len(prompt) > MAX_PROMPTS:
        limit = f"at most {MAX_PROMPTS} {param}s in one request"
        raise InvalidParameter(param, f"{len(prompt)} {param}s", limit)
    kind: Any
    match prompt[0]:
        case str():
            kind = list[str]
        case list():
            kind = list[list[int]]
        case _:
            kind = list[int]
    try:
        checked = msgspec.convert(prompt, kind)
    except msgspec.ValidationError as error:
        place = re.search(r"\$(\S*)`$", str(error))
        name = param + (place.group(1) if place else "")
        raise InvalidParameter(name, f"a list with other things: {prompt[:4]}", _FORMS) from None
    if kind == list[str]:
        return checked, []
    return [], checked if kind == list[list[int]] else [checked]


def check_token_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise `InvalidParameter` if a token id lies outside [0, vocab_size)."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidParameter(name, wrong, f"token ids from 0 to {vocab_size - 1}")


async def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    variables: Mapping[str, Any],
    add_special_tokens: bool = False,
    max_context: int | None = None,
) -> tuple[list[int], str]:
    """Token ids of a conversation, and the text of the assistant message that is continued ("" if none).

    Without flags a last message of the assistant is continued. Raises `InvalidParameter` naming the message,
    and refuses tools, parts that are not text, and, before it is tokenised, a text that `max_context` cannot
    hold.
    """
    if not messages:
        raise InvalidParameter("messages", [], "a list of at least one message")
    prefilled = messages[-1].role == "assistant"
    if continue_final_message is None:
        continue_final_message = prefilled and not add_generation_prompt
    if continue_final_message and not prefilled:
        raise InvalidParameter(
            "continue_final_message", True, "false unless the last message is the assistant's"
        )
    if continue_final_message and add_generation_prompt:
        raise InvalidParameter("continue_final_message", True, "false when add_generation_prompt is true")
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    _check_variables(variables)
    plain = [_plain_message(number, message) for number, message in enumerate(messages)]
    generation_prompt, continued = add_generation_prompt, continue_final_message

    def render_and_encode() -> list[int]:
        text = tokenizer.render_chat(
            plain, add_generation_prompt=generation_prompt, continue_final_message=continued, **variables
        )
        if max_context is not None:
            refuse_too_long(tokenizer, text, max_context, "messages")
        return tokenizer.encode(text, add_special_tokens)

    try:
        ids = await off_loop(sum(len(str(message["content"])) for message in plain), render_and_encode)
    except InvalidParameter as error:
        if error.param != "prompt":
            raise
        raise InvalidParameter("messages", error.value, error.limit) from None
    if not ids:
        raise InvalidParameter("messages", f"{len(plain)} messages", "at least one token long")
    return ids, _text_of(plain[-1]) if continued else ""


def _check_variables(variables: Mapping[str, Any]) -> None:
    for name in variables:
        if name in _RESERVED_VARIABLES or not name.isidentifier():
            limit = "an object of variables that the server does not set itself"
            raise InvalidParameter("chat_template_kwargs", name, limit)


def _plain_message(number: int, message: ChatMessage) -> dict[str, Any]:
    """A message as the template takes it."""
    where = f"messages[{number}]"
    if message.tool_calls or message.function_call or message.role in ("tool", "function"):
        field = "tool_calls" if message.tool_calls else "function_call" if message.function_call else "role"
        raise unsupported(f"{where}.{field}", "tool calling is not there yet")
    if message.role not in ROLES:
        raise InvalidParameter(f"{where}.role", message.role, f"one of {', '.join(ROLES)}")
    content: str | list[dict[str, str]]
    if isinstance(message.content, list):
        content = []
        for position, part in enumerate(message.content):
            if part.type != "text":
                path = f"{where}.content[{position}].type"
                kind = part.type[:60]
                raise unsupported(path, f"content of type {kind!r}; the models served here take text only")
            if part.text is None:
                raise missing(f"{where}.content[{position}].text")
            content.append({"type": "text", "text": part.text})
    elif message.content is None and message.role != "assistant":
        raise missing(f"{where}.content")
    else:
        content = message.content or ""
    plain: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _text_of(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
