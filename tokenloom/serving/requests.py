"""From what a face was asked to the request that an engine takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import InvalidParameter
from tokenloom.text.tokenizer import Tokenizer


def make_request(
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    request_id: str,
    priority: int = 0,
    tenant: str = "",
    program_id: str = "",
    adapter: str = "",
) -> Request:
    """The request for a tokenised prompt, with `params.bad_words` resolved to token ids; `adapter` is a content id.

    Raises `InvalidParameter` for a bad word that has no tokens. Limits that depend on the engine are checked
    by `Engine.check_request`.
    """
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt_token_ids),
        params=params,
        priority=priority,
        tenant=tenant,
        program_id=program_id,
        adapter=adapter,
        bad_word_ids=tuple(bad_word_ids(tokenizer, params.bad_words)) if params.bad_words else (),
    )


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> Iterator[tuple[int, ...]]:
    """The token sequences of each word at the start and in the middle of a text, without repeats."""
    seen: set[tuple[int, ...]] = set()
    for word in words:
        bare = word.lstrip()
        for spelled in (bare, " " + bare):
            ids = tuple(tokenizer.encode(spelled, add_special_tokens=False))
            if not ids or not bare:
                raise InvalidParameter("bad_words", word, "words that the tokenizer has tokens for")
            if ids not in seen:
                seen.add(ids)
                yield ids


class SeedSource:
    """Seeds for requests that bring none: with a `base` seed the i-th of them always gets the same one.

    A negative `base` leaves the choice to the engine, which draws a fresh seed for each.
    """

    def __init__(self, base: int = -1) -> None:
        self._base = base
        self._num_given = 0

    def fill(self, params: SamplingParams) -> SamplingParams:
        """`params` with a seed if it has none and this source gives them."""
        if params.seed is not None or self._base < 0:
            return params
        text = f"tokenloom/seed/{self._base}/{self._num_given}".encode()
        self._num_given += 1
        return params.with_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
