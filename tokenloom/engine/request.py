"""What a client asked, in the form that the engine takes it, and what the engine answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple, Protocol

from tokenloom.engine.sampling_params import SamplingParams

Exactness = Literal["exact", "distribution"]
Pooling = Literal["mean", "last"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


class Slo(NamedTuple):
    """What a request is promised, in seconds (inf: nothing): `tpot` per output token after the first, on average,
    and `ttft` to the first one."""

    tpot: float = inf
    ttft: float = inf


NO_SLO = Slo()


@dataclass(slots=True, kw_only=True)
class Request:
    """One request after validation and tokenisation.

    `priority`: lower is more urgent (as in vLLM). `tenant` salts the prefix cache: requests of different tenants
    never share pages. `adapter` is the content hash of the adapter ("" for the base). `bad_word_ids` are the
    token sequences that `params.bad_words` stand for. With `pooling` the request asks for the embedding of its
    prompt: `params` have `max_tokens` 0.
    `slo` decides its pace, never its output. `arrival` is in the engine clock's seconds (-1: set when the engine
    takes it).
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    tenant: str = ""
    adapter: str = ""
    exactness: Exactness = "exact"
    program_id: str = ""
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    pooling: Pooling | None = None
    slo: Slo = NO_SLO
    arrival: float = -1.0

    @property
    def is_judged(self) -> bool:
        """Whether trees for it are verified by rejection; a greedy text has but one law and needs none."""
        return self.exactness == "distribution" and self.params.temperature > 0


class TokenLogprobs(NamedTuple):
    """Logprobs of one position: the chosen (or given) token, its logprob and rank (from 1), and the best
    tokens as (token id, logprob) in falling order."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class RequestTimings(NamedTuple):
    """Times of a request in engine-clock seconds; -1 where it did not get that far."""

    arrival: float
    scheduled: float
    first_token: float
    finished: float


class SequenceDelta(NamedTuple):
    """What one step added to one sequence of a request.

    `sample` is the sample number in [0, n). `logprobs` is parallel to `token_ids` where asked, else empty.
    `prompt_logprobs` (for prompt tokens 1..P-1) comes once, with the first delta. `stop` is the stop string or
    stop token id that ended the sequence. The last delta of a sequence has a `finish_reason`, and `last`
    marks the last delta of the whole request. `embedding` comes with the last delta of a request with
    `pooling`: float32 [width of the model], little-endian, not normalised. `num_drafted` and `num_accepted` are of
    the sequence so far: guessed tokens that were verified, and those that came true.
    """

    request_id: str
    sample: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None
    stop: str | int | None
    prompt_logprobs: list[TokenLogprobs] | None
    num_cached_tokens: int
    last: bool
    timings: RequestTimings | None
    embedding: bytes | None = None
    num_drafted: int = 0
    num_accepted: int = 0


class StopChecker(Protocol):
    """Watches one sequence's text for stop strings; the text layer implements it.

    Text of the first `min_tokens` tokens is not searched.
    """

    def push(self, token_id: int) -> str | None:
        """Feed one committed token; the stop string that it completed, or None."""


class StopCheckerFactory(Protocol):
    """Makes the checker of a sequence, or None when its parameters have no stop strings."""

    def __call__(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> StopChecker | None: ...


def no_stop_strings(prompt_token_ids: Sequence[int], params: SamplingParams) -> StopChecker | None:
    """The factory of engines without a tokenizer; stop strings never match."""
    return None
