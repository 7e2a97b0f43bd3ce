"""What is known of each request that was sent."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Record:
    """One request. Times are seconds of the generator's clock since the start of the run; -1 = did not happen.

    `arrival` is when the workload wants the request; `due` is when the generator has to write it: at its
    arrival, or later when `max_concurrency` made it wait for a free place. `sent` is when it was written.
    `first`, `last` and `ended` are the first and last chunk with tokens and the end of the stream. `gaps`
    holds the time between each two chunks with tokens. `input_tokens` and `output_tokens` are what the server
    counted (`output_tokens` is otherwise the number of chunks); -1 = not told. `error` names what went wrong
    ("" = nothing), `detail` says more.
    """

    number: int
    wanted_input: int
    wanted_output: int
    arrival: float = 0.0
    due: float = 0.0
    sent: float = -1.0
    first: float = -1.0
    last: float = -1.0
    ended: float = -1.0
    gaps: array[float] = field(default_factory=lambda: array("d"))
    input_tokens: int = -1
    output_tokens: int = -1
    error: str = ""
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the answer came, and came to its end."""
        return not self.error and self.ended >= 0

    @property
    def ttft(self) -> float:
        """Seconds from when the request was due to its first token."""
        return self.first - self.due

    @property
    def e2el(self) -> float:
        """Seconds from when the request was due to its last token."""
        return self.last - self.due

    @property
    def tpot(self) -> float:
        """Mean seconds of a token after the first; 0 where there is none."""
        return (self.last - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def lag(self) -> float:
        """Seconds by which the generator itself was late."""
        return self.sent - self.due
