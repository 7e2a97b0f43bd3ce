"""A proposer that knows the text beforehand, and is right as often as it is told to be.

For measurements and tests: what speculation gains at a given acceptance, whatever a draft model would cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from hashlib import blake2b

from tokenloom.engine.proposer import Proposal, Wanted
from tokenloom.engine.sequence import Sequence


class ReplayProposer:
    """Proposes `texts[request id, sample]`, the whole output, corrupted.

    `shape` has the number of children of a node at each depth. At each place of a text the right token is the r-th
    of the children with probability `rates[r]`, and none of them with what is left to 1; this is drawn once for each
    place, by `seed`. Tokens below `vocab_size` stand for the wrong ones.
    """

    name = "replay"

    def __init__(
        self,
        texts: Mapping[tuple[str, int], Seq[int]],
        rates: Seq[float],
        vocab_size: int,
        *,
        shape: Seq[int] = (1,) * 7,
        seed: int = 0,
    ) -> None:
        if not 0 <= sum(rates) <= 1 + 1e-9 or min(rates) < 0:
            raise ValueError(f"rates {list(rates)} are no probabilities")
        self._texts = texts
        self._rates = list(rates)
        self._vocab_size = vocab_size
        self._shape = tuple(shape)
        self._seed = seed

    def propose(self, wanted: Seq[Wanted]) -> list[Proposal]:
        """One tree of `shape` for each, as far as the text goes."""
        return [self._tree(want) for want in wanted]

    def _tree(self, want: Wanted) -> Proposal:
        seq = want.seq
        text = self._texts[seq.request.request_id, seq.index]
        tree = Proposal()
        frontier = [(-1, True)]
        for depth, width in enumerate(self._shape[: want.max_depth]):
            place = seq.num_output + depth
            if place >= len(text):
                break
            right = self._right_rank(seq, place)
            level = []
            for parent, is_right in frontier:
                wrong = (text[place] + 1 + i for i in range(self._vocab_size - 1))
                for rank in range(width):
                    hit = is_right and rank == right
                    if len(tree.tokens) == want.max_nodes:
                        return tree
                    tree.tokens.append(text[place] if hit else next(wrong) % self._vocab_size)
                    tree.parents.append(parent)
                    tree.ranks.append(rank)
                    tree.confidences.append(self._rates[rank] if rank < len(self._rates) else 0.0)
                    level.append((len(tree.tokens) - 1, hit))
            frontier = level
        return tree

    def _right_rank(self, seq: Sequence, place: int) -> int:
        """The rank of the right token among the children at `place`; too high where none is right."""
        # A hash takes a seventh of the time that a seeded generator does, and what is proposed should cost nothing.
        name = f"{self._seed}/{seq.request.request_id}/{seq.index}/{place}"
        drawn = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64
        for rank, rate in enumerate(self._rates):
            drawn -= rate
            if drawn < 0:
                return rank
        return len(self._rates) + max(self._shape)

    def forget(self, seq: Sequence) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""
