"""Token rows for training: chat and plain documents, packed whole into rows of fixed length."""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from .pairs import FINISH_RATES, POLISH_RATES, Document, PairRates, build_document
from .tokenizer import ASSISTANT, BOS, END, PAD, ROLE_IDS

WEIGHT_ONE = 10
WEIGHT_MARK = 40
PENDING = 96
LEAST_PREFIX = 40

Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class DataPlan:
    """What the training rows are made of."""

    seed: int = 1
    real_epochs: int = 5
    sampled_epochs: int = 4
    finish_real_epochs: int = 2
    finish_sampled_epochs: int = 1
    polish_real_epochs: int = 2
    polish_sampled_epochs: int = 1
    short_row: int = 512
    long_row: int = 1024
    long_share: float = 0.3


def encode_document(document: Document, tokenizer: Tokenizer) -> Row:
    """Token ids, and for every id its weight as a prediction target, in tenths.

    Only text of the assistant (and of plain documents) and its end mark count; the first token sequence of
    every marked word counts ``WEIGHT_MARK``.
    """
    ids, weights = [BOS], [0]
    for turn in document:
        encoding = tokenizer.encode(turn.text, add_special_tokens=False)
        counts = turn.role in ("assistant", "text")
        if turn.role in ROLE_IDS:
            ids.append(ROLE_IDS[turn.role])
            weights.append(0)
        ids += encoding.ids
        piece = [WEIGHT_ONE if counts else 0] * len(encoding.ids)
        for start, end in turn.marks if counts else ():
            for index, (left, right) in enumerate(encoding.offsets):
                if left < end and right > start:
                    piece[index] = WEIGHT_MARK
        weights += piece
        ids.append(END)
        weights.append(WEIGHT_ONE if counts else 0)
    return ids, weights


def pack(rows: Iterable[Row], length: int) -> Iterator[Row]:
    """Fill rows of ``length`` ids with documents (best fit among ``PENDING`` waiting ones).

    Every document starts in its row. Room of ``LEAST_PREFIX`` ids or more that no whole document fits takes
    the beginning of one; less room becomes padding of weight 0. The rest of a cut document is dropped.
    """
    pending: list[tuple[int, int, Row]] = []

    def fill() -> Row:
        ids, weights = [], []
        first = min(range(len(pending)), key=lambda i: pending[i][1])  # the one that waits longest
        _, _, row = pending.pop(first)
        while True:
            ids += row[0]
            weights += row[1]
            fit = bisect_left(pending, (length - len(ids) + 1,)) - 1
            if fit < 0 and pending and length - len(ids) >= LEAST_PREFIX:
                fit = min(range(len(pending)), key=lambda i: pending[i][1])
            if fit < 0:
                break
            _, _, row = pending.pop(fit)
        ids, weights = ids[:length], weights[:length]
        spare = length - len(ids)
        return ids + [PAD] * spare, weights + [0] * spare

    for serial, (ids, weights) in enumerate(rows):
        item = (min(len(ids), length), serial, (ids[:length], weights[:length]))
        pending.insert(bisect_left(pending, item), item)
        if len(pending) >= PENDING:
            yield fill()
    while pending:
        yield fill()


