"""From what a face was asked to the request that an engine takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final, get_args

from tokenloom.engine.request import NO_SLO, Exactness, Pooling, Request, Slo
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import InvalidParameter, UnsupportedFeature
from tokenloom.serving.client import ModelCard
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
    exactness: Exactness = "exact",
    slo: Slo = NO_SLO,
) -> Request:
    """The request for a tokenised prompt, with `params.bad_words` resolved to token ids; `adapter` is a content id.

    Raises `InvalidParameter` for a bad word that has no tokens, and an unknown `exactness`. Limits that depend on
    the engine are checked by `Engine.check_request`.
    """
    if exactness not in get_args(Exactness):
        raise InvalidParameter("exactness", exactness, "exact or distribution")
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt_token_ids),
        params=params,
        priority=priority,
        tenant=tenant,
        program_id=program_id,
        adapter=adapter,
        exactness=exactness,
        bad_word_ids=tuple(bad_word_ids(tokenizer, params.bad_words)) if params.bad_words else (),
        slo=slo,
    )


EMBEDDING_PARAMS: Final = SamplingParams(max_tokens=0, temperature=0.0, seed=0)
"""Nothing is drawn for an embedding; the seed leaves those of a `SeedSource` to others."""


def embedding_request(
    prompt_token_ids: Sequence[int],
    pooling: Pooling,
    *,
    request_id: str,
    priority: int = 0,
    tenant: str = "",
    adapter: str = "",
) -> Request:
    """The request for the embedding of a tokenised prompt; `adapter` is a content id, or "" for the base."""
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt_token_ids),
        params=EMBEDDING_PARAMS,
        priority=priority,
        tenant=tenant,
        adapter=adapter,
        pooling=pooling,
    )


def num_kept(truncate_prompt_tokens: int | None, card: ModelCard) -> int | None:
    """The most tokens that truncation leaves of a prompt (-1: as many as the model takes), None without it.

    Raises `InvalidParameter`.
    """
    count = truncate_prompt_tokens
    if count is None:
        return None
    if (
        isinstance(count, bool)
        or not isinstance(count, int)
        or not (count == -1 or 1 <= count <= card.max_context)
    ):
        limit = f"-1, or from 1 to {card.max_context}, the longest that the model takes"
        raise InvalidParameter("truncate_prompt_tokens", count, limit)
    return card.max_context if count == -1 else count


def check_dimensions(dimensions: int | None, card: ModelCard) -> None:
    """Raise `UnsupportedFeature` or `InvalidParameter` unless embeddings may be cut to that length."""
    if dimensions is None:
        return
    if card.matryoshka is None:
        detail = "this model's config.json has no is_matryoshka or matryoshka_dimensions; cut, its embeddings are poor"
        raise UnsupportedFeature("dimensions", detail)
    allowed = card.matryoshka or range(1, card.hidden_size + 1)
    if type(dimensions) is not int or dimensions not in allowed:
        limit = f"an integer from 1 to {card.hidden_size}"
        if card.matryoshka:
            limit = "one of " + ", ".join(map(str, card.matryoshka))
        raise InvalidParameter("dimensions", dimensions, limit)


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
