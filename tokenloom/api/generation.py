"""The one path from prompts to text: several prompts of n choices each become one stream of deltas."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from msgspec import UNSET, UnsetType

from tokenloom.api.context import ApiContext
from tokenloom.api.responses import CompletionTokensDetails, FinishReason, PromptTokensDetails, Usage
from tokenloom.engine.request import NO_SLO, Exactness, SequenceDelta, Slo, TokenLogprobs
from tokenloom.engine.request import FinishReason as EngineReason
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.serving.requests import make_request
from tokenloom.text.output_text import OutputText, output_text_of

log = logging.getLogger("tokenloom.requests")

_REASONS: dict[EngineReason, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "abort",
    "error": "error",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt. `echo` is the text to put before each of its choices."""

    token_ids: Sequence[int]
    echo: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An API request after validation. `log_id` is the client's X-Request-Id or its substitute; `model` what it names
    as the model."""

    response_id: str
    log_id: str
    model: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    priority: int = 0
    tenant: str = ""
    exactness: Exactness = "exact"
    slo: Slo = NO_SLO


class ChoiceDelta(NamedTuple):
    """What one step added to one choice.

    `choice` is prompt number * n + sample. `first` marks the first delta of the choice; its `text` begins
    with the prompt's echo. `offsets` (characters of the choice's text before each token) is parallel to
    `logprobs`.
    """

    choice: int
    first: bool
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    offsets: list[int]
    finish_reason: FinishReason | None
    stop: str | int | None


class _Choice:
    """The state of one choice while its tokens arrive."""

    __slots__ = (
        "base",
        "finish_reason",
        "last_time",
        "num_accepted",
        "num_drafted",
        "num_tokens",
        "output",
        "started",
    )

    def __init__(self, output: OutputText, base: int) -> None:
        self.output = output
        self.base = base
        self.num_tokens = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self.last_time = 0.0
        self.started = False
        self.finish_reason: FinishReason | None = None


class Generation:
    """Runs a job and keeps its totals. `model` and `adapter` (a content id) are what serves it, until `close`.

    `deltas()` may be iterated once. Closing it early cancels everything that still runs; if one prompt fails,
    the others are cancelled and the error is raised. `prompt_logprobs[p]` is there from the first delta of
    prompt p on.
    """

    def __init__(self, context: ApiContext, job: Job) -> None:
        self.job = job
        self.prompt_logprobs: list[list[TokenLogprobs] | None] = [None] * len(job.prompts)
        self.created = int(time.time())
        self._client = context.client
        self._metrics = context.metrics
        self._started = time.monotonic()
        self._first_token = 0.0
        self._begun = [False] * len(job.prompts)
        self._num_prompt = sum(len(prompt.token_ids) for prompt in job.prompts)
        self._num_output = 0
        self._num_cached = 0
        self.model, self._lease = context.lease(job.model)
        try:
            self._prepare(job)
        except BaseException:
            self.close()
            raise

    def _prepare(self, job: Job) -> None:
        tokenizer = self._client.tokenizer
        # Bad words are tokenised once, however many prompts there are.
        self._template = make_request(
            tokenizer,
            (),
            job.params,
            request_id="",
            priority=job.priority,
            tenant=job.tenant,
            adapter=self.adapter,
            exactness=job.exactness,
            slo=job.slo,
        )
        self._choices = [
            _Choice(output_text_of(tokenizer, prompt.token_ids, job.params), len(prompt.echo))
            for prompt in job.prompts
            for _ in range(job.params.n)
        ]

    @property
    def adapter(self) -> str:
        """The content id of the adapter; "" for the base model."""
        return self._lease.content_id

    def close(self) -> None:
        """Let go of the adapter; nothing of the job runs any more."""
        self._lease.release()

    @property
    def usage(self) -> Usage:
        """The totals so far."""
        details: CompletionTokensDetails | UnsetType = UNSET
        if self._client.card.speculates:
            accepted = sum(choice.num_accepted for choice in self._choices)
            drafted = sum(choice.num_drafted for choice in self._choices)
            details = CompletionTokensDetails(
                accepted_prediction_tokens=accepted, rejected_prediction_tokens=drafted - accepted
            )
        return Usage(
            prompt_tokens=self._num_prompt,
            completion_tokens=self._num_output,
            total_tokens=self._num_prompt + self._num_output,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached),
            completion_tokens_details=details,
        )

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """The merged stream. Raises what `EngineClient.generate` raises."""
        source = self._one_prompt() if len(self.job.prompts) == 1 else self._many_prompts()
        outcome = "abort"
        try:
            async with contextlib.aclosing(source):
                async for number, delta in source:
                    yield self._absorb(number, delta)
            outcome = "done"
        except (Exception, asyncio.CancelledError) as error:
            outcome = "abort" if isinstance(error, asyncio.CancelledError) else "error"
            raise
        finally:
            self._finish(outcome)

    # --- where deltas come from --------------------------------------------------------------------------

    def _submit(self, number: int) -> AsyncIterator[SequenceDelta]:
        request = replace(
            self._template,
            request_id=f"{self.job.response_id}-{number}",
            prompt_token_ids=self.job.prompts[number].token_ids,
        )
        return self._client.generate(request)

    async def _one_prompt(self) -> AsyncGenerator[tuple[int, SequenceDelta], None]:
        async with closing(self._submit(0)) as stream:
            async for delta in stream:
                yield 0, delta

    async def _many_prompts(self) -> AsyncGenerator[tuple[int, SequenceDelta], None]:
        """One task per prompt feeds one queue; the queue holds at most what the engine may generate."""
        queue: asyncio.Queue[tuple[int, SequenceDelta] | Exception | None] = asyncio.Queue()

        async def pump(number: int) -> None:
            try:
                async with closing(self._submit(number)) as stream:
                    async for delta in stream:
                        queue.put_nowait((number, delta))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(pump(number)) for number in range(len(self.job.prompts))]
        num_open = len(tasks)
        try:
            while num_open:
                item = await queue.get()
                if item is None:
                    num_open -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- what becomes of them ----------------------------------------------------------------------------

    def _absorb(self, number: int, delta: SequenceDelta) -> ChoiceDelta:
        """Turn an engine delta into text and offsets, and account for it."""
        index = number * self.job.params.n + delta.sample
        choice = self._choices[index]
        now = time.monotonic()
        if not self._begun[number]:
            self._begin_prompt(number, delta, now)
        first = not choice.started
        num_new = len(delta.token_ids)
        if num_new:
            if choice.num_tokens:
                self._metrics.observe("inter_token_latency_seconds", (now - choice.last_time) / num_new)
            choice.num_tokens += num_new
            choice.last_time = now
            self._num_output += num_new
            self._metrics.count("generation_tokens", num_new)
        choice.num_drafted, choice.num_accepted = delta.num_drafted, delta.num_accepted
        text, offsets = self._detokenise(choice, delta)
        if first:
            choice.started = True
            text = self.job.prompts[number].echo + text
        reason = delta.finish_reason
        if reason is not None:
            choice.finish_reason = _REASONS[reason]
            self._metrics.count_finished(choice.finish_reason)
            if delta.timings is not None:
                self._metrics.on_choice_end(delta.timings, choice.num_tokens, first_choice=delta.sample == 0)
        return ChoiceDelta(
            index, first, text, delta.token_ids, delta.logprobs, offsets, choice.finish_reason, delta.stop
        )

    def _begin_prompt(self, number: int, delta: SequenceDelta, now: float) -> None:
        self._begun[number] = True
        self._num_cached += delta.num_cached_tokens
        self.prompt_logprobs[number] = delta.prompt_logprobs
        self._first_token = self._first_token or now
        metrics = self._metrics
        metrics.observe("time_to_first_token_seconds", now - self._started)
        metrics.count("prompt_tokens", len(self.job.prompts[number].token_ids))
        metrics.count("prompt_tokens_cached", delta.num_cached_tokens)

    def _detokenise(self, choice: _Choice, delta: SequenceDelta) -> tuple[str, list[int]]:
        """New text of a choice, and the offset of each new token if logprobs are asked for.

        A token that ended the sequence by itself (end of sequence, or one of `stop_token_ids`) is no text.
        """
        params = self.job.params
        output = choice.output
        parts: list[str] = []
        offsets: list[int] = []
        ended_by_token = delta.finish_reason == "stop" and not isinstance(delta.stop, str)
        num_shown = len(delta.token_ids)
        if ended_by_token and not params.include_stop_str_in_output:
            num_shown -= 1
        for token in delta.token_ids[:num_shown]:
            pushed = output.push(token)
            parts.append(pushed.text)
            if params.logprobs is not None:
                offsets.append(choice.base + pushed.offset)
        if params.logprobs is not None and num_shown < len(delta.token_ids):
            offsets.append(choice.base + output.num_chars)
        if delta.finish_reason is not None:
            parts.append(output.finish())
        return "".join(parts), offsets

    def _finish(self, outcome: str) -> None:
        """Account for the end, whatever it was: one log line per request."""
        now = time.monotonic()
        unfinished = "error" if outcome == "error" else "abort"
        for choice in self._choices:
            if choice.finish_reason is None:
                self._metrics.count_finished(unfinished)
        reasons = sorted({choice.finish_reason or unfinished for choice in self._choices})
        if outcome == "done":
            self._metrics.observe("e2e_request_latency_seconds", now - self._started)
        usage = self.usage
        log.info(
            "request %s x_request_id=%s model=%s tokens_in=%d tokens_out=%d tokens_cached=%d finish=%s "
            "first_token_ms=%s total_ms=%.1f",
            self.job.response_id,
            self.job.log_id,
            self.model,
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.prompt_tokens_details.cached_tokens,
            ",".join(reasons),
            f"{(self._first_token - self._started) * 1e3:.1f}" if self._first_token else "-",
            (now - self._started) * 1e3,
        )


@contextlib.asynccontextmanager
async def closing(
    stream: AsyncIterator[SequenceDelta],
) -> AsyncGenerator[AsyncIterator[SequenceDelta], None]:
    """Close the stream at once when its consumer leaves, which cancels the request."""
    try:
        yield stream
    finally:
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()


def join_deltas(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """The deltas of one choice, from its first to its last, as one."""
    last = deltas[-1]
    return ChoiceDelta(
        choice=last.choice,
        first=True,
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
        offsets=[offset for delta in deltas for offset in delta.offsets],
        finish_reason=last.finish_reason,
        stop=last.stop,
    )
