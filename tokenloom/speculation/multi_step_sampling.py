"""Verification of a token tree by rejection: the law of the text is the target's, its tokens are not those of plain
decoding. For requests of the exactness class `distribution`.

Miao et al., "SpecInfer" (ASPLOS 2024), algorithm 2; for chains it is the speculative sampling of Leviathan et al.
(ICML 2023) and Chen et al. (2023). At a node with target law p, the draws below it are tried in turn:

```
try x, drawn from q:   accepted with probability min(1, p(x) / q(x)) → go on below x with the target law there
        else           p ← max(0, p - q), normalised; the next draw
no draw left:          emit a token from what p is now, and stop
```
This keeps the law because x is a draw from q, whatever was tried before it. So a draw must state the law that it
really had, and that is all there is to know about the three regimes (`Regime`). Children that were *chosen*, such as
the k best of a draft, are no draws from its softmax; to try them with that q biases the text.

What an engine has to provide:

- `target(node)`: the law that plain decoding samples from after the node's path, with temperature, penalties, bias,
  grammar mask, top-k, top-p and min-p of that path applied; and each draft's law with what changed it before it drew.
- Draws in the order in which they were drawn, repeats included. Whether there is another one may follow from draws
  before it, here and above, but none may be left out for its own sake or that of what lies below it. Where a budget
  drops children by their probability, those that stay are chosen, and are verified as `chosen`.
- Draws that do not depend on the numbers used here (`PhiloxCoins` with another purpose than `Purpose.ACCEPT`), nor
  on each other: drafts that draw below one node must not share their noise. Nodes beside each other may.
- Positions: the coins of the token at position i have the key (seed, sample index, i), so they are never used twice.

The walk says nothing of ends of text and limits of length; what comes after them is cut by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.token_tree import ROOT, Draws, Regime, TokenTree
from tokenloom.kernels.noise import Purpose, token_bits

Float64 = NDArray[np.float64]
Target = Callable[[int], NDArray[Any]]
"""Node (or `ROOT`) → probabilities [V] of the token after it, of any positive sum."""

_SEED_MASK = (1 << 64) - 1


class Trial(NamedTuple):
    """A child, and the probability that it is accepted if all before it were rejected."""

    node: int
    chance: float


class Verdict(NamedTuple):
    """Accepted nodes from below the root down, and the token that comes after them."""

    nodes: list[int]
    token: int


class Coins(Protocol):
    """Random numbers for the token at one position."""

    def flip(self, position: int, chance: float) -> bool:
        """True with probability `chance`, independent of all before."""

    def pick(self, position: int, law: Float64) -> int:
        """An index, with the probabilities `law` (sum 1)."""


class PhiloxCoins:
    """Coins of the positions first .. first + P - 1, at most `num_draws` for each: a function of seed, sample index,
    position, purpose and the number of the draw."""

    def __init__(
        self, seed: int, sample_index: int, first: int, num_positions: int, num_draws: int, purpose: Purpose
    ) -> None:
        positions = np.arange(first, first + num_positions)[:, None]
        words = token_bits(
            np.full((num_positions, 1), seed, np.uint64),
            np.full((num_positions, 1), sample_index, np.uint32),
            positions,
            np.arange(2 * num_draws)[None],
            purpose,
        ).astype(np.uint64)
        high, low = words[:, ::2] >> np.uint64(5), words[:, 1::2] >> np.uint64(6)
        self._uniforms = ((high << np.uint64(26)) | low).astype(np.float64) * 2.0**-53
        self._first = first
        self._used = [0] * num_positions

    def _uniform(self, position: int) -> float:
        row = position - self._first
        self._used[row] += 1
        return float(self._uniforms[row, self._used[row] - 1])

    def flip(self, position: int, chance: float) -> bool:
        return self._uniform(position) < chance

    def pick(self, position: int, law: Float64) -> int:
        below = np.cumsum(law)
        found = int(np.searchsorted(below, self._uniform(position) * below[-1], side="right"))
        # The product may round up to the whole sum; a token without probability is never taken.
        return found if found < len(law) else int(np.flatnonzero(law)[-1])


def trials(target: NDArray[Any], drafts: Seq[Draws], tokens: Seq[int]) -> tuple[list[Trial], Float64]:
    """The trials at one node and what is left of its law if all are rejected: float64 [V], sum 1.

    `tokens[node]` is the token of a node. With several drafts, those of the first are tried first. Raises ValueError
    for laws that are none, and for draws that their law cannot have given.
    """
    left = _normalised(target, "the target")
    found: list[Trial] = []
    for regime, nodes, law in drafts:
        if (law is None) != (regime == "chosen"):
            raise ValueError(f"draws of the regime {regime} {'without' if law is None else 'with'} a law")
        draft = None if law is None else _normalised(law, "a draft")
        if draft is not None and draft.shape != left.shape:
            raise ValueError(f"laws over {len(left)} and {len(draft)} tokens")
        for node in nodes:
            token = tokens[node]
            if draft is None:
                found.append(Trial(node, float(left[token])))
                left = _without(left, token)
                continue
            if not draft[token] > 0:
                raise ValueError(f"token {token} was drawn from a law that does not have it")
            found.append(Trial(node, min(1.0, float(left[token] / draft[token]))))
            left = _rest(np.maximum(left - draft, 0.0), left)
            if regime == "distinct":
                # A law without tokens left stays all zeros, and has no further draw.
                draft = draft.copy()
                draft[token] = 0.0
                draft /= draft.sum() or 1.0
    return found, left


def walk(
    tree: TokenTree, target: Target, drafts: Mapping[int, Seq[Draws]], position: int, coins: Coins
) -> Verdict:
    """Verify a tree: `drafts[node]` are the draws below a node (or `ROOT`), `position` is that of the token after the
    root. The target's law is asked for along the way down only. Raises ValueError as `trials` does."""
    accepted: list[int] = []
    node = ROOT
    while True:
        draws = drafts.get(node, ())
        for child in (child for draw in draws for child in draw.nodes):
            if not 0 <= child < len(tree) or tree.parents[child] != node:
                raise ValueError(f"node {child} is no child of node {node}")
        tried, left = trials(target(node), draws, tree.tokens)
        taken = next((child for child, chance in tried if coins.flip(position, chance)), None)
        if taken is None:
            return Verdict(accepted, coins.pick(position, left))
        accepted.append(taken)
        node = taken
        position += 1


