"""How loading and long jobs show their progress on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class ConsoleLoad:
    """Prints the plan on stderr, and a bar where stderr is a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._stage = ""

    def plan(self, text: str) -> None:
        """Print the plan."""
        print(text, file=sys.stderr, flush=True)

    def advance(self, stage: str, done: int, total: int) -> None:
        """Draw the bar of `stage`; it disappears when it is full."""
        if not self._console.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        if stage != self._stage:
            self._stage = stage
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._progress.add_task(stage)
        self._progress.update(self._progress.task_ids[0], completed=done, total=total)
        if done >= total:
            self._progress.stop()
            self._progress = None
            self._stage = ""


class RequestBar:
    """A bar over requests with the rate of output tokens; does nothing when not `shown`."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._num_tokens = 0
        self._progress = Progress(
            TextColumn("Requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s"),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._progress.add_task("", total=total, rate=0.0)

    def __enter__(self) -> RequestBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, requests: int, tokens: int) -> None:
        """`requests` more have ended, and `tokens` more output tokens are there."""
        self._num_tokens += tokens
        if self._progress.disable:
            return
        elapsed = self._progress.tasks[0].elapsed or 0.0
        rate = self._num_tokens / elapsed if elapsed else 0.0
        self._progress.update(self._task, advance=requests, rate=rate)
