"""Which requests are in flight and what each has been given: all that is needed to serve them on.

Committed tokens are the only state of a request that matters; everything in the engine can be rebuilt from
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tokenloom.engine.request import Request, SequenceDelta


@dataclass(slots=True)
class JournalEntry:
    """An accepted request, the committed output tokens of each of its samples, and how often an engine was
    given the request."""

    request: Request
    tokens: list[list[int]] = field(default_factory=list)
    num_attempts: int = 1

    @property
    def num_tokens(self) -> int:
        """Committed output tokens over all samples."""
        return sum(map(len, self.tokens))


class Journal:
    """The entries of the requests in flight, by request id, in the order of acceptance."""

    def __init__(self) -> None:
        self._entries: dict[str, JournalEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[JournalEntry]:
        return iter(self._entries.values())

    def open(self, request: Request, num_attempts: int = 1) -> None:
        """Record an accepted request. Its id must not be in flight."""
        tokens: list[list[int]] = [[] for _ in range(request.params.n)]
        self._entries[request.request_id] = JournalEntry(request, tokens, num_attempts)

    def append(self, delta: SequenceDelta) -> None:
        """Record committed tokens; the last delta drops the entry. Unknown requests are ignored."""
        entry = self._entries.get(delta.request_id)
        if entry is None:
            return
        if delta.last:
            del self._entries[delta.request_id]
        elif delta.token_ids:
            entry.tokens[delta.sample].extend(delta.token_ids)

    def drop(self, request_id: str) -> bool:
        """Forget a request that ended otherwise; False if it was not in flight."""
        return self._entries.pop(request_id, None) is not None

    def drop_all(self, keep: Callable[[JournalEntry], bool] = lambda entry: False) -> list[JournalEntry]:
        """Forget everything but what `keep` is true of; returns what was forgotten."""
        entries = [entry for entry in self._entries.values() if not keep(entry)]
        for entry in entries:
            del self._entries[entry.request.request_id]
        return entries
