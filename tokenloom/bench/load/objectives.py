"""The latencies of a request by name, and objectives for them (goodput as in DistServe, OSDI 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tokenloom.bench.load.records import Record
from tokenloom.errors import InvalidParameter

METRICS: Final = {
    "ttft": "to first token",
    "tpot": "per token after it",
    "itl": "between chunks",
    "e2el": "end to end",
}
GOODPUT_METRICS: Final = ("ttft", "tpot", "e2el")


def parse_goodput(text: str) -> dict[str, float]:
    """Objectives in seconds by metric, from "ttft:200 tpot:50" (milliseconds; commas part them too).

    Raises `InvalidParameter`.
    """
    objectives: dict[str, float] = {}
    for part in text.replace(",", " ").split():
        name, _, value = part.partition(":")
        try:
            milliseconds = float(value)
        except ValueError:
            milliseconds = -1.0
        if name not in GOODPUT_METRICS or not 0 < milliseconds < float("inf"):
            limit = f"pairs of {', '.join(GOODPUT_METRICS)} and milliseconds above 0, such as ttft:200"
            raise InvalidParameter("--goodput", part, limit)
        if name in objectives:
            raise InvalidParameter("--goodput", text, f"each metric once: {name} is there twice")
        objectives[name] = milliseconds / 1e3
    return objectives


def meets(record: Record, objectives: Mapping[str, float]) -> bool:
    """Whether a request ended well and met every objective."""
    return record.ok and all(getattr(record, name) <= most for name, most in objectives.items())
