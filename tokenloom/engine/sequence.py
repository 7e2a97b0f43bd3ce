"""One stream of tokens of a request, its pages, and how much of its KV is computed."""

from __future__ import annotations

import enum
from collections.abc import Iterator

from tokenloom.engine.batch import PAGE_SIZE, Float32
from tokenloom.engine.pooling import Float64, add_rows, first_pooled, mean_bytes
from tokenloom.engine.prefix_cache import Digest
from tokenloom.engine.request import FinishReason, Request, StopChecker, TokenLogprobs


class State(enum.IntEnum):
    """Where a sequence is. A preempted sequence is WAITING again."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


class Sequence:
    """Committed tokens and the cache state that chases them.

    `tokens` are prompt and committed output. KV of tokens[:num_computed] needs no more work; KV of
    tokens[:num_stored] lies in `pages` (num_stored exceeds num_computed only on a full prefix hit, where the
    last row runs again for its logits). `row` is the sequence's row in the batch builder's table, -1 when it
    does not run. The pages are owned through the prefix cache's reference counts. Prompt rows from `num_pooled`
    on still go into the embedding, whose sum so far is `row_sum`. `num_drafted` counts the nodes of trees that were
    verified for it, `num_accepted` those that became tokens.
    """

    __slots__ = (
        "bad_word_ids",
        "chain",
        "checker",
        "finish_reason",
        "first_token_time",
        "index",
        "max_length",
        "min_length",
        "needs_edits",
        "num_accepted",
        "num_cached",
        "num_computed",
        "num_drafted",
        "num_pooled",
        "num_prompt",
        "num_registered",
        "num_scored",
        "num_stored",
        "output_counts",
        "pages",
        "prompt_logprobs",
        "request",
        "root",
        "row",
        "row_sum",
        "scheduled_time",
        "siblings",
        "state",
        "stop",
        "stop_ids",
        "tokens",
        "wants_logprobs",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        root: Digest,
        max_length: int,
        stop_ids: frozenset[int],
        checker: StopChecker | None,
    ) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.root = root
        self.tokens: list[int] = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.max_length = max_length
        self.min_length = self.num_prompt + params.min_tokens
        self.stop_ids = stop_ids
        self.checker = checker
        self.state = State.WAITING
        self.row = -1
        self.pages: list[int] = []
        self.chain: list[Digest] = []
        self.num_computed = 0
        self.num_stored = 0
        self.num_registered = 0
        self.num_scored = 0
        self.num_pooled = first_pooled(request.pooling, self.num_prompt)
        self.row_sum: Float64 | None = None
        self.num_cached = -1
        self.num_drafted = 0
        self.num_accepted = 0
        self.siblings: list[Sequence] = []
        self.bad_word_ids = request.bad_word_ids
        self.needs_edits = bool(
            params.has_penalties
            or params.logit_bias
            or params.allowed_token_ids is not None
            or params.min_tokens
            or request.bad_word_ids
        )
        self.wants_logprobs = params.logprobs is not None
        self.output_counts: dict[int, int] = {}
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if params.prompt_logprobs is not None else None
        self.finish_reason: FinishReason | None = None
        self.stop: str | int | None = None
        self.scheduled_time = -1.0
        self.first_token_time = -1.0

    def pending_runs(self) -> Iterator[tuple[int, int]]:
        """The (start, end) runs of tokens whose KV is still to be computed: one run today."""
        if self.num_computed < len(self.tokens):
            yield self.num_computed, len(self.tokens)

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def needs_all_rows(self) -> bool:
        """Whether something of rows before the last is still wanted, so that no cached page may stand for them."""
        unscored = self.prompt_logprobs is not None and self.num_scored < self.num_prompt - 1
        return unscored or self.num_pooled < self.num_prompt - 1

    def num_pages_missing(self, length: int) -> int:
        """Pages to allocate before the KV of tokens[:length] has room."""
        return (length + PAGE_SIZE - 1) // PAGE_SIZE - len(self.pages)

    def slot(self, place: int) -> int:
        """Where K and V of the token at index `place` lie."""
        return self.pages[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE

    def append(self, token: int) -> None:
        """Commit one output token."""
        self.tokens.append(token)
        if self.needs_edits:
            self.output_counts[token] = self.output_counts.get(token, 0) + 1

    def pool(self, rows: Float32) -> None:
        """Add the next hidden rows [R, W] of the prompt to the embedding."""
        self.row_sum = add_rows(self.row_sum, rows)
        self.num_pooled += len(rows)

    def embedding(self) -> bytes | None:
        """The pooled vector of a computed prompt, None where none was asked for."""
        if self.row_sum is None:
            return None
        return mean_bytes(self.row_sum, self.num_prompt - first_pooled(self.request.pooling, self.num_prompt))

    def fork(self, sibling: Sequence) -> list[int]:
        """Give `sibling` this sequence's committed prompt and its full pages; returns the shared pages.

        The caller takes the references and, where the last page is partly filled, gives the sibling its own
        copy: a page under a write cursor has one owner.
        """
        shared = self.pages[: self.num_computed // PAGE_SIZE]
        sibling.tokens = self.tokens[: self.num_computed]
        sibling.chain = self.chain[: len(shared)]
        sibling.pages = list(shared)
        sibling.num_computed = sibling.num_stored = self.num_computed
        sibling.num_registered = min(self.num_registered, len(shared))
        sibling.num_scored = self.num_scored
        sibling.num_cached = self.num_cached
        sibling.scheduled_time = self.scheduled_time
        return shared

    def truncate(self, length: int) -> list[int]:
        """Forget KV past tokens[:length]; returns the pages that are no longer needed (the caller releases)."""
        keep = (length + PAGE_SIZE - 1) // PAGE_SIZE
        dropped = self.pages[keep:]
        del self.pages[keep:]
        self.num_computed = min(self.num_computed, length)
        self.num_stored = min(self.num_stored, length)
        self.num_registered = min(self.num_registered, length // PAGE_SIZE)
        return dropped
