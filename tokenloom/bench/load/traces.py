"""Published traces of requests, read line by line (gzip too).

| format | a line | |
|---|---|---|
| azure | `TIMESTAMP,ContextTokens,GeneratedTokens` | Azure LLM inference traces 2023 (Splitwise, ISCA 2024) |
| mooncake | timestamp (ms), input_length, output_length, hash_ids | Mooncake (FAST 2025); ids of blocks of 512 tokens |
| aibrix | timestamp (ms), requests: Prompt Length, Output Length, prompt | AIBrix workloads |
| coding-agent | requests: in, out, hash_runs, think_time | sessions; ids of blocks of 64 tokens, local to one |

Every error is an `InvalidParameter` that names the file, the line and the field.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from tokenloom.bench.load.options import MAX_TOKENS
from tokenloom.bench.load.workload import Session, Turn
from tokenloom.errors import InvalidParameter

MOONCAKE_BLOCK: Final = 512
MAX_LINE: Final = 64 << 20
"""Bytes of the longest line that is read."""
MAX_SECONDS: Final = 1e9
MAX_NESTED: Final = 32
"""How deep sessions may start sessions."""

_NESTED: Final = "subagent"
"""What the trace calls a session that another one starts."""


_AZURE_HEADER: Final = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


class Line:
    """One line of a file, for fields that are checked and errors that say where."""

    def __init__(self, path: Path, number: int, text: str) -> None:
        self.path = path
        self.number = number
        self.text = text

    def refuse(self, field: str, value: object, limit: str) -> NoReturn:
        """Raise the error for a field of this line."""
        raise self.error(field, value, limit)

    def error(self, field: str, value: object, limit: str) -> InvalidParameter:
        """What is wrong with a field of this line."""
        return InvalidParameter(f"{self.path}: line {self.number}: {field}", value, limit)

    def object(self) -> dict[str, Any]:
        """The line as a JSON object."""
        try:
            found = msgspec.json.decode(self.text)
        except (msgspec.DecodeError, RecursionError) as error:
            self.refuse("JSON", self.text[:60], f"one JSON object a line ({error})")
        if not isinstance(found, dict):
            self.refuse("JSON", found, "an object")
        return found

    def count(self, row: dict[str, Any], field: str, low: int = 0, where: str = "") -> int:
        """A whole number from `low` to `MAX_TOKENS`."""
        value = row.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MAX_TOKENS:
            self.refuse(where + field, value, f"a whole number from {low} to {MAX_TOKENS}")
        return value

    def seconds(self, row: dict[str, Any], field: str, unit: float = 1.0, where: str = "") -> float:
        """A number of at least 0, times `unit`: at most `MAX_SECONDS`."""
        value = row.get(field)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 <= value <= MAX_SECONDS / unit
        ):
            self.refuse(where + field, value, f"a number from 0 to {MAX_SECONDS / unit:g}")
        return float(value) * unit

    def rows(self, row: dict[str, Any], field: str, where: str = "") -> list[dict[str, Any]]:
        """A list of objects, at least one."""
        value = row.get(field)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            self.refuse(where + field, value, "a list of at least one object")
        return value


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a text file or of a gzip of one, without empty ones."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE + 1):
                number += 1
                if len(data) > MAX_LINE:
                    raise InvalidParameter(f"{path}: line {number}", "longer", f"at most {MAX_LINE} bytes")
                text = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield Line(path, number, text)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InvalidParameter(str(path), "a file", f"readable as text, or gzip of it ({error})") from None


def _runs(line: Line, ids: object, field: str) -> tuple[tuple[int, int], ...]:
    """A list of block ids as runs of consecutive ones."""
    if not isinstance(ids, list) or not all(type(item) is int and 0 <= item < 2**48 for item in ids):
        line.refuse(field, ids, "a list of whole numbers of at least 0")
    runs: list[tuple[int, int]] = []
    for item in ids:
        if runs and item == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((item, 1))
    return tuple(runs)


def read_azure(path: Path) -> Iterator[Session]:
    """A row is a request; times are from the first row's."""
    first = None
    for line in read_lines(path):
        cells = line.text.split(",")
        if line.number == 1:
            if cells != _AZURE_HEADER:
                line.refuse("header", line.text, ",".join(_AZURE_HEADER))
            continue
        if len(cells) != len(_AZURE_HEADER):
            line.refuse("row", line.text, f"{len(_AZURE_HEADER)} fields")
        # Fractions of a second have seven digits, of which datetime takes six.
        stamp, _, fraction = cells[0].partition(".")
        try:
            if fraction and not (fraction.isascii() and fraction.isdigit() and len(fraction) < 20):
                raise ValueError
            time = datetime.fromisoformat(stamp).timestamp() + float(f"0.{fraction or 0}")
        except (ValueError, OverflowError):
            line.refuse("TIMESTAMP", cells[0], "a date and time, such as 2023-11-16 18:15:46.6805900")
        row: dict[str, Any] = {
            name: int(cell) if cell.isascii() and cell.isdigit() and len(cell) < 20 else cell
            for name, cell in zip(_AZURE_HEADER, cells, strict=True)
        }
        first = time if first is None else first
        prompt = line.count(row, "ContextTokens", 1)
        yield Session(
            time - first,
            (Turn(input_tokens=prompt, output_tokens=max(1, line.count(row, "GeneratedTokens"))),),
        )


