"""Which requests are in flight and what each has been given: all that is needed to serve them on.

Committed tokens are the only state of a request that matters; everything in the engine can be rebuilt from
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tokenloom.engine.request import Request, SequenceDelta


@dataclass(slots=True)
class JournalEntry:
    """An accepted request and the committed output tokens of each of its samples."""

    request: Request
    tokens: list[list[int]] = field(default_factory=list)

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

    def open(self, request: Request) -> None:
        """Record an accepted request. Its id must not be in flight."""
        self._entries[request.request_id] = JournalEntry(request, [[] for _ in range(request.params.n)])

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

    def drop_all(self) -> list[JournalEntry]:
        """Forget everything; returns what was in flight."""
        entries = list(self._entries.values())
        self._entries.clear()
        return entries
