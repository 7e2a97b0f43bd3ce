"""How well drafts foresee a target's text, from ranks alone (numpy).

A rank array belongs to one text of the target: int32 [tokens], entry t is the rank that the draft gives the target's
token t after the target's tokens before it, 0 for the draft's best. A tree's path is only followed while it is the
target's own text, so that these ranks say what every tree of the draft's best tokens would have had accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[np.int32]


def coverage(texts: Sequence[Ranks], k: int) -> float:
    """The share of all tokens that are among the draft's best `k`."""
    return float(np.mean(np.concatenate(texts) < k))


def union(*drafts: Sequence[Ranks]) -> list[Ranks]:
    """Per token the best rank that any of the drafts gives it: coverage of their ensemble with `k` tokens of each."""
    return [np.minimum.reduce(ranks) for ranks in zip(*drafts, strict=True)]


def accepted(ranks: Ranks, depth: int, width: int = 1) -> NDArray[np.int64]:
    """Tokens [tokens] that a tree rooted before each token has accepted.

    The tree has the draft's best `width` tokens below the root and a chain of its best tokens below each of these,
    `depth` tokens deep: `width * depth` nodes.
    """
    out = np.zeros(len(ranks), dtype=np.int64)
    path = np.ones(len(ranks), dtype=bool)
    for level in range(min(depth, len(ranks))):
        last = len(ranks) - level
        path = path[:last] & (ranks[level:] < (width if level == 0 else 1))
        out[:last] += path
    return out


def tokens_per_step(trees: Sequence[Sequence[NDArray[np.int64]]]) -> float:
    """Tokens per pass of the target, over all texts, if every step verifies one tree of each draft at once.

    `trees[d][i]` is what `accepted` says of draft d and text i; a step gives the longest accepted path and one token
    of the target itself. The end of a text cuts its last step.
    """
    tokens = steps = 0
    for found in zip(*trees, strict=True):
        longest = np.maximum.reduce(found)
        position = 0
        while position < len(longest):
            position += int(longest[position]) + 1
            steps += 1
        tokens += len(longest)
    return tokens / steps