def read_mooncake(path: Path) -> Iterator[Session]:
    """A row is a request; prompts share the blocks that they name."""
    for line in read_lines(path):
        row = line.object()
        tokens = line.count(row, "input_length", 1)
        blocks = _runs(line, row.get("hash_ids"), "hash_ids")
        found, wanted = sum(count for _, count in blocks), -(-tokens // MOONCAKE_BLOCK)
        if found != wanted:
            line.refuse("hash_ids", f"{found} ids", f"{wanted} ids, one for {MOONCAKE_BLOCK} tokens")
        turn = Turn(
            input_tokens=tokens,
            output_tokens=max(1, line.count(row, "output_length")),
            blocks=blocks,
            block_tokens=MOONCAKE_BLOCK,
        )
        yield Session(line.seconds(row, "timestamp", 1e-3), (turn,))


def read_aibrix(path: Path) -> Iterator[Session]:
    """A row is a time and its requests; the text of a prompt is sent where there is one."""
    for line in read_lines(path):
        row = line.object()
        time = line.seconds(row, "timestamp", 1e-3)
        for number, request in enumerate(line.rows(row, "requests")):
            where = f"requests[{number}]."
            text = request.get("prompt")
            if text is not None and not isinstance(text, str):
                line.refuse(where + "prompt", text, "a text")
            turn = Turn(
                input_tokens=line.count(request, "Prompt Length", 1, where),
                output_tokens=max(1, line.count(request, "Output Length", 0, where)),
                text=text or None,
            )
            yield Session(time, (turn,))


def read_coding_agent(path: Path) -> Iterator[Session]:
    """A row is a session that starts at once; a turn waits for the one before and then thinks."""
    for scope, line in enumerate(read_lines(path)):
        row = line.object()
        block = line.count(row, "block_size", 1)
        if row.get("hash_id_scope") != "local":
            line.refuse("hash_id_scope", row.get("hash_id_scope"), "local")
        yield Session(0.0, tuple(_agent_turns(line, line.rows(row, "requests"), block, scope, "")))


def _agent_turns(line: Line, requests: list[dict[str, Any]], block: int, scope: int, path: str) -> list[Turn]:
    """Turns of one agent; the sessions that it starts begin where they did, from the end of the turn before them."""
    turns: list[Turn] = []
    ended = 0.0
    for number, request in enumerate(requests):
        where = f"{path}requests[{number}]."
        time = line.seconds(request, "t", where=where)
        if request.get("type") == _NESTED:
            if path.count("requests") >= MAX_NESTED:
                line.refuse("requests", "sessions within sessions", f"at most {MAX_NESTED} of them deep")
            nested = line.rows(request, "requests", where)
            session = Session(max(0.0, time - ended), tuple(_agent_turns(line, nested, block, scope, where)))
            if not turns:
                line.refuse(where + "type", _NESTED, "a request first, which starts the session")
            turns[-1] = replace(turns[-1], then=(*turns[-1].then, session))
            continue
        tokens = line.count(request, "in", 1, where)
        blocks = _agent_blocks(line, request, tokens // block, where)
        # Where no think time was recorded, the gap between the two requests is all there is.
        think = max(0.0, time - ended)
        if request.get("think_time") is not None:
            think = line.seconds(request, "think_time", where=where)
        spent = line.seconds(request, "api_time", where=where) if "api_time" in request else 0.0
        ended = time + spent
        turns.append(
            Turn(
                input_tokens=tokens,
                output_tokens=max(1, line.count(request, "out", 0, where)),
                blocks=blocks,
                block_tokens=block,
                scope=scope,
                delay=think if turns else 0.0,
            )
        )
    return turns


def _agent_blocks(line: Line, request: dict[str, Any], most: int, where: str) -> tuple[tuple[int, int], ...]:
    """The runs of whole blocks; the last, incomplete block of a prompt has no id."""
    runs = request.get("hash_runs")
    if not isinstance(runs, list) or not all(
        isinstance(run, list)
        and len(run) == 2
        and all(type(item) is int and 0 <= item < 2**48 for item in run)
        for run in runs
    ):
        line.refuse(where + "hash_runs", runs, "a list of [first id, count]")
    if sum(count for _, count in runs) != most:
        found = f"{sum(count for _, count in runs)} blocks"
        line.refuse(where + "hash_runs", found, f"{most} blocks, the whole ones of the prompt")
    return tuple((first, count) for first, count in runs if count)


READERS: Final[dict[str, Callable[[Path], Iterator[Session]]]] = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "aibrix": read_aibrix,
    "coding-agent": read_coding_agent,
}


def detect_format(path: Path) -> str:
    """Name of the format, from the first line. Raises `InvalidParameter` if it is none of them."""
    line = next(read_lines(path), None)
    if line is None:
        raise InvalidParameter(str(path), "an empty file", "a trace with at least one request")
    if line.text.startswith(_AZURE_HEADER[0]):
        return "azure"
    names = set(line.object()) if line.text.startswith("{") else set()
    if {"input_length", "hash_ids"} <= names:
        return "mooncake"
    if {"timestamp", "requests"} <= names:
        return "aibrix"
    if {"block_size", "requests"} <= names:
        return "coding-agent"
    raise line.error(
        "format", line.text[:60], f"a line of {', '.join(READERS)} (or name it with --trace-format)"
    )


def read_custom(path: Path, output_tokens: int) -> Iterator[Turn]:
    """Prompts of a JSONL file: `prompt`, and `output_tokens` where the option `output_tokens` is -1."""
    for line in read_lines(path):
        row = line.object()
        text = row.get("prompt")
        if not isinstance(text, str) or not text:
            line.refuse("prompt", text, "a text")
        wanted = line.count(row, "output_tokens", 1) if output_tokens < 0 else output_tokens
        yield Turn(input_tokens=0, output_tokens=wanted, text=text)
