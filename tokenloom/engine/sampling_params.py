"""What a request may ask of the sampler, with the limits of every field in one place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tokenloom.errors import InvalidParameter

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 64
MAX_N = 128
MAX_BIAS = 4096
MAX_BAD_WORDS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; names and meanings as vLLM and the OpenAI API have them.

    `temperature` 0 is greedy. `top_k` 0 or -1 means no limit. `seed` None is replaced by a drawn seed at
    admission, so that a resumed request repeats itself. `logprobs` k returns the chosen token and the k best;
    `prompt_logprobs` the same for each prompt token. Logprobs are of the raw distribution, before penalties
    and temperature. Raises `InvalidParameter` naming the field, the value and the limit.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if isinstance(self.stop, str):
            set_(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            if value is None and name != "allowed_token_ids":
                set_(self, name, ())
            elif value is not None and not isinstance(value, tuple):
                if not isinstance(value, (list, set, frozenset)):
                    raise InvalidParameter(name, value, "a list")
                set_(self, name, tuple(value))
        if self.logit_bias is None:
            set_(self, "logit_bias", {})
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidParameter("logit_bias", self.logit_bias, "a map from token ids to numbers")
        set_(self, "logit_bias", {_as_token_id(k): v for k, v in self.logit_bias.items()})
        self._check_numbers()
        self._check_lists()

    def _check_numbers(self) -> None:
        for name, (kind, test, limit) in _LIMITS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            number = (int, float) if kind is float else (int,)
            if isinstance(value, bool) or not isinstance(value, number):
                raise InvalidParameter(name, value, limit)
            if (isinstance(value, float) and not math.isfinite(value)) or not test(value):
                raise InvalidParameter(name, value, limit)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameter(name, getattr(self, name), "true or false")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")

    def _check_lists(self) -> None:
        _check_items("stop", self.stop, str, MAX_STOP_STRINGS, "strings")
        _check_items("bad_words", self.bad_words, str, MAX_BAD_WORDS, "strings")
        _check_items("stop_token_ids", self.stop_token_ids, int, MAX_BIAS, "token ids")
        if self.allowed_token_ids is not None:
            _check_items("allowed_token_ids", self.allowed_token_ids, int, 1 << 20, "token ids")
            if not self.allowed_token_ids:
                raise InvalidParameter("allowed_token_ids", [], "a list with at least one token id")
        for text in (*self.stop, *self.bad_words):
            if not text or len(text) > MAX_STOP_CHARS:
                name = "stop" if text in self.stop else "bad_words"
                raise InvalidParameter(name, text, f"strings of 1 to {MAX_STOP_CHARS} characters")
        if len(self.logit_bias) > MAX_BIAS:
            raise InvalidParameter(
                "logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_BIAS} entries"
            )
        for value in self.logit_bias.values():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
                raise InvalidParameter("logit_bias", value, "numbers from -100 to 100")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `InvalidParameter` if a token id named by a field lies outside [0, vocab_size)."""
        named: dict[str, Any] = {
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in named.items():
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise InvalidParameter(name, token, f"token ids from 0 to {vocab_size - 1}")

    def with_seed(self, seed: int) -> SamplingParams:
        """The same parameters with `seed` fixed."""
        return replace(self, seed=seed)

    @property
    def has_penalties(self) -> bool:
        """Whether the sampler needs the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _as_token_id(key: object) -> int:
    """JSON objects have string keys, so "42" stands for token 42."""
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    if isinstance(key, str) and re.fullmatch("-?[0-9]{1,10}", key):
        return int(key)
    raise InvalidParameter("logit_bias", key, "a map whose keys are token ids")


def _check_items(name: str, items: tuple[Any, ...], kind: type, most: int, what: str) -> None:
    if len(items) > most:
        raise InvalidParameter(name, f"{len(items)} entries", f"at most {most} {what}")
    for item in items:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise InvalidParameter(name, item, f"a list of {what}")


_INT32 = (1 << 31) - 1
_OPTIONAL = frozenset({"max_tokens", "seed", "logprobs", "prompt_logprobs"})
_LIMITS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "n": (int, lambda v: 1 <= v <= MAX_N, f"an integer from 1 to {MAX_N}"),
    "temperature": (float, lambda v: 0 <= v <= 100, "a number from 0 to 100"),
    "top_p": (float, lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    "top_k": (int, lambda v: -1 <= v < 1 << 31, f"an integer from -1 to {_INT32}"),
    "min_p": (float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": (float, lambda v: 0.01 <= v <= 100, "a number from 0.01 to 100"),
    "presence_penalty": (float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "frequency_penalty": (float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "min_tokens": (int, lambda v: 0 <= v < 1 << 31, f"an integer from 0 to {_INT32}"),
    "max_tokens": (int, lambda v: 0 <= v < 1 << 31, f"an integer from 0 to {_INT32}"),
    "seed": (int, lambda v: -(1 << 63) <= v < 1 << 64, "a 64-bit integer"),
    "logprobs": (int, lambda v: 0 <= v <= MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}"),
    "prompt_logprobs": (int, lambda v: 0 <= v <= MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}"),
}
