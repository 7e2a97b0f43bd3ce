"""The process that prepares adapters for a server: reads lines of JSON, and answers each with one.

Started as `python -P -m tokenloom.serving.packer_process`. The first line of standard input is a `PackerStart`, each
other one a directory; the answer to that is `Packed` or `Refused`. It ends with its standard input, also in the
middle of an adapter, so that it never outlives its parent.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tokenloom.errors import ModelError, TokenloomError
from tokenloom.kernels.program import Program
from tokenloom.models.loading import describe_model
from tokenloom.serving.adapter_packer import AdapterPacker, PackingTarget, PreparedAdapter
from tokenloom.serving.messages import ErrorBody, error_body

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class PackerStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to pack for, where to, and the layouts of images that the parent expects; `drafts` are the draft models of
    the target, by name."""

    target: PackingTarget
    directory: str
    layouts: str
    drafts: dict[str, PackingTarget] = {}


class Packed(msgspec.Struct, tag="packed", frozen=True, forbid_unknown_fields=True):
    """As `PreparedAdapter`, and what the adapter says its base model is called; `drafts` say of theirs nothing else."""

    content_id: str
    rank: int
    num_bytes: int
    num_pages: int
    base_model_name: str | None = None
    drafts: dict[str, Packed] = {}


class Refused(msgspec.Struct, tag="refused", frozen=True, forbid_unknown_fields=True):
    """The directory cannot be served, for this reason."""

    error: ErrorBody


def encode_line(message: Any) -> bytes:
    """`message` as one line. The standard library's JSON, not msgspec's: names of files may be no UTF-8, and these
    come through."""
    return json.dumps(msgspec.to_builtins(message)).encode("ascii") + b"\n"


def decode_line(line: bytes, form: type[_T] | Any) -> _T:
    """What `encode_line` was given. Raises ValueError for anything else."""
    found: _T = msgspec.convert(json.loads(line), form)
    return found


def main() -> int:
    """Serve until standard input ends."""
    # Answers have a pipe of their own: what anybody else writes to standard output goes where logs go.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    logging.basicConfig(format="%(levelname)s packer: %(message)s", stream=sys.stderr)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    start: PackerStart = decode_line(lines.get(), PackerStart)
    packer: AdapterPacker | None = None
    while True:
        directory: str = decode_line(lines.get(), str)
        answer: Packed | Refused
        try:
            packer = packer or _make(start)
            prepared, base = packer.prepare(directory)
            drafts = {name: _answer(found) for name, found in prepared.drafts}
            answer = _answer(prepared, base, drafts)
        except TokenloomError as error:
            answer = Refused(error_body(error))
        except Exception as error:
            log.exception("cannot prepare %r", directory)
            answer = Refused(error_body(error))
        answers.write(encode_line(answer))
        answers.flush()


def _read(lines: queue.SimpleQueue[bytes]) -> None:
    """Pass lines on, and end the process with the last one, whatever it does then."""
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):
            lines.put(line)
    os._exit(0)


def _answer(
    prepared: PreparedAdapter, base: str | None = None, drafts: dict[str, Packed] | None = None
) -> Packed:
    return Packed(
        prepared.content_id, prepared.rank, prepared.num_bytes, prepared.num_pages, base, drafts or {}
    )


def _make(start: PackerStart) -> AdapterPacker:
    drafts = {name: (target, _program(target)) for name, target in start.drafts.items()}
    packer = AdapterPacker(start.target, _program(start.target), Path(start.directory), drafts)
    if packer.layouts != start.layouts:
        models = ", ".join(target.model for target in (start.target, *start.drafts.values()))
        raise ModelError(
            f"other layers in {models} than when the server started",
            "a model whose files stay as they are; start the server again",
        )
    return packer


def _program(target: PackingTarget) -> Program:
    return describe_model(target.model, max_context=target.max_context, weights=target.weights).program


if __name__ == "__main__":
    sys.exit(main())