def verify(
    tree: TokenTree,
    target: Target,
    drafts: Mapping[int, Seq[Draws]],
    *,
    seed: int,
    sample_index: int = 0,
    position: int,
) -> Verdict:
    """`walk` with the coins of (seed, sample index, position)."""
    most = max((sum(len(draw.nodes) for draw in draws) for draws in drafts.values()), default=0)
    depth = max(tree.depths(), default=0)
    coins = PhiloxCoins(seed, sample_index, position, depth + 1, most + 1, Purpose.ACCEPT)
    return walk(tree, target, drafts, position, coins)


def draw(law: NDArray[Any], count: int, regime: Regime, position: int, coins: Coins) -> list[int]:
    """Tokens from a draft's law [V] in the regimes that draw, in their order: `count`, or as many as it has."""
    if regime == "chosen":
        raise ValueError("chosen children are not drawn")
    left = _normalised(law, "a draft")
    if regime == "independent":
        return [coins.pick(position, left) for _ in range(count)]
    tokens: list[int] = []
    for _ in range(min(count, int(np.count_nonzero(left)))):
        tokens.append(coins.pick(position, left))
        left = _without(left, tokens[-1])
    return tokens


def draft_seed(seed: int, sample_index: int, position: int, drafter: int) -> int:
    """A seed of 64 bits for what `drafter` (below 2^32) draws for one step, whose next token stands at `position`."""
    one = np.ones(2, np.int64)
    high, low = token_bits(
        np.full(2, seed & _SEED_MASK, np.uint64),
        np.full(2, sample_index, np.uint32),
        position * one,
        2 * drafter + np.arange(2),
        Purpose.DRAFT,
    ).tolist()
    return int(high) << 32 | int(low)


def naive(
    target: NDArray[Any], children: Mapping[int, int], position: int, coins: Coins
) -> tuple[int, int | None]:
    """Naive sampling, for comparison: a token from the target's law, and its node if it is among the children (token
    → node). It keeps the law, too, but rejects more often (theorem 4.3 of the paper)."""
    token = coins.pick(position, _normalised(target, "the target"))
    return token, children.get(token)


def rejection(tried: Seq[Trial]) -> float:
    """The probability that all trials fail."""
    return float(np.prod([1.0 - chance for _, chance in tried]))


def _normalised(law: NDArray[Any], name: str) -> Float64:
    wide = np.asarray(law, np.float64)
    total = float(wide.sum())
    if wide.ndim != 1 or not (wide >= 0).all() or not 0 < total < np.inf:
        raise ValueError(f"{name} has no law: shape {wide.shape}, sum {total}")
    normalised: Float64 = wide / total
    return normalised


def _without(law: Float64, token: int) -> Float64:
    rest = law.copy()
    rest[token] = 0.0
    return _rest(rest, law)


def _rest(rest: Float64, law: Float64) -> Float64:
    """`rest` normalised. If nothing is left, the rejection before it has probability 0 but for rounding, and the law
    stays: whatever follows, no token gets probability that had none."""
    total = float(rest.sum())
    left: Float64 = rest / total if total > 0 else law
    return left