def groups(rows: list[Row], tokens: int, rng: random.Random) -> list[list[int]]:
    """The rows' numbers, each once, in shuffled groups of like lengths that hold ``tokens`` ids at most when padded."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]) + rng.random() * 16, i))
    out: list[list[int]] = []
    for index in order:
        longest = len(rows[index][0])
        if out and (len(out[-1]) + 1) * max(longest, *(len(rows[i][0]) for i in out[-1])) <= tokens:
            out[-1].append(index)
        else:
            out.append([index])
    rng.shuffle(out)
    return out


def padded(rows: list[Row], group: list[int]) -> tuple[Tensor, Tensor]:
    """(ids, weights) [B, T] of the rows of ``group``, with padding of weight 0 at their ends."""
    longest = max(len(rows[i][0]) for i in group)
    ids = torch.full((len(group), longest), PAD)
    weights = torch.zeros((len(group), longest), dtype=torch.long)
    for place, index in enumerate(group):
        row = rows[index]
        ids[place, : len(row[0])] = torch.tensor(row[0])
        weights[place, : len(row[0])] = torch.tensor(row[1])
    return ids, weights


def documents(
    real: list[str],
    sampled: list[str],
    nouns: list[str],
    seed: int,
    epochs: tuple[int, int],
    rates: PairRates | None = None,
) -> Iterator[Document]:
    """All documents of ``epochs`` (real, sampled), shuffled; the request differs from epoch to epoch."""
    order = [(0, epoch, i) for epoch in range(epochs[0]) for i in range(len(real))]
    order += [(1, epoch, i) for epoch in range(epochs[1]) for i in range(len(sampled))]
    random.Random(seed).shuffle(order)
    known, sources = frozenset(nouns), (real, sampled)
    for kind, epoch, index in order:
        rng = random.Random(f"pair-{seed}-{kind}-{epoch}-{index}")
        stories = sources[kind]
        yield build_document(stories[index], rng.choice(stories), known, nouns, rates or PairRates(), rng)


class Rows:
    """Packed rows on disk: ids (uint16) and weights (uint8), one row of the file per training row."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ids: NDArray[np.uint16] = np.load(folder / f"{name}.ids.npy", mmap_mode="r")
        self.weights: NDArray[np.uint8] = np.load(folder / f"{name}.weights.npy", mmap_mode="r")

    def batch(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Rows ``first`` .. ``first + count`` modulo the number of rows: a function of its arguments."""
        index = np.arange(first, first + count) % len(self.ids)
        return self.ids[index].astype(np.int64), self.weights[index]


def _save(folder: Path, name: str, rows: list[Row]) -> None:
    for suffix, values, kind in (
        ("ids", [r[0] for r in rows], np.uint16),
        ("weights", [r[1] for r in rows], np.uint8),
    ):
        part = folder / f"{name}.{suffix}.part.npy"
        np.save(part, np.array(values, dtype=kind))
        part.replace(folder / f"{name}.{suffix}.npy")


def _save_polish(
    real: list[str], sampled: list[str], nouns: list[str], tokenizer: Tokenizer, plan: DataPlan, folder: Path
) -> None:
    epochs = (plan.polish_real_epochs, plan.polish_sampled_epochs)
    last = documents(real, sampled, nouns, plan.seed + 3, epochs, POLISH_RATES)
    _save(folder, "polish", list(pack((encode_document(d, tokenizer) for d in last), plan.short_row + 1)))


def build(
    real: list[str],
    sampled: list[str],
    held_out: list[str],
    nouns: list[str],
    tokenizer: Tokenizer,
    plan: DataPlan,
    folder: Path,
) -> dict[str, object]:
    """Write the rows ``main``, ``finish``, ``long`` and ``held_out``, and ``data.json``; return the latter.

    A row of ``short_row + 1`` ids gives inputs and shifted targets; those of ``long`` hold ``long_row + 1``.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def encoded(stories: tuple[list[str], list[str]], seed: int, epochs: tuple[int, int],
                rates: PairRates | None = None) -> list[Row]:  # fmt: skip
        return [encode_document(d, tokenizer) for d in documents(*stories, nouns, seed, epochs, rates)]

    main = encoded((real, sampled), plan.seed, (plan.real_epochs, plan.sampled_epochs))
    _save(folder, "main", list(pack(main, plan.short_row + 1)))
    late = encoded((real, sampled), plan.seed + 2, (plan.finish_real_epochs, plan.finish_sampled_epochs),
                   FINISH_RATES)  # fmt: skip
    cut = int(len(late) * (1 - plan.long_share))
    _save(folder, "finish", list(pack(late[:cut], plan.short_row + 1)))
    _save(folder, "long", list(pack(late[cut:], plan.long_row + 1)))
    _save_polish(real, sampled, nouns, tokenizer, plan, folder)
    held = encoded((held_out, []), plan.seed + 1, (1, 0))
    _save(folder, "held_out", list(pack(held, plan.short_row + 1)))
    facts: dict[str, object] = {
        "plan": asdict(plan),
        "real_stories": len(real),
        "sampled_stories": len(sampled),
        "held_out_stories": len(held_out),
        "nouns": len(nouns),
        "documents": len(main),
        "chat_documents": sum(ASSISTANT in ids for ids, _ in main),
        "tokens": sum(len(ids) for ids, _ in main),
        "finish_documents": len(late),
        "finish_tokens": sum(len(ids) for ids, _ in late),
        "rows": {
            name: len(Rows(folder, name).ids) for name in ("main", "finish", "long", "polish", "held_out")
        },
        "real_tokens": sum(len(e.ids) for e in tokenizer.encode_batch(real, add_special_tokens=False)),
        "sampled_tokens": sum(len(e.ids) for e in tokenizer.encode_batch(sampled, add_special_tokens=False)),
    }
    (folder / "data.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts
