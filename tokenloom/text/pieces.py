"""What each token adds to the text, known once per token instead of asked anew for every window of tokens.

Nearly all generative models decode by joining bytes: byte-level BPE writes every byte as one printable
character, SentencePiece models write spaces as U+2581 and unknown characters as byte tokens
`<0x00>`..`<0xFF>`. For these two families the text of a sequence is the UTF-8 reading of the joined bytes of
its tokens, so it can be streamed exactly.

Bytes that are no UTF-8 become U+FFFD: in byte-level models one per ill-formed sequence, as the Rust and
Python decoders do; in byte-fallback models one per byte, as SentencePiece does. (The `tokenizers` library
replaces a whole run of byte tokens, its valid characters too, when any byte of the run is wrong. That rule
looks arbitrarily far ahead, so no stream can follow it.)
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tokenizers

REPLACEMENT = "\ufffd"
SPACE_MARK = "\u2581"
MARK_EACH_SEQUENCE = "replace"
MARK_EACH_BYTE = "tokenloom.mark_each_byte"


def _mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(MARK_EACH_BYTE, _mark_each_byte)


def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: character -> the byte it stands for, all 256 of them.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards in rising order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


_ALPHABET = byte_of_character()


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level BPE token; a token with a character outside the alphabet stands for itself."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def byte_fallback_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece token: U+2581 is a space, `<0xE6>` the byte E6."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass  # an ordinary token that only looks like a byte
    return token.replace(SPACE_MARK, " ").encode()


class Pieces(dict[int, "str | bytes"]):
    """Token id -> what it adds to the text: `str` where it is whole characters by itself, else `bytes`.

    Filled on first use; an id outside the vocabulary adds "". `errors` names the codec error handler for
    ill-formed bytes. `strip_left` is how many leading spaces the decoder drops from the beginning of a whole
    text.
    """

    __slots__ = ("_bytes_of", "_token_of", "errors", "strip_left")

    def __init__(
        self,
        token_of: Callable[[int], str | None],
        bytes_of: Callable[[str], bytes],
        errors: str,
        strip_left: int,
    ) -> None:
        super().__init__()
        self._token_of = token_of
        self._bytes_of = bytes_of
        self.errors = errors
        self.strip_left = strip_left

    def __missing__(self, token_id: int) -> str | bytes:
        token = self._token_of(token_id) if token_id >= 0 else None
        if token is None:
            return ""  # not kept: ids from outside must not fill the memory
        data = self._bytes_of(token)
        piece: str | bytes
        try:
            piece = data.decode()
        except UnicodeDecodeError:
            piece = data
        self[token_id] = piece
        return piece

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that the token adds."""
        piece = self[token_id]
        return piece.encode() if isinstance(piece, str) else piece

    def decode(self, token_ids: Iterable[int], skip: frozenset[int]) -> str:
        """Text of `token_ids` without the ids in `skip`."""
        parts = [self[token_id] for token_id in token_ids if token_id not in skip]
        words = [part for part in parts if isinstance(part, str)]
        if len(words) == len(parts):
            text = "".join(words)
        else:
            data = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
            text = data.decode("utf-8", self.errors)
        return drop_left_spaces(text, self.strip_left)[0]


def drop_left_spaces(text: str, limit: int) -> tuple[str, int]:
    """Take up to `limit` leading spaces off `text`.

    Returns the rest, and how many spaces may still go from the text that follows.
    """
    spaces = 0
    while spaces < limit and spaces < len(text) and text[spaces] == " ":
        spaces += 1
    return text[spaces:], limit - spaces if spaces == len(text) else 0


def pieces_of(backend: tokenizers.Tokenizer) -> Pieces | None:
    """The pieces of `backend`, or None when its decoder is not one of the two byte-joining families."""
    if backend.decoder is None:
        return None
    steps = _steps(json.loads(backend.decoder.__getstate__()))
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return Pieces(backend.id_to_token, byte_level_bytes, MARK_EACH_SEQUENCE, 0)
    strip_left = _byte_fallback_strip(steps)
    if strip_left is None:
        return None
    return Pieces(backend.id_to_token, byte_fallback_bytes, MARK_EACH_BYTE, strip_left)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """The decoder as a flat list of steps."""
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for inner in decoder.get("decoders", []) for step in _steps(inner)]


def _byte_fallback_strip(steps: Sequence[dict[str, Any]]) -> int | None:
    """Leading spaces that a SentencePiece decoder drops; None when the steps are another decoder."""
    if [step.get("type") for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return None
    if steps[0].get("pattern") != {"String": SPACE_MARK} or steps[0].get("content") != " ":
        return None
    if len(steps) == 3:
        return 0
    strip = steps[3]
    if (
        len(steps) > 4
        or strip.get("type") != "Strip"
        or strip.get("content") != " "
        or strip.get("stop") != 0
    ):
        return None
    return int(strip["start"])
