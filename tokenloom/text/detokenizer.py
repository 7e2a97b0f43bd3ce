"""Token ids in, text out, one token at a time; only text that no later token can change is given out."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenloom.text.pieces import REPLACEMENT, Pieces, drop_left_spaces
from tokenloom.text.tokenizer import Tokenizer

# A character is at most 4 bytes, hence at most 4 byte tokens. More tokens without readable text are garbage.
_MOST_HELD_TOKENS = 4
# Tokens of the prompt in front of the first window. The joining rules of decoders look at most at the token
# before; the others make it likely that the context begins with a whole character.
_CONTEXT_TOKENS = 8
_NOTHING_SKIPPED: frozenset[int] = frozenset()


class IncrementalDetokenizer:
    """Streams the text of one sequence.

    The pushed texts and the final `flush()` together are the text of the prompt and the output, decoded as
    one, without the text of the prompt (their longest common prefix). So a space at the beginning of the
    output stays where the prompt has text, and goes where the decoder drops it from the beginning of a whole
    text.

    An incomplete character is held back: at most 3 bytes, hence at most 3 byte tokens. Ill-formed bytes
    become U+FFFD as soon as the bytes after them show that they are ill-formed. With `skip_special_tokens`,
    special tokens add no text. Constant time per token.
    """

    __slots__ = ("_stream",)

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        skip = tokenizer.special_ids if skip_special_tokens else _NOTHING_SKIPPED
        self._stream: _Stream
        if tokenizer.pieces is not None:
            self._stream = _PieceStream(tokenizer.pieces, prompt_ids, skip)
        else:
            self._stream = _WindowStream(tokenizer, prompt_ids, skip)

    def push(self, token_id: int) -> str:
        """Add one token; returns the text that became final, often but not always the token's own."""
        return self._stream.push(token_id)

    def flush(self) -> str:
        """End the text; returns what was held back, incomplete characters as U+FFFD."""
        return self._stream.flush()


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class _PieceStream:
    """Joins the bytes of the tokens and reads them as UTF-8; nothing is decoded twice."""

    __slots__ = ("_errors", "_pending", "_pieces", "_prompt_marks", "_skip", "_strip")

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int], skip: frozenset[int]) -> None:
        self._pieces = pieces
        self._errors = pieces.errors
        self._skip = skip
        self._strip = _strip_after(pieces, prompt_ids, skip)
        self._pending = _incomplete_end(pieces, prompt_ids, skip)
        # The text of the prompt shows its incomplete end as U+FFFD already. If the output does not complete
        # that character, these marks are the prompt's and not the output's.
        self._prompt_marks = len(self._pending.decode("utf-8", pieces.errors))

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        piece = self._pieces[token_id]
        text = piece if isinstance(piece, str) and not self._pending else self._read(piece)
        if self._strip and text:
            text, self._strip = drop_left_spaces(text, self._strip)
        return text

    def flush(self) -> str:
        text = self._pending.decode("utf-8", self._errors)
        self._pending = b""
        return self._without_prompt_marks(text)

    def _read(self, piece: str | bytes) -> str:
        data = self._pending + (piece.encode() if isinstance(piece, str) else piece)
        text, num_read = codecs.utf_8_decode(data, self._errors, False)
        self._pending = data[num_read:]
        return self._without_prompt_marks(text)

    def _without_prompt_marks(self, text: str) -> str:
        if not self._prompt_marks or not text:
            return text
        marks = 0
        while marks < self._prompt_marks and text.startswith(REPLACEMENT, marks):
            marks += 1
        self._prompt_marks = 0
        return text[marks:]


def _strip_after(pieces: Pieces, prompt_ids: Sequence[int], skip: frozenset[int]) -> int:
    """How many leading spaces the decoder may still drop after the text of the prompt."""
    left = pieces.strip_left
    for token_id in prompt_ids:
        if not left:
            break
        piece = pieces[token_id]
        if piece and token_id not in skip:
            left = drop_left_spaces(piece, left)[1] if isinstance(piece, str) else 0
    return left


def _incomplete_end(pieces: Pieces, prompt_ids: Sequence[int], skip: frozenset[int]) -> bytes:
    """The bytes of an incomplete character at the end of the prompt, at most 3."""
    end = b""
    for token_id in reversed(prompt_ids):
        if token_id not in skip:
            end = pieces.bytes_of(token_id) + end
            if len(end) >= 3:
                break
    end = end[-3:]
    return end[codecs.utf_8_decode(end, "ignore", False)[1] :]


class _WindowStream:
    """For decoders that are no plain joining of bytes (WordPiece, Metaspace, ...): decodes short windows.

    `window[:read]` is context whose text, `shown`, was given out before; `window[read:]` waits. What the
    whole window decodes to beyond `shown` is new, unless it ends in the middle of a character.
    """

    __slots__ = ("_read", "_shown", "_skip", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._window: list[int] = []
        for token_id in reversed(prompt_ids):
            if len(self._window) == _CONTEXT_TOKENS:
                break
            if token_id not in skip:
                self._window.append(token_id)
        self._window.reverse()
        self._read = len(self._window)
        self._shown = self._decode()

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._window.append(token_id)
        text = self._decode()
        held = len(self._window) - self._read
        if held < _MOST_HELD_TOKENS and (text.endswith(REPLACEMENT) or len(text) <= len(self._shown)):
            return ""
        return self._take(text)

    def flush(self) -> str:
        return self._take(self._decode())

    def _take(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            # What was just given out begins with a whole character, so it is the next context.
            self._window = self._window[self._read :]
        else:
            # Silent tokens replace no context: a window of them would look like the beginning of a text.
            del self._window[max(self._read, _CONTEXT_TOKENS) :]
        self._read = len(self._window)
        self._shown = self._decode()
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)
