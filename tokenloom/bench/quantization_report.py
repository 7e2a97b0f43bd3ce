"""What rounding of the weights costs: two executors read the same text, and their next tokens are compared.

The text is cut into windows that are read on their own; at each position but the last of a window both models
give the whole distribution of the next token (teacher forcing: the text goes on as it is written, whatever
they say). Perplexity is exp(mean of -log p(next token)). The divergence is that of Kullback and Leibler (1951)
from the distribution of the first model to that of the second, in nats: 0 where they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from math import exp
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE, Executor, LogitRows, TokenBatch, Work
from tokenloom.errors import InvalidParameter
from tokenloom.models.loading import describe_model
from tokenloom.models.model_files import open_checkpoint
from tokenloom.models.weight_sources import resolve_weights, stored_bytes

ROWS: Final = 64
"""Positions whose distributions are held at once."""

WINDOW: Final = 512
"""Tokens of a window at most."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models over `num_tokens` predicted tokens; `quantized` is the second.

    `mean_kl` and `max_kl` in nats over the positions; `same_argmax` is the share of positions, from 0 to 1,
    where both find the same token likeliest.
    """

    num_tokens: int
    perplexity: float
    perplexity_quantized: float
    mean_kl: float
    max_kl: float
    same_argmax: float

    def as_dict(self) -> dict[str, Any]:
        """The numbers by name."""
        return asdict(self)


def held_out_text() -> str:
    """A few short stories that no model here was trained on."""
    return (resources.files("tokenloom.quantization") / "held_out_stories.txt").read_text("utf-8")


def weight_sizes(directory: Path, weights: str) -> tuple[int, int]:
    """Bytes of the weights as they are in the checkpoint, and in the format `weights`.

    Raises `ModelError` and `InvalidParameter` as `describe_model`.
    """
    program = describe_model(directory, weights=weights).program
    with open_checkpoint(directory) as checkpoint:
        chosen = resolve_weights(weights, checkpoint)
        return stored_bytes(program, checkpoint), stored_bytes(program, checkpoint, chosen)


def cut(token_ids: Sequence[int], window: int, num_tokens: int) -> list[list[int]]:
    """Windows of at most `window` tokens that together predict at most `num_tokens`; a last one of a single
    token, which predicts nothing, is left out. Raises `InvalidParameter` if nothing is left."""
    windows: list[list[int]] = []
    left = num_tokens
    for start in range(0, len(token_ids), window):
        tokens = list(token_ids[start : start + min(window, left + 1)])
        if len(tokens) > 1 and left > 0:
            windows.append(tokens)
            left -= len(tokens) - 1
    if not windows:
        raise InvalidParameter("text", f"{len(token_ids)} tokens", "a text of at least two tokens")
    return windows


def compare(
    original: Executor,
    quantized: Executor,
    windows: Sequence[Sequence[int]],
    vocab_size: int,
    on_scored: Callable[[int], None] | None = None,
) -> Comparison:
    """Read `windows` with both executors, whose first pages must be free and hold the longest window.

    `on_scored` hears how many tokens are done. At most `ROWS` distributions of each model are held at a time.
    """
    losses, rounded_losses, divergences = [], [], []
    same = done = 0
    for window in windows:
        first = next_token_logprobs(original, window, vocab_size)
        second = next_token_logprobs(quantized, window, vocab_size)
        for (wanted, p), (_, q) in zip(first, second, strict=True):
            rows = np.arange(len(wanted))
            losses.append(-p[rows, wanted])
            rounded_losses.append(-q[rows, wanted])
            divergences.append(_divergence(p, q))
            same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            done += len(wanted)
            if on_scored is not None:
                on_scored(done)
    divergence = np.concatenate(divergences)
    return Comparison(
        num_tokens=done,
        perplexity=exp(float(np.concatenate(losses).mean())),
        perplexity_quantized=exp(float(np.concatenate(rounded_losses).mean())),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        same_argmax=same / done,
    )


def next_token_logprobs(
    executor: Executor, token_ids: Sequence[int], vocab_size: int
) -> Iterator[tuple[NDArray[np.int32], Float64]]:
    """For each run of at most `ROWS` positions: the tokens that follow, int32 [n], and the log-probabilities of
    all tokens there, float64 [n, vocab_size]. The sequence takes the pages from 0 on."""
    tokens = np.asarray(token_ids, np.int32)
    for start in range(0, len(tokens) - 1, ROWS):
        batch = _batch(tokens, start, min(start + ROWS, len(tokens) - 1), vocab_size)
        result = executor.collect(executor.submit(batch))
        logprobs = np.full((batch.num_rows, vocab_size), -np.inf)
        for row, best in result.top.items():
            logprobs[row, best.token_ids] = best.logprobs
        yield batch.logit_rows.targets, logprobs


def _divergence(p: Float64, q: Float64) -> Float64:
    """KL(p || q) per row of log-probabilities. A token that p excludes adds nothing."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(p) * (p - q)
    terms[np.isneginf(p)] = 0
    result: Float64 = np.maximum(terms.sum(axis=1), 0)
    return result


def _batch(tokens: NDArray[np.int32], start: int, end: int, vocab_size: int) -> TokenBatch:
    """The rows [start, end) of the sequence, each scored against its next token."""
    count = end - start
    positions = np.arange(start, end, dtype=np.int32)
    return TokenBatch(
        token_ids=tokens[start:end],
        positions=positions,
        logical=positions,
        slots=positions.astype(np.int64),
        parents=np.full(count, -1, np.int32),
        starts=np.array([0, count], np.int32),
        context_lens=np.array([start], np.int32),
        page_tables=np.arange(-(-end // PAGE_SIZE), dtype=np.int32)[None],
        adapter_slots=np.full(1, -1, np.int32),
        work=np.array([Work.PREFILL], np.int8),
        logit_rows=LogitRows(
            rows=np.arange(count, dtype=np.int32),
            targets=tokens[start + 1 : end + 1],
            temperatures=np.zeros(count, np.float32),
            top_k=np.zeros(count, np.int32),
            top_p=np.ones(count, np.float32),
            min_p=np.zeros(count, np.float32),
            seeds=np.zeros(count, np.uint64),
            sample_index=np.zeros(count, np.uint32),
            positions=positions.astype(np.int64) + 1,
            num_logprobs=np.full(count, vocab_size, np.int32),
        ),
        page_copies=np.zeros((0, 2), np.int32),
    )
