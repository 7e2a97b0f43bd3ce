"""One module for each engine, with a class `Backend`. A module runs in its engine's own environment, so it
imports the engine inside, and nothing else but the standard library and the harness."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from workloads import Request


@dataclass(frozen=True)
class Engine:
    """What a backend is asked to load."""

    model: str
    """Directory or file of the model in the engine's own format."""
    precision: str
    """bf16, int8 or int4."""
    threads: int
    options: dict[str, Any] = field(default_factory=dict)
    """More options, named as the engine names them."""


class Backend(Protocol):
    """An engine with a model loaded."""

    def __init__(self, engine: Engine) -> None: ...

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """Submit all requests at once; the output token ids of each, in the order of the requests."""

    def versions(self) -> dict[str, str]:
        """What was measured."""

    def close(self) -> None:
        """Free the engine and end what it started. May end the process."""
