"""Reads a SentencePiece model file (`tokenizer.model`) into a tokenizer.

The file is one protocol-buffer message, `ModelProto` of github.com/google/sentencepiece. The few fields that
matter are read here, so that serving needs neither sentencepiece nor protobuf.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import tokenizers

from tokenloom.errors import ModelError
from tokenloom.text.build_tokenizer import PieceKind, Prefix, sentencepiece_bpe

_KINDS: dict[int, PieceKind] = {
    1: "normal",
    2: "unknown",
    3: "control",
    4: "user_defined",
    5: "unused",
    6: "byte",
}
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_Value = int | bytes


@dataclass(slots=True)
class SentencePieceModel:
    """What a model file says: piece i has id i; ids of BOS and EOS are -1 where there is none."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kinds: list[PieceKind] = field(default_factory=list)
    model_type: str = "unigram"
    bos_id: int = 1
    eos_id: int = 2
    treat_whitespace_as_suffix: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    denormalizes: bool = False

    def piece(self, token_id: int) -> str | None:
        """Text of a piece, None outside the vocabulary."""
        return self.pieces[token_id] if 0 <= token_id < len(self.pieces) else None

    def build(self, every_prefix: bool = True) -> tokenizers.Tokenizer:
        """The tokenizer.

        `every_prefix` puts the leading space of a text after special tokens too, as if SentencePiece encoded
        the texts between them one by one. Raises `ModelError` for what is not supported.
        """
        for unsupported, name in (
            (self.model_type != "bpe", f"type {self.model_type}"),
            (self.treat_whitespace_as_suffix, "treat_whitespace_as_suffix"),
            (not self.escape_whitespaces, "escape_whitespaces false"),
            (self.denormalizes, "a denormalizer"),
        ):
            if unsupported:
                raise ModelError(
                    f"a SentencePiece model with {name}", "type bpe, spaces in front; or a tokenizer.json"
                )
        prefix: Prefix = "none"
        if self.add_dummy_prefix:
            prefix = "every" if every_prefix else "first"
        return sentencepiece_bpe(
            self.pieces,
            self.scores,
            self.kinds,
            prefix=prefix,
            remove_extra_whitespaces=self.remove_extra_whitespaces,
            charsmap=self.charsmap,
        )


def read_sentencepiece(data: bytes, where: str) -> SentencePieceModel:
    """The model in `data`; raises `ModelError` naming `where` for bytes that are none."""
    model = SentencePieceModel()
    try:
        for number, value in _fields(data):
            if number == 1:
                _read_piece(model, _message(value))
            elif number == 2:
                _read_trainer(model, _message(value))
            elif number == 3:
                _read_normalizer(model, _message(value))
            elif number == 5:
                model.denormalizes = any(key == 2 and text for key, text in _fields(_message(value)))
    except (ValueError, KeyError, struct.error) as error:
        raise ModelError(f"{where} that cannot be read ({error})", "a SentencePiece model") from error
    if not model.pieces:
        raise ModelError(f"{where} without pieces", "a SentencePiece model")
    return model


def _read_piece(model: SentencePieceModel, data: bytes) -> None:
    piece, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1:
            piece = _message(value).decode()
        elif number == 2:
            (score,) = struct.unpack("<f", _message(value))
        elif number == 3:
            kind = _integer(value)
    if not piece or not math.isfinite(score):
        raise ValueError(f"piece {len(model.pieces)} is {piece!r} with score {score}")
    model.pieces.append(piece)
    model.scores.append(score)
    model.kinds.append(_KINDS[kind])


def _read_trainer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 3:
            model.model_type = _MODEL_TYPES[_integer(value)]
        elif number == 24:
            model.treat_whitespace_as_suffix = bool(_integer(value))
        elif number == 41:
            model.bos_id = _signed(value)
        elif number == 42:
            model.eos_id = _signed(value)


def _read_normalizer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 2:
            model.charsmap = _message(value)
        elif number == 3:
            model.add_dummy_prefix = bool(_integer(value))
        elif number == 4:
            model.remove_extra_whitespaces = bool(_integer(value))
        elif number == 5:
            model.escape_whitespaces = bool(_integer(value))


# The wire format of protocol buffers: key = field number * 8 + wire type; type 0 is a varint, 1 eight bytes,
# 2 a length and that many bytes, 5 four bytes.


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """Fields of a message in order, as (number, value); raises `ValueError` for bytes that are none."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire_type == 2:
            size, at = _varint(data, at)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes ends behind the data")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, 7 bits a byte from the lowest, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError(f"a number that does not end at byte {at}")


def _message(value: _Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes are expected")
    return value


def _integer(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number is expected")
    return value


def _signed(value: _Value) -> int:
    """Negative numbers are written as 64 bits."""
    number = _integer(value)
    return number - (1 << 64) if number >= 1 << 63 else number
