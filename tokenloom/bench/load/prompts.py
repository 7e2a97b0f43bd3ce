"""Prompts of an exact number of tokens, as token ids or as text, that share exactly what they should share.

A prompt is made of indices into a vocabulary, and each index is a hash of where it stands: of the seed, the
block (or request) it belongs to and its position there. So a prompt depends on no other, nothing is kept, and
equal blocks are equal tokens in any process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenloom.bench.load.workload import Turn
from tokenloom.errors import InvalidParameter
from tokenloom.text.tokenizer import Tokenizer

Indices = NDArray[np.int64]

MAX_WORDS: Final = 2048
MIN_WORDS: Final = 16
_BLOCK, _REQUEST, _PREFIX = 1, 2, 3

COMMON_WORDS: Final = (
    "the of and to in is was he for it with as his on be at by had not are but from or have an they which one you "
    "were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over "
    "man me even most made after also did many before must through back years where much your way well down "
    "should because each just those people how too little state good very make world still own see men work long "
    "get here between both life being under never day same another know while last might us great old year off "
    "come since against go came right used take three"
).split()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What prompts are made of: token ids, or words of one token each.

    A text begins with `lead`; `overhead` is how many tokens that and what a server adds (a BOS, a chat
    template) are.
    """

    ids: Sequence[int]
    words: Sequence[str] = ()
    lead: str = ""
    overhead: int = 0

    def __len__(self) -> int:
        return len(self.words or self.ids)


def ids_of(tokenizer: Tokenizer) -> Vocabulary:
    """All token ids of a tokenizer but the special ones."""
    return Vocabulary([token for token in range(tokenizer.vocab_size) if token not in tokenizer.special_ids])


def words_of(tokenizer: Tokenizer) -> list[str]:
    """Candidates for words: lower-case ones with a space before them, as the tokenizer has them."""
    texts = (tokenizer.token_text(token) for token in range(tokenizer.vocab_size))
    return [text for text in dict.fromkeys(texts) if re.fullmatch(r" [a-z]{2,12}", text)][:MAX_WORDS]


def word_vocabulary(candidates: Sequence[str], count: Callable[[str], int]) -> Vocabulary:
    """The candidates that are one token each wherever they stand, found by asking `count` for the tokens of
    texts of them. Raises `InvalidParameter` if there are too few."""
    if not candidates:
        raise InvalidParameter("--tokenizer", "no words", f"one with at least {MIN_WORDS} words of one token")
    # Templates strip what a message begins with, so that a first word may be other tokens than it is elsewhere.
    # Every text begins with the same one.
    lead = candidates[0]
    overhead = 2 * count(lead * 2) - count(lead * 3)

    def length(words: Sequence[str]) -> int:
        return count(lead + "".join(words)) - overhead

    def single(words: Sequence[str]) -> list[str]:
        # All at once if all are one token; otherwise each half is looked through.
        if length([*words, *words]) == 2 * len(words):
            return list(words)
        if len(words) == 1:
            return []
        middle = len(words) // 2
        return single(words[:middle]) + single(words[middle:])

    words = single(candidates)
    if len(words) < MIN_WORDS:
        limit = f"at least {MIN_WORDS} words of one token each, for prompts of an exact length as text"
        raise InvalidParameter("--tokenizer", f"{len(words)} words", limit)
    shuffled = np.random.default_rng(0).permutation(words * max(2, MAX_WORDS // len(words))).tolist()
    if (found := length(shuffled)) != len(shuffled):
        limit = f"{len(shuffled)}: words whose number of tokens does not depend on their neighbours"
        raise InvalidParameter("--tokenizer", f"{found} tokens", limit)
    return Vocabulary((), words, lead, overhead)


class Prompts:
    """Makes the prompts of a workload from a vocabulary and a seed."""

    def __init__(self, vocabulary: Vocabulary, seed: int) -> None:
        if len(vocabulary) < 2:
            raise InvalidParameter("--vocab-size", len(vocabulary), "at least 2")
        self._vocabulary = vocabulary
        self._ids = np.asarray(vocabulary.ids, np.int64)
        self._seed = seed

    def make(self, turn: Turn, number: int) -> list[int] | str:
        """The prompt of the request `number`, of exactly `turn.input_tokens` tokens as the server counts them.

        A text cannot be shorter than what the server adds and one word; then it has one word.
        """
        if turn.text is not None:
            return turn.text
        words = self._vocabulary.words
        indices = self.indices(turn, number, max(1, turn.input_tokens - self._vocabulary.overhead))
        if words:
            return self._vocabulary.lead + "".join([words[index] for index in indices.tolist()])
        prompt: list[int] = self._ids[indices].tolist()
        return prompt

    def indices(self, turn: Turn, number: int, length: int) -> Indices:
        """int64 [length] indices into the vocabulary: shared prefix or blocks, then the request's own."""
        shared = self._row(_PREFIX, 0, min(turn.prefix_tokens, length))
        if turn.blocks:
            shared = self._blocks(turn, length)
        own = self._row(_REQUEST, number, length - len(shared))
        return np.concatenate([shared, own])

    def _row(self, kind: int, number: int, length: int) -> Indices:
        keys = np.array([_key(self._seed, kind, number)], np.uint64)
        row: Indices = self._hashed(keys, length)[0]
        return row

    def _blocks(self, turn: Turn, length: int) -> Indices:
        ids = np.concatenate([np.arange(first, first + count) for first, count in turn.blocks])
        ids = ids[: -(-length // turn.block_tokens)]
        base = _key(self._seed, _BLOCK, turn.scope)
        rows = self._hashed(_mix(ids.astype(np.uint64) ^ np.uint64(base)), turn.block_tokens)
        # The first two tokens spell the id, so that blocks differ as early as they can.
        size = len(self._vocabulary)
        rows[:, 0] = (ids + base % size) % size
        rows[:, 1] = (ids // size + base // size % size) % size
        tokens: Indices = rows.reshape(-1)[:length]
        return tokens

    def _hashed(self, keys: NDArray[np.uint64], width: int) -> Indices:
        """int64 [len(keys), width] indices."""
        positions = _mix(np.arange(1, width + 1, dtype=np.uint64))
        return (_mix(keys[:, None] ^ positions) % np.uint64(len(self._vocabulary))).astype(np.int64)


def _key(*parts: int) -> int:
    """One 63-bit number of several."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key ^ np.uint64(part & (2**64 - 1)))
    return int(key[0] >> np.uint64(1))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), elementwise."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
