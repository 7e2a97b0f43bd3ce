"""Server-sent events, cut out of a stream of bytes that may be split anywhere."""

from __future__ import annotations

from tokenloom.errors import TokenloomError

MAX_EVENT_BYTES = 16 << 20


class EventReader:
    """Takes bytes as they arrive and gives the data of each event that is complete."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The `data` of the events that `data` completes, in order; comments and other fields are left out.

        Lines may end in LF or CRLF. Raises `TokenloomError` for an event of more than `MAX_EVENT_BYTES`.
        """
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            # A CR at the end may be half of a CRLF: it waits for the next bytes.
            held = data[-1:] == b"\r"
            data = data[: len(data) - held].replace(b"\r\n", b"\n") + data[len(data) - held :]
        *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise TokenloomError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        found = []
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:
                found.append(event[6:])
            elif (joined := _data_of(event)) is not None:
                found.append(joined)
        return found


def _data_of(event: bytes) -> bytes | None:
    """The data lines of an event with several fields, joined; None if it has none."""
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
