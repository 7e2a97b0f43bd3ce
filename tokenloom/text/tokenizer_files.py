"""Reads the tokenizer of a local Hugging Face directory; everything a file may get wrong is found here.

Which file wins follows transformers 5: `tokenizer.json` is the tokenizer, without one `tokenizer.model`, then
`vocab.json` with `merges.txt`; tokens listed only in
`tokenizer_config.json` are added to it; `special_tokens_map.json` counts only for directories that are too
old to have `added_tokens_decoder`; a chat template in its own file wins over one in `tokenizer_config.json`.
`add_bos_token` and `add_eos_token` are checked but change nothing where there is a `tokenizer.json`: its
post-processor says which tokens are put around a text.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import tokenizers

from tokenloom.errors import ModelError
from tokenloom.text.build_tokenizer import put_around
from tokenloom.text.library_checks import check_expansion
from tokenloom.text.library_panics import panics_refused
from tokenloom.text.vocabulary_files import Vocabulary, read_vocabulary

_TRIAL = "A trial of 1 text,\n that h\u00e5s  all kinds of \u6587\u5b57 \U0001f600."
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Looking for a token in texts takes memory and time to prepare by its length.
_MAX_ADDED_TOKEN = 1 << 12
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a directory says.

    The tokenizer with all its tokens, the named special tokens ("bos_token" -> "<s>"), and the chat templates
    by name ("default", "tool_use").
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read and check the tokenizer files of `directory`; raises `ModelError`."""
    if not directory.is_dir():
        raise ModelError(f"no directory {directory}", "a local directory with a Hugging Face tokenizer")
    config = _read_object(directory / "tokenizer_config.json")
    for flag in ("add_bos_token", "add_eos_token", "split_special_tokens"):
        if config.get(flag) not in (None, True, False):
            raise ModelError(f"{flag} {config[flag]!r} in tokenizer_config.json", "true or false")
    templates = _chat_templates(directory, config)
    if "added_tokens_decoder" not in config:
        config.update(_read_object(directory / "special_tokens_map.json"))
    vocabulary: Vocabulary | None = None
    if (directory / "tokenizer.json").is_file():
        backend = _read_backend(directory / "tokenizer.json")
    else:
        _declare_added_tokens(config, _read_object(directory / "added_tokens.json"))
        vocabulary = read_vocabulary(directory, config, _read_object)
        backend = vocabulary.backend
        config = {**vocabulary.special_tokens, **config}
    _add_declared_tokens(backend, config.get("added_tokens_decoder"))
    special_tokens = _add_special_tokens(backend, config)
    if vocabulary is not None:
        _put_around(backend, special_tokens, config, vocabulary.add_bos)
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    # Lengths are limited by the server, which says so; a tokenizer that cuts a prompt silently would hide it.
    backend.no_truncation()
    backend.no_padding()
    _try(backend)
    return TokenizerFiles(backend, special_tokens, templates)


def _try(backend: tokenizers.Tokenizer) -> None:
    """Raise `ModelError` for a tokenizer that panics; the steps that a file lists run only with a text."""
    # A vocabulary may well lack a character: that is told of the text that has it.
    with panics_refused(), contextlib.suppress(Exception):
        backend.decode(backend.encode(_TRIAL).ids, skip_special_tokens=False)
        backend.decode(backend.encode("").ids)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    with panics_refused():
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise ModelError(
                f"{path} that cannot be read ({error})", "a tokenizer.json of the `tokenizers` library"
            ) from error
    check_expansion(backend, str(path))
    return backend


def _declare_added_tokens(config: dict[str, Any], added: Mapping[str, Any]) -> None:
    """Old directories list the tokens beyond the vocabulary in added_tokens.json (token -> id)."""
    if "added_tokens_decoder" in config or not added:
        return
    if not all(isinstance(token_id, int) for token_id in added.values()):
        raise ModelError("an added_tokens.json of another form", "a JSON object from tokens to token ids")
    named = [config.get("additional_special_tokens"), *(v for k, v in config.items() if k.endswith("_token"))]
    entries = [entry for value in named for entry in (value if isinstance(value, list) else [value])]
    special = {entry.get("content") if isinstance(entry, dict) else str(entry) for entry in entries}
    config["added_tokens_decoder"] = {
        str(token_id): {"content": token, "special": token in special, "normalized": token not in special}
        for token, token_id in added.items()
    }


