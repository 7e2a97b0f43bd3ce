"""From options to what is sent: sessions, a vocabulary, a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

from tokenloom.bench.load.arrivals import arrival_times
from tokenloom.bench.load.client import Target
from tokenloom.bench.load.options import LoadOptions
from tokenloom.bench.load.prompts import COMMON_WORDS, Vocabulary, ids_of, word_vocabulary, words_of
from tokenloom.bench.load.server import Server
from tokenloom.bench.load.traces import READERS, detect_format, read_custom
from tokenloom.bench.load.workload import (
    Session,
    Turn,
    first_requests,
    limit_tokens,
    random_lengths,
    retime,
    scale_lengths,
    speed_up,
    spread,
)
from tokenloom.errors import InvalidParameter, TokenloomError
from tokenloom.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be sent; `format` is that of the trace or the dataset's name, `left_out` the requests that
    were longer than asked for."""

    sessions: Sequence[Session]
    format: str
    left_out: int = 0


def make_workload(options: LoadOptions) -> Workload:
    """The sessions of the options. Raises `InvalidParameter` for files that cannot be read, or are empty."""
    rate = options.request_rate
    times = arrival_times(inf if rate is None else rate, options.burstiness, options.seed)
    if not options.trace:
        turns = list(islice(_dataset(options), options.num_prompts))
        if not turns:
            raise InvalidParameter("--dataset-path", options.dataset_path, "a file with at least one prompt")
        return Workload(spread(turns, times), options.dataset_name)
    path = Path(options.trace)
    kind = detect_format(path) if options.trace_format == "auto" else options.trace_format
    sessions = READERS[kind](path)
    if options.length_scale != 1:
        sessions = (scale_lengths(session, options.length_scale) for session in sessions)
    left_out = 0
    if options.max_request_tokens:
        taken, left_out = _limited(sessions, options.max_request_tokens, options.num_prompts)
    else:
        taken = first_requests(sessions, options.num_prompts)
    if not taken:
        found = f"{left_out} longer requests" if left_out else "no requests"
        raise InvalidParameter("--trace", found, f"a file with a request to send ({options.trace})")
    taken.sort(key=lambda session: session.start)
    if rate is not None:
        taken = retime(taken, times)
    first = taken[0].start if rate is None else 0.0
    shifted = [Session(session.start - first, session.turns) for session in taken]
    return Workload([speed_up(session, options.speed) for session in shifted], kind, left_out)


def _limited(sessions: Iterator[Session], most_tokens: int, num_prompts: int) -> tuple[list[Session], int]:
    left_out = 0

    def short() -> Iterator[Session]:
        nonlocal left_out
        for session in sessions:
            kept, less = limit_tokens([session], most_tokens)
            left_out += less
            yield from kept

    return first_requests(short(), num_prompts), left_out


def _dataset(options: LoadOptions) -> Iterator[Turn]:
    if options.dataset_name == "custom":
        yield from read_custom(Path(options.dataset_path), options.custom_output_len)
        return
    lengths = random_lengths(
        options.num_prompts,
        options.random_input_len,
        options.random_output_len,
        options.random_range_ratio,
        options.seed,
    )
    prefix = options.random_prefix_len
    for prompt, output in lengths:
        yield Turn(input_tokens=prefix + prompt, output_tokens=output, prefix_tokens=prefix)


def needs_vocabulary(sessions: Sequence[Session]) -> bool:
    """Whether any prompt has to be made up."""
    return any(
        turn.text is None or needs_vocabulary(turn.then) for session in sessions for turn in session.turns
    )


def make_vocabulary(options: LoadOptions, server: Server, model: str) -> Vocabulary:
    """What made-up prompts are made of, by the tokenizer, the size of the vocabulary or the server's /tokenize.

    Raises `InvalidParameter`, `ModelError` or `TokenloomError` where that is not possible.
    """
    chat = options.backend == "openai-chat"
    as_text = chat or options.prompt_form == "text"
    if options.vocab_size and not as_text:
        return Vocabulary(range(options.vocab_size))
    tokenizer = _read_tokenizer(options.tokenizer) if options.tokenizer else None
    if tokenizer is not None and not as_text:
        return ids_of(tokenizer)
    if tokenizer is not None:
        return word_vocabulary(words_of(tokenizer), _counter(tokenizer, chat))
    words = [f" {word}" for word in COMMON_WORDS]

    def tokens(text: str) -> list[int]:
        messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
        fields: dict[str, Any] = {"messages": messages} if chat else {"prompt": text}
        return server.tokenize({"model": model, **fields})

    try:
        vocabulary = word_vocabulary(words, lambda text: len(tokens(text)))
        if as_text:
            return vocabulary
        ids = server.tokenize(
            {"model": model, "prompt": "".join(vocabulary.words), "add_special_tokens": False}
        )
    except TokenloomError as error:
        hint = "give --tokenizer DIR" + ("" if as_text else " or --vocab-size N")
        raise TokenloomError(f"prompts of an exact length need a tokenizer: {hint} ({error})") from None
    return Vocabulary(sorted(set(ids)))


def _read_tokenizer(path: str) -> Tokenizer:
    given = Path(path)
    return Tokenizer.from_dir(given.parent if given.name == "tokenizer.json" else given)


def _counter(tokenizer: Tokenizer, chat: bool) -> Callable[[str], int]:
    if not chat:
        return lambda text: len(tokenizer.encode(text))

    def count(text: str) -> int:
        rendered = tokenizer.render_chat([{"role": "user", "content": text}], add_generation_prompt=True)
        return len(tokenizer.encode(rendered, add_special_tokens=False))

    return count


def make_target(options: LoadOptions, model: str) -> Target:
    """Where requests go and what is in each."""
    return Target(
        url=options.url,
        chat=options.backend == "openai-chat",
        body={"model": model, **options.body},
        headers=options.headers,
        continuous_usage=options.continuous_usage,
        timeout=options.timeout,
    )
