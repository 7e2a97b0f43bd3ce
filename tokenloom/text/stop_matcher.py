"""Finds stop strings in streamed text and keeps what may begin one from being shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenloom.errors import InvalidParameter


class MatchResult(NamedTuple):
    """`emit` is text that may be shown now; `stopped` is the stop string that was completed, or None."""

    emit: str
    stopped: str | None


class StopMatcher:
    """Searches the joined text of all pushes; how the text was cut into pushes makes no difference.

    The text is read character by character. The stop string that is completed first ends it; where several
    are completed by the same character, the longest does. Text before it is emitted, the stop string itself
    only with `include_stop_str_in_output`, text after it never. A push searches at most the pushed text and
    the longest stop string, with the string search of the interpreter. Raises `InvalidParameter` for an empty
    stop string.
    """

    __slots__ = ("_first", "_held", "_include", "_stop", "_stopped")

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        self._stop = tuple(dict.fromkeys(stop))
        if "" in self._stop:
            raise InvalidParameter("stop", "", "strings of at least one character")
        # Most pushes hold no character that begins a stop string; one search tells.
        self._first = re.compile(
            "[" + re.escape("".join({text[0] for text in self._stop})) + "]" if stop else "(?!)"
        )
        self._include = include_stop_str_in_output
        self._held = ""
        self._stopped: str | None = None

    def push(self, text: str) -> MatchResult:
        """Add text. Once stopped, more text changes nothing and emits nothing."""
        if self._stopped is not None:
            return MatchResult("", self._stopped)
        if not self._held and self._first.search(text) is None:
            return MatchResult(text, None)
        text = self._held + text
        found = self._first_completed(text)
        if found is not None:
            start, stop = found
            self._held = ""
            self._stopped = stop
            return MatchResult(text[: start + len(stop)] if self._include else text[:start], stop)
        keep = self._start_of_beginning(text)
        self._held = text[keep:]
        return MatchResult(text[:keep], None)

    def flush(self) -> str:
        """The text ended: returns what was held back, which was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _first_completed(self, text: str) -> tuple[int, str] | None:
        """Start and string of the match that ends first, the longest of those."""
        best: tuple[int, int] | None = None
        match = ""
        for stop in self._stop:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
                match = stop
        return None if best is None else (best[1], match)

    def _start_of_beginning(self, text: str) -> int:
        """Where the longest end of `text` starts that is the beginning of a stop string, else len(text)."""
        keep = len(text)
        for stop in self._stop:
            first = stop[0]
            start = text.find(first, max(0, len(text) - len(stop) + 1))
            # A candidate that begins later than what is kept already cannot change the answer.
            while 0 <= start < keep:
                if stop.startswith(text[start:]):
                    keep = start
                    break
                start = text.find(first, start + 1)
        return keep
