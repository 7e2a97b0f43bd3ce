"""What is to be sent, as data: sessions of turns. A request that depends on no other is a session of one turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor
from typing import Final

import numpy as np

from tokenloom.errors import InvalidParameter

MIN_BLOCK: Final = 4
"""Tokens of the shortest block of a trace, so that different blocks can be told apart by their tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request.

    `input_tokens` is the length of the prompt, 0 where `text` is given and its length is not known. A prompt
    begins with `prefix_tokens` tokens that all such prompts share, or with the blocks of `blocks`: runs
    (first id, count) of blocks of `block_tokens` tokens. Equal ids in one `scope` are equal tokens. The rest
    is the request's own. `delay` is in seconds from the end of the turn before (0 for a first turn);
    `then` are sessions that start once this turn has ended, `start` seconds after it.
    """

    input_tokens: int
    output_tokens: int
    text: str | None = None
    prefix_tokens: int = 0
    blocks: tuple[tuple[int, int], ...] = ()
    block_tokens: int = 0
    scope: int = 0
    delay: float = 0.0
    then: tuple[Session, ...] = ()


@dataclass(frozen=True, slots=True)
class Session:
    """Turns of which each waits for the end of the one before; `start` in seconds."""

    start: float
    turns: Sequence[Turn] = field(default=())


def count_turns(sessions: Iterable[Session]) -> int:
    """Requests in all, with those of sessions that start later."""
    return sum(1 + count_turns(turn.then) for session in sessions for turn in session.turns)


def random_lengths(
    num_prompts: int, input_tokens: int, output_tokens: int, range_ratio: float, seed: int
) -> Iterator[tuple[int, int]]:
    """Lengths (prompt, output), each uniform between (1 - r) and (1 + r) times its mean, both ends included.

    Only a `range_ratio` r in [0, 1) makes sense; lengths are at least 1.
    """
    rng = np.random.default_rng([seed, 1])
    bounds = [
        (max(1, floor(mean * (1 - range_ratio))), max(1, ceil(mean * (1 + range_ratio))))
        for mean in (input_tokens, output_tokens)
    ]
    for _ in range(num_prompts):
        prompt, output = (int(rng.integers(low, high + 1)) for low, high in bounds)
        yield prompt, output


def spread(turns: Iterable[Turn], times: Iterator[float]) -> list[Session]:
    """Each turn as a session of its own, at the next of the `times`."""
    return [Session(next(times), (turn,)) for turn in turns]


def retime(sessions: Sequence[Session], times: Iterator[float]) -> list[Session]:
    """The same sessions in the same order, started at the next of the `times`."""
    return [replace(session, start=next(times)) for session in sessions]


def speed_up(session: Session, speed: float) -> Session:
    """All times of a session, also between its turns, divided by `speed`."""
    turns = tuple(
        replace(turn, delay=turn.delay / speed, then=tuple(speed_up(later, speed) for later in turn.then))
        for turn in session.turns
    )
    return Session(session.start / speed, turns)


def scale_lengths(session: Session, factor: float) -> Session:
    """All lengths multiplied by `factor` (at least one token each), with the sharing between prompts kept:
    a block stays a block, of fewer tokens. Texts become random tokens.

    Raises `InvalidParameter` if blocks would become shorter than `MIN_BLOCK`.
    """

    def scaled(turn: Turn) -> Turn:
        block = round(turn.block_tokens * factor)
        if turn.blocks and block < MIN_BLOCK:
            least = MIN_BLOCK / turn.block_tokens
            limit = f"at least {least:g}: blocks of {turn.block_tokens} tokens keep at least {MIN_BLOCK}"
            raise InvalidParameter("--length-scale", factor, limit)
        tokens = max(1, round(turn.input_tokens * factor))
        if turn.blocks:
            whole, rest = divmod(turn.input_tokens, turn.block_tokens)
            tokens = whole * block + ceil(rest * block / turn.block_tokens)
        return replace(
            turn,
            text=None,
            input_tokens=tokens,
            output_tokens=max(1, round(turn.output_tokens * factor)),
            prefix_tokens=round(turn.prefix_tokens * factor),
            block_tokens=block,
            then=tuple(scale_lengths(later, factor) for later in turn.then),
        )

    return Session(session.start, tuple(scaled(turn) for turn in session.turns))


def limit_tokens(sessions: Iterable[Session], most: int) -> tuple[list[Session], int]:
    """Sessions without the turns of more than `most` tokens (prompt and output), and how many those were.

    What would have started after such a turn starts after the one before it, or not at all.
    """
    kept, left_out = [], 0
    for session in sessions:
        turns: list[Turn] = []
        for turn in session.turns:
            later, less = limit_tokens(turn.then, most)
            if turn.input_tokens + turn.output_tokens <= most:
                left_out += less
                turns.append(replace(turn, then=tuple(later)))
            elif turns:
                left_out += 1 + less
                turns[-1] = replace(turns[-1], then=turns[-1].then + tuple(later))
            else:
                left_out += 1 + count_turns(turn.then)
        if turns:
            kept.append(Session(session.start, tuple(turns)))
    return kept, left_out


def first_requests(sessions: Iterable[Session], most: int) -> list[Session]:
    """The sessions that hold the first `most` requests, the last one cut short. Reads no further."""
    taken: list[Session] = []
    waiting = iter(sessions)
    while most > 0 and (session := next(waiting, None)) is not None:
        turns: list[Turn] = []
        for turn in session.turns:
            if most <= 0:
                break
            most -= 1
            later = first_requests(turn.then, most)
            most -= count_turns(later)
            turns.append(replace(turn, then=tuple(later)))
        taken.append(Session(session.start, tuple(turns)))
    return taken
