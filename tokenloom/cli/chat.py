"""`tokenloom chat`: a conversation in the terminal, with a model in this process or on a server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Protocol

from tokenloom.cli.local import LocalModel
from tokenloom.cli.remote import RemoteChat
from tokenloom.config import Config
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import TokenloomError

HELP = "/reset starts over, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer."


class Talker(Protocol):
    """Whoever answers."""

    def answer(self, messages: list[dict[str, str]], params: SamplingParams) -> Iterator[str]:
        """Pieces of the answer to the last message; closing the iterator stops it."""


def take_turn(talker: Talker, messages: list[dict[str, str]], params: SamplingParams) -> None:
    """Print the answer and append it to `messages`. Ctrl-C keeps what was said so far."""
    said: list[str] = []
    pieces = talker.answer(messages, params)
    try:
        for text in pieces:
            print(text, end="", flush=True)
            said.append(text)
    except KeyboardInterrupt:
        print(" ...", end="")
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()
    print()
    messages.append({"role": "assistant", "content": "".join(said)})


def converse(talker: Talker, system: str, params: SamplingParams) -> None:
    """Read lines from the user until the end of the input; an error ends the turn, not the conversation."""
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    show_prompt = sys.stdin.isatty()
    if show_prompt:
        print(HELP)
    while True:
        try:
            line = input("> " if show_prompt else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(start)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                take_turn(talker, messages, params)
            except TokenloomError as error:
                messages.pop()
                print(f"tokenloom: {error}", file=sys.stderr)


def run(config: Config, url: str, api_key: str, system: str, params: SamplingParams) -> None:
    """Talk to the server at `url`, or to a model loaded here where it is empty."""
    if url:
        converse(RemoteChat(url, api_key), system, params)
        return
    with closing(LocalModel(config)) as model:
        converse(model, system, params)
