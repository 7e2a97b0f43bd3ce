"""The Python face: an engine in this process, for scripts and notebooks."""

from __future__ import annotations

import itertools
import logging
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, NamedTuple

from tokenloom.config import Config, make_config
from tokenloom.engine.request import Exactness, Pooling, Request, Slo
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import InvalidParameter, TokenloomError
from tokenloom.serving.assembly import EngineParts, build_engine
from tokenloom.serving.client import ModelCard
from tokenloom.serving.local_adapters import LocalAdapters
from tokenloom.serving.outputs import Collected, EmbeddingRequestOutput, RequestOutput
from tokenloom.serving.progress import ConsoleLoad, RequestBar
from tokenloom.serving.requests import check_dimensions, embedding_request, make_request, num_kept
from tokenloom.serving.slo import SloChoice, SloClasses
from tokenloom.serving.threads import set_blas_threads
from tokenloom.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""

Message = Mapping[str, Any]
"""One chat message: {"role": ..., "content": ...}."""

AdapterChoice = str | Path | None
"""The name of an adapter, the directory of one, or None for the model itself."""

BAR_FROM: Final = 8
"""Lists of at least this many prompts show a progress bar."""


_Asked = tuple[Request, str | None]
"""A request, and the text of its prompt if it has one."""


class _Tokenized(NamedTuple):
    text: str | None
    token_ids: list[int]