def _put_around(
    backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], config: Mapping[str, Any], add_bos: bool
) -> None:
    """Only in a directory without tokenizer.json does the configuration say what begins and ends a text."""
    flag = config.get("add_bos_token")
    with_bos = add_bos if flag is None else flag
    bos = special_tokens.get("bos_token") if with_bos else None
    eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
    for wanted, token, name in ((flag, bos, "bos"), (config.get("add_eos_token"), eos, "eos")):
        if wanted and token is None:
            raise ModelError(f"add_{name}_token without a {name}_token of the vocabulary", "both or none")
    put_around(backend, bos, eos)


def _read_text(path: Path) -> str | None:
    """The file's text, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} that cannot be read ({error})", "a text file in UTF-8") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file; empty if there is no such file."""
    text = _read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # halves of characters have no UTF-8
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} that is not JSON ({error})", "a JSON object") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} that holds a JSON {type(value).__name__}", "a JSON object")
    return value


def _added_token(name: str, value: object, special: bool) -> tokenizers.AddedToken | None:
    """The token that a field means, given as text or as an object with `content` and flags; None for none."""
    if value is None or value is False or value == "":
        return None
    content = value.get("content") if isinstance(value, dict) else value
    if isinstance(content, str) and len(content) > _MAX_ADDED_TOKEN:
        raise ModelError(
            f"{name} of {len(content)} characters in the tokenizer's configuration",
            f"at most {_MAX_ADDED_TOKEN}",
        )
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {flag: value[flag] for flag in _TOKEN_FLAGS if isinstance(value.get(flag), bool)}
        return tokenizers.AddedToken(value["content"], **{"special": special, **flags})
    raise ModelError(
        f"{name} {value!r} in the tokenizer's configuration", "a string or an object with `content`"
    )


def _add_declared_tokens(backend: tokenizers.Tokenizer, declared: object) -> None:
    """Add the tokens of `added_tokens_decoder` (id -> token) that tokenizer.json lacks, under their ids."""
    if declared is None:
        return
    if not isinstance(declared, dict) or not all(str(key).isdecimal() for key in declared):
        raise ModelError("an added_tokens_decoder of another form", "a JSON object from token ids to tokens")
    known = {str(token): token for token in backend.get_added_tokens_decoder().values()}
    for token_id, value in sorted(((int(key), value) for key, value in declared.items()), key=itemgetter(0)):
        token = _added_token("added_tokens_decoder", value, special=False)
        # The library takes a token with the same content and other flags as a change of the flags.
        if token is not None and repr(known.get(token.content)) != repr(token):
            backend.add_tokens([token])
        if token is not None and backend.token_to_id(token.content) != token_id:
            raise ModelError(
                f"token {token.content!r} with id {backend.token_to_id(token.content)} in the vocabulary and "
                f"id {token_id} in the list of added tokens",
                "files that agree",
            )


def _add_special_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """Mark the special tokens that the configuration names; returns them by name.

    A named token that the vocabulary lacks is left out. (transformers gives it the next free id, but the
    model has no row for that id, so a prompt with it could not be computed.)
    """
    others = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(others, (list, dict)):
        raise ModelError(
            f"extra_special_tokens {others!r}", "a list of tokens, or an object from names to tokens"
        )
    fields: dict[str, Any] = {name: config.get(name) for name in _NAMED_TOKENS}
    fields.update({k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, (str, dict))})
    fields.update(others if isinstance(others, dict) else {})
    named = {name: _added_token(name, value, special=True) for name, value in fields.items()}
    unnamed = (
        []
        if isinstance(others, dict)
        else [_added_token("extra_special_tokens", v, special=True) for v in others]
    )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in (*named.values(), *unnamed):
        if token is None or backend.token_to_id(token.content) is None or token.content in known:
            continue
        backend.add_special_tokens([token])
        known.add(token.content)
    return {
        name: token.content
        for name, token in named.items()
        if token is not None and backend.token_to_id(token.content) is not None
    }


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a file of its own wins over the configuration, as a whole."""
    templates: dict[str, str] = {}
    single = _read_text(directory / "chat_template.jinja")
    if single is not None:
        templates["default"] = single
    more = directory / "additional_chat_templates"
    for path in sorted(more.glob("*.jinja")) if more.is_dir() else ():
        templates[path.stem] = _read_text(path) or ""
    if templates:
        return templates
    templates = _inline_templates(config.get("chat_template"), "tokenizer_config.json")
    if templates:
        return templates
    return _inline_templates(
        _read_object(directory / "chat_template.json").get("chat_template"), "chat_template.json"
    )


def _inline_templates(value: object, where: str) -> dict[str, str]:
    """A template as a string, several as [{"name": ..., "template": ...}] or {name: template}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in value
    ):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair):
        return dict(value)
    raise ModelError(f"a chat_template of another form in {where}", "a string, or a list of named templates")
