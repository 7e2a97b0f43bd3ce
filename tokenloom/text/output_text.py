"""The text of one output sequence: detokenised, searched for stop strings, with the offset of every token.

The engine ends a sequence where its stop checker says so, and the API shows the text of `OutputText`. Both
run the same code on the same tokens, so they agree on the token and the string that stopped it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenloom.engine.request import StopChecker, StopCheckerFactory
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.text.detokenizer import IncrementalDetokenizer
from tokenloom.text.stop_matcher import StopMatcher
from tokenloom.text.tokenizer import Tokenizer


class OutputDelta(NamedTuple):
    """What one token added.

    `text` may be shown now. `stop` is the stop string that ended the text, or None. `offset` counts the
    characters of output text in front of the token's own text, whether shown or held back; tokens that share
    one character have the same offset (`logprobs.text_offset` of the completions API).
    """

    text: str
    stop: str | None
    offset: int


class OutputText:
    """Text of one sequence after `prompt_ids`.

    The text of the first `min_tokens` tokens is shown but not searched for stop strings. `num_chars` counts
    the characters of output text so far, including held-back ones.
    """

    __slots__ = ("_detokenizer", "_matcher", "_stopped", "_unsearched", "num_chars")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, skip_special_tokens)
        self._matcher = StopMatcher(stop, include_stop_str_in_output) if stop else None
        self._unsearched = min_tokens
        self._stopped: str | None = None
        self.num_chars = 0

    def push(self, token_id: int) -> OutputDelta:
        """Add one token. After a stop, more tokens add nothing and report the same stop."""
        offset = self.num_chars
        if self._stopped is not None:
            return OutputDelta("", self._stopped, offset)
        text = self._detokenizer.push(token_id)
        self.num_chars = offset + len(text)
        if self._matcher is None:
            return OutputDelta(text, None, offset)
        if self._unsearched > 0:
            self._unsearched -= 1
            return OutputDelta(text, None, offset)
        emit, self._stopped = self._matcher.push(text)
        return OutputDelta(emit, self._stopped, offset)

    def finish(self) -> str:
        """End the text for another reason than a stop string; returns what was held back.

        An incomplete last character becomes U+FFFD here. It is not searched for stop strings: the engine has
        ended the sequence by then.
        """
        if self._stopped is not None:
            return ""
        rest = self._detokenizer.flush()
        self.num_chars += len(rest)
        return rest if self._matcher is None else self._matcher.flush() + rest


class StopStringChecker:
    """The engine's view of an `OutputText`: only where it stops."""

    __slots__ = ("_output",)

    def __init__(self, output: OutputText) -> None:
        self._output = output

    def push(self, token_id: int) -> str | None:
        """Feed one committed token; the stop string that it completed, or None."""
        return self._output.push(token_id).stop


def output_text_of(tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> OutputText:
    """The `OutputText` of a request's sequence; the engine and the API both make theirs here."""
    return OutputText(
        tokenizer,
        prompt_ids,
        params.stop,
        params.include_stop_str_in_output,
        params.skip_special_tokens,
        params.min_tokens,
    )


def make_stop_checker(tokenizer: Tokenizer) -> StopCheckerFactory:
    """The engine's factory of stop checkers; it gives None for parameters without stop strings."""

    def make(prompt_token_ids: Sequence[int], params: SamplingParams) -> StopChecker | None:
        if not params.stop:
            return None
        return StopStringChecker(output_text_of(tokenizer, prompt_token_ids, params))

    return make


def token_offsets(
    tokenizer: Tokenizer, token_ids: Sequence[int], skip_special_tokens: bool = True
) -> list[int]:
    """Character offset of each token in the text of `token_ids` decoded as one, for echoed prompts."""
    output = OutputText(tokenizer, skip_special_tokens=skip_special_tokens)
    return [output.push(token_id).offset for token_id in token_ids]
