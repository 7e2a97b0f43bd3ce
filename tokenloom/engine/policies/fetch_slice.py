"""How much of an adapter is copied before a step: a fixed share of the time that steps take.

A slice of fixed size is a stall for a small model and a trickle for a large one, where sequences then wait for
their adapters and batches run half empty.
"""

from __future__ import annotations

from dataclasses import dataclass

_NEWEST = 0.25
"""Weight of the newest measurement in the running means."""


@dataclass(slots=True)
class FetchSlice:
    """`share` of the time of a step may go to copying, between `min_bytes` and `max_bytes` before each step.

    Before anything was measured, and where a clock shows no time (a simulation), a slice is `min_bytes`.
    """

    share: float = 0.05
    min_bytes: int = 1 << 20
    max_bytes: int = 64 << 20
    step_seconds: float = 0.0
    bytes_per_second: float = 0.0

    def copied(self, num_bytes: int, seconds: float) -> None:
        """`num_bytes` were copied in `seconds`."""
        if num_bytes > 0 and seconds > 0:
            self.bytes_per_second = _mean(self.bytes_per_second, num_bytes / seconds)

    def stepped(self, seconds: float) -> None:
        """A step took `seconds`, without the copying before it."""
        if seconds > 0:
            self.step_seconds = _mean(self.step_seconds, seconds)

    @property
    def num_bytes(self) -> int:
        """Bytes of the next slice."""
        affordable = int(self.share * self.step_seconds * self.bytes_per_second)
        return min(max(affordable, self.min_bytes), self.max_bytes)


def _mean(old: float, new: float) -> float:
    return new if old == 0 else old + _NEWEST * (new - old)
