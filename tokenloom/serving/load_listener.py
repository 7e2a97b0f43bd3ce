"""Who hears how the loading of a model goes on; what draws it on a terminal is in `progress`."""

from __future__ import annotations

from typing import Protocol


class LoadListener(Protocol):
    """Hears how the loading of a model goes on."""

    def plan(self, text: str) -> None:
        """The memory plan, before anything is allocated."""

    def advance(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` bytes of `stage` are there."""


class SilentLoad:
    """Shows nothing."""

    def plan(self, text: str) -> None:
        """Shown nowhere."""

    def advance(self, stage: str, done: int, total: int) -> None:
        """Shown nowhere."""