class LLM:
    """A model and its engine in this process. Not for use from several threads at once: calls take turns.

    `model` is the directory of a Hugging Face checkpoint or a GGUF file, empty for the embedded model. Every
    other option of the configuration may be given by its name (`dtype`, `max_batch_tokens`, `num_pages`, `seed`,
    ...). Raises `InvalidParameter` for an unknown name or a bad value, `ModelError` for a checkpoint that cannot be
    served, `OutOfMemory` when it does not fit.

    What a prompt gets does not depend on the other prompts of the call.
    """

    def __init__(self, model: str = "", **options: Any) -> None:
        config = make_config({"model": str(model), **options})
        SloClasses(config)  # a class that cannot be read is refused before anything is loaded
        if config.runtime.threads > 0 and not set_blas_threads(config.runtime.threads):
            log.warning("threads=%d has no effect: no OpenBLAS is loaded", config.runtime.threads)
        self._set_up(config, build_engine(config, ConsoleLoad()))

    @classmethod
    def from_parts(cls, config: Config, parts: EngineParts) -> LLM:
        """An `LLM` on an engine that was built elsewhere; it owns the engine from now on."""
        llm = cls.__new__(cls)
        llm._set_up(config, parts)
        return llm

    def _set_up(self, config: Config, parts: EngineParts) -> None:
        self.config = config
        self._parts = parts
        self._slos = SloClasses(config)
        self._request_ids = itertools.count()
        self._turn = threading.Lock()
        self._token_texts: dict[int, str] = {}
        self._closed = False
        try:
            self._adapters = LocalAdapters(config, parts)
        except BaseException:
            parts.engine.close()
            raise

    @property
    def card(self) -> ModelCard:
        """Name, context length and defaults of the model."""
        return self._parts.card

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self._parts.tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._parts.tokenizer.encode(text, add_special_tokens)

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without parameters gets: the defaults of the model's generation_config.json."""
        defaults: dict[str, Any] = self._parts.card.default_sampling
        return SamplingParams(**defaults)

    # --- generating --------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: AdapterChoice | Sequence[AdapterChoice] = None,
        slo: SloChoice | Sequence[SloChoice] = None,
        exactness: Exactness = "exact",
        progress: bool | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete the prompts; the results are in their order.

        `sampling_params` is one for all or one for each (None: the model's defaults), and so is `adapter`: the
        name of one, its directory, or None for the model itself. `slo` decides a request's pace, never its output:
        {"tpot_ms": 40, "ttft_ms": 500}, a class of the option `slo_class`, one for all or one for each. With
        `exactness` "distribution", speculation keeps the law of sampled texts instead of the texts
        (docs/speculation-sampling.md). `progress` draws a bar
        for 8 prompts and more (None: where stderr is a terminal); `use_tqdm=False`, as in vLLM, draws none.
        Every request is checked before any is added: `InvalidParameter` or `ContextLengthExceeded` leaves
        the engine as it was. Ctrl-C cancels what runs after the step in flight.
        """
        tokenized = self._tokenize(_prompt_list(prompts), True)
        return self._generate(
            tokenized, sampling_params, adapter, slo, exactness, progress if use_tqdm else False
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        adapter: AdapterChoice | Sequence[AdapterChoice] = None,
        slo: SloChoice | Sequence[SloChoice] = None,
        exactness: Exactness = "exact",
        progress: bool | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, through the model's chat template.

        With `continue_final_message` the last message is a beginning that the model continues
        (`add_generation_prompt` must be False then). Otherwise as `generate`.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidParameter(
                "add_generation_prompt", True, "false together with continue_final_message"
            )
        texts: list[str] = []
        for conversation in _conversation_list(messages):
            texts.append(
                self._parts.tokenizer.render_chat(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                )
            )
        tokenized = self._tokenize(texts, False)
        return self._generate(
            tokenized, sampling_params, adapter, slo, exactness, progress if use_tqdm else False
        )

    # --- adapters ----------------------------------------------------------------------------------------

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Let `name` stand for the adapter that peft saved in `directory`, from the next call on.

        A name that stands for another one already is given to this. Raises `ModelError` for an adapter that
        cannot be served, and `InvalidParameter` for a bad name or too little memory; nothing has changed then.
        """
        with self._open_turn():
            self._adapters.load(name, directory)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises `InvalidParameter` for an unknown name."""
        with self._open_turn():
            self._adapters.unload(name)

    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters, sorted."""
        return self._adapters.names()

    @contextmanager
    def _open_turn(self) -> Iterator[None]:
        with self._turn:
            if self._closed:
                raise TokenloomError("this LLM is closed")
            yield

    # --- requests ----------------------------------------------------------------------------------------

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        adapter: AdapterChoice | Sequence[AdapterChoice] = None,
        truncate_prompt_tokens: int | None = None,
        add_special_tokens: bool = True,
        progress: bool | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The hidden state of each prompt as one vector; the results are in the order of the prompts.

        `pooling` is "last" (the last token's state) or "mean" (over all tokens), None for the option
        `pooling_type`; `normalize` makes the Euclidean length 1. `dimensions` cuts the vectors of a model that
        was trained for it. `truncate_prompt_tokens` keeps the beginning of each prompt, -1 as much as the
        model takes; without it a prompt that is too long raises `ContextLengthExceeded`. Otherwise as
        `generate`.
        """
        check_dimensions(dimensions, self.card)
        if pooling is None:
            pooling = self.config.model.pooling_type
        keep = num_kept(truncate_prompt_tokens, self.card)
        tokenized = self._tokenize(_prompt_list(prompts), add_special_tokens, keep)
        kind = pooling
        chosen = _adapter_list(adapter, len(tokenized))

        def requests() -> list[_Asked]:
            contents = {one: self._adapters.resolve(one) for one in set(chosen)}
            return [
                (
                    embedding_request(
                        prompt.token_ids, kind, request_id=str(next(self._request_ids)), adapter=contents[one]
                    ),
                    prompt.text,
                )
                for prompt, one in zip(tokenized, chosen, strict=True)
            ]

        collected = self._serve(requests, progress if use_tqdm else False)
        return [entry.embedding(normalize=normalize, dimensions=dimensions) for entry in collected]

    def _tokenize(
        self, prompts: Sequence[Prompt], add_special_tokens: bool, keep: int | None = None
    ) -> list[_Tokenized]:
        given = [_text_or_ids(prompt) for prompt in prompts]
        texts = [text for text, ids in given if ids is None and text is not None]
        tokenizer = self._parts.tokenizer
        if keep is None:
            encoded = iter(tokenizer.encode_batch(texts, add_special_tokens))
        else:
            encoded = iter(tokenizer.encode_truncated(texts, keep, add_special_tokens))
        return [_Tokenized(text, next(encoded) if ids is None else ids[:keep]) for text, ids in given]

    def _generate(
        self,
        prompts: list[_Tokenized],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: AdapterChoice | Sequence[AdapterChoice],
        slo: SloChoice | Sequence[SloChoice],
        exactness: Exactness,
        progress: bool | None,
    ) -> list[RequestOutput]:
        params = self._params_list(sampling_params, len(prompts))
        chosen = _adapter_list(adapter, len(prompts))
        slos = [self._slos.find(one) for one in _slo_list(slo, len(prompts))]
        tokenizer = self._parts.tokenizer

        def requests() -> list[_Asked]:
            contents = {one: self._adapters.resolve(one) for one in set(chosen)}
            return [
                (
                    make_request(
                        tokenizer,
                        prompt.token_ids,
                        own,
                        request_id=str(next(self._request_ids)),
                        adapter=contents[one],
                        exactness=exactness,
                        slo=pace,
                    ),
                    prompt.text,
                )
                for prompt, own, one, pace in zip(prompts, params, chosen, slos, strict=True)
            ]

        collected = self._serve(requests, progress)
        return [entry.output(tokenizer, self._decode_token) for entry in collected]

    def _serve(self, requests: Callable[[], Sequence[_Asked]], progress: bool | None) -> Iterable[Collected]:
        """Run requests (each with the text of its prompt, if it has one) to their end, in one turn, in which they
        are made."""
        with self._open_turn():
            collected: dict[str, Collected] = {}
            for request, text in requests():
                self._parts.engine.check_request(request)
                collected[request.request_id] = Collected(request, text)
            for entry in collected.values():
                entry.request.params = self._parts.seeds.fill(entry.request.params)
            shown = len(collected) >= BAR_FROM and (sys.stderr.isatty() if progress is None else progress)
            self._run(collected, RequestBar(len(collected), shown=shown))
            return collected.values()

    def _run(self, collected: dict[str, Collected], bar: RequestBar) -> None:
        engine = self._parts.engine
        queued = deque(entry.request for entry in collected.values())
        try:
            with _deferred_interrupt() as interrupted, bar:
                while (queued or engine.has_work) and not interrupted:
                    while queued and engine.has_room:
                        engine.add_request(queued.popleft())
                    num_ended = num_tokens = 0
                    for delta in engine.step():
                        collected[delta.request_id].add(delta)
                        num_ended += delta.last
                        num_tokens += len(delta.token_ids)
                    bar.advance(num_ended, num_tokens)
            if interrupted:
                raise KeyboardInterrupt
        except BaseException:
            for request_id in collected:
                engine.cancel(request_id)
            raise

    def _params_list(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise InvalidParameter(
                "sampling_params", f"{len(given)} entries", f"one, or one for each of {count} prompts"
            )
        for params in given:
            if not isinstance(params, SamplingParams):
                raise InvalidParameter("sampling_params", params, "SamplingParams")
        return given

    def _decode_token(self, token_id: int) -> str:
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._parts.tokenizer.token_text(token_id)
        return text

    # --- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release memory and threads. More calls of `generate` raise `TokenloomError`."""
        with self._turn:
            if not self._closed:
                self._closed = True
                self._parts.engine.close()
                self._adapters.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and not hasattr(items[0], "__len__"):
        return [items]
    return items


def _adapter_list(given: AdapterChoice | Sequence[AdapterChoice], count: int) -> list[AdapterChoice]:
    """The adapter of each of `count` prompts."""
    if given is None or isinstance(given, (str, Path)):
        return [given] * count
    if not isinstance(given, Sequence) or len(given) != count:
        raise InvalidParameter("adapter", given, f"one, or one for each of {count} prompts")
    return list(given)


def _slo_list(given: SloChoice | Sequence[SloChoice], count: int) -> list[SloChoice]:
    """The SLO of each of `count` prompts; an `Slo` is a tuple itself."""
    if given is None or isinstance(given, (str, Slo, Mapping)):
        return [given] * count
    choices: Sequence[SloChoice] = given
    if not isinstance(choices, Sequence) or len(choices) != count:
        raise InvalidParameter("slo", given, f"one, or one for each of {count} prompts")
    return list(choices)


def _text_or_ids(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    """The two halves of a prompt; at least one is there, and token ids win."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        return None, _token_ids(prompt)
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if not isinstance(text, str) and (text is not None or token_ids is None):
        raise InvalidParameter("prompt", dict(prompt), 'a dictionary with "prompt" or "prompt_token_ids"')
    return text, None if token_ids is None else _token_ids(token_ids)


def _token_ids(value: object) -> list[int]:
    """Token ids as plain ints; anything else is refused by name."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise InvalidParameter("prompt", value, "a text or a list of token ids")
    token_ids = []
    for token in value:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise InvalidParameter("prompt", token, "a text or a list of token ids")
        token_ids.append(token.__index__())
    return token_ids


def _conversation_list(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """One conversation or many, as a list."""
    items: list[Any] = list(messages)
    if not items:
        raise InvalidParameter("messages", items, "at least one message")
    return [items] if isinstance(items[0], Mapping) else items


class _Interrupted:
    """True once Ctrl-C was pressed."""

    def __init__(self) -> None:
        self._pressed = False

    def __bool__(self) -> bool:
        return self._pressed

    def press(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: the first press waits for the step in flight, the second does not."""
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True


@contextmanager
def _deferred_interrupt() -> Iterator[_Interrupted]:
    """Hold Ctrl-C back, so that no step is cut in the middle; only the main thread may."""
    interrupted = _Interrupted()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    previous = signal.signal(signal.SIGINT, interrupted.press)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous if previous is not None else signal.default_int_handler)
