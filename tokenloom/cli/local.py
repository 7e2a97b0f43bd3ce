"""A model in this process whose text streams to the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tokenloom.config import Config
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.serving.assembly import EngineParts, build_engine
from tokenloom.serving.local_adapters import LocalAdapters
from tokenloom.serving.progress import ConsoleLoad
from tokenloom.serving.requests import make_request
from tokenloom.serving.threads import set_blas_threads
from tokenloom.text.output_text import output_text_of


def load(config: Config) -> EngineParts:
    """An engine in this process, with the threads that `config` asks for."""
    if config.runtime.threads:
        set_blas_threads(config.runtime.threads)
    return build_engine(config, ConsoleLoad())


class LocalModel:
    """Loads the model of `config`, and the adapter in the directory `adapter` ("" for none); raises a
    `TokenloomError` when that cannot be done."""

    def __init__(self, config: Config, adapter: str = "") -> None:
        self._parts = load(config)
        self._adapters: LocalAdapters | None = None
        try:
            self._adapters = LocalAdapters(config, self._parts)
            self._adapter = self._adapters.resolve(adapter)
        except BaseException:
            self.close()
            raise
        self._request_ids = itertools.count()

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        """Pieces of the text that follows `prompt`."""
        return self._stream(self._parts.tokenizer.encode(prompt), params)

    def answer(self, messages: list[dict[str, str]], params: SamplingParams) -> Iterator[str]:
        """Pieces of the answer to the last message, through the model's chat template."""
        tokenizer = self._parts.tokenizer
        text = tokenizer.render_chat(messages, add_generation_prompt=True)
        return self._stream(tokenizer.encode(text, add_special_tokens=False), params)

    def _stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[str]:
        """Step the engine until the request ends; closing the iterator cancels it."""
        engine, tokenizer = self._parts.engine, self._parts.tokenizer
        request_id = f"cli-{next(self._request_ids)}"
        request = make_request(
            tokenizer, prompt, self._parts.seeds.fill(params), request_id=request_id, adapter=self._adapter
        )
        engine.add_request(request)
        output = output_text_of(tokenizer, prompt, params)
        try:
            while engine.has_work:
                for delta in engine.step():
                    for token_id in delta.token_ids:
                        if text := output.push(token_id).text:
                            yield text
                    if delta.last and (text := output.finish()):
                        yield text
        finally:
            engine.cancel(request_id)

    def close(self) -> None:
        """Release the engine."""
        self._parts.engine.close()
        if self._adapters is not None:
            self._adapters.close()
