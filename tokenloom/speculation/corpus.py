"""Texts that continuations are looked up in beside the sequence's own, read from a file at start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.regular_file import open_regular
from tokenloom.speculation.suffix_automaton import SEPARATOR, SuffixAutomaton

MAX_LINE = 64 << 20
"""Bytes of the longest line, and characters of the longest text between empty lines."""

Encode = Callable[[str], list[int]]


def read_corpus(path: Path, encode: Encode, vocab_size: int, max_tokens: int) -> SuffixAutomaton:
    """The indexed documents of a file.

    A `.jsonl` file has one document a line: a string, an object with a string `text`, or a list of token ids. Any
    other file is text in UTF-8, with empty lines between documents. `encode` gives a document's tokens, without a
    mark of its beginning. Raises `InvalidParameter` for a file that cannot be read, that is not in this form, or
    that has more than `max_tokens` tokens.
    """
    documents = _json_documents(path, encode) if path.suffix == ".jsonl" else map(encode, _paragraphs(path))
    return index_corpus(documents, vocab_size, max_tokens, str(path))


def index_corpus(
    documents: Iterable[list[int]], vocab_size: int, max_tokens: int, name: str = "corpus"
) -> SuffixAutomaton:
    """One automaton over all documents (token ids below `vocab_size`); no match crosses from one to the next.

    Raises `InvalidParameter` for other ids and for more than `max_tokens` tokens.
    """
    automaton = SuffixAutomaton()
    left = max_tokens
    for number, document in enumerate(documents, start=1):
        if len(document) > left:
            raise InvalidParameter(name, f"more than {max_tokens} tokens", f"at most {max_tokens} tokens")
        left -= len(document)
        for token in document:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise InvalidParameter(
                    f"{name}: document {number}: token id", token, f"an integer from 0 to {vocab_size - 1}"
                )
        for token in document:
            automaton.append(token)
        automaton.append(SEPARATOR)
    return automaton


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise InvalidParameter(
                        f"{path}: line {number}", "a longer line", f"at most {MAX_LINE} bytes"
                    )
                try:
                    yield number, line.decode()
                except UnicodeDecodeError as error:
                    raise InvalidParameter(f"{path}: line {number}", error.reason, "text in UTF-8") from None
    except (ModelError, OSError) as error:
        found = error.found if isinstance(error, ModelError) else error.strerror
        raise InvalidParameter(str(path), found, "a readable file") from None


def _paragraphs(path: Path) -> Iterator[str]:
    paragraph: list[str] = []
    size = 0
    for number, line in _lines(path):
        if line.strip():
            paragraph.append(line)
            size += len(line)
            if size > MAX_LINE:
                raise InvalidParameter(
                    f"{path}: line {number}", "a longer document", f"at most {MAX_LINE} characters a document"
                )
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
            size = 0
    if paragraph:
        yield "".join(paragraph)


def _json_documents(path: Path, encode: Encode) -> Iterator[list[int]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidParameter(f"{path}: line {number}", line[:100], "JSON") from None
        if isinstance(value, dict):
            value = value.get("text")
        if isinstance(value, str):
            yield encode(value)
        elif isinstance(value, list):
            yield value
        else:
            raise InvalidParameter(
                f"{path}: line {number}",
                value,
                "a string, an object with a string `text`, or a list of token ids",
            )
