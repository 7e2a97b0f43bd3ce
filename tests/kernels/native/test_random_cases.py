"""More than ten thousand random rows of the native executor, each `==` to the same row in plain order.

A case is one row of a random step: its token, logprobs, ranks and best tokens have the bits that its text
gives alone. Steps mix prompt chunks, next tokens, rows that are read again and token trees of several texts,
on pages that move, with logits asked of random rows only.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.random import Generator

from tests.kernels import harness
from tests.kernels.harness import NATIVE, Answer, Entry, Numerics, Run, each_numerics
from tests.kernels.native import test_attention as attention
from tests.kernels.native import test_linear as linear
from tokenloom.engine.batch import PAGE_SIZE, TokenBatch, Work
from tokenloom.kernels import spec
from tokenloom.kernels.program import SPLIT, Attention, Program
from tokenloom.models.config import ExpertsConfig, ModelConfig
from tokenloom.models.llama import build
from tokenloom.runtime.local import LocalExecutor

_native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native module is not built")

ISAS = _native.isas()
MOST_ROWS = 67
LENGTHS = (450, 290, 140, 60, 20)
STREAMS = (0, 1, 2, 3, 4, 2)  # texts that advance together; one of them twice, on pages of its own
TREES = (
    (0, 0), (0, 60), (0, 118), (0, 125), (0, 250), (0, 375), (1, 110), (1, 245), (2, 90), (2, 121), (3, 30),
)  # fmt: skip
"""(text, committed tokens before the tree)"""
WINDOWS = (20, 150)  # of the two layers, where there are windows
PROMISED = {
    "all": 4000, "two splits": 750, "beyond both windows": 400, "tree": 1300, "tree across splits": 180,
    "40 ancestors": 60, "rows dropped": 1600, "after dropped rows": 3600, "not stored": 40, "logits": 550,
    "refused": 230,
}  # fmt: skip
"""The least cases of each kind in each test of a model: formats x windows x instruction sets tests."""


@dataclass(frozen=True)
class Tree:
    """Path (all tokens) and parent of each node after `context` tokens; the first `right` are the text."""

    text: int
    context: int
    paths: list[bytes]
    parents: list[int]
    right: int


@functools.cache
def texts() -> list[bytes]:
    rng = np.random.default_rng(5)
    return [bytes(rng.integers(0, 101, length).tolist()) for length in LENGTHS]


@functools.cache
def trees() -> list[Tree]:
    """The first is the deepest; others cross the end of a split where their context ends before one."""
    rng, text = np.random.default_rng(6), texts()[0]
    found = [Tree(0, 100, [text[: i + 1] for i in range(100, 165)], list(range(-1, 64)), 65)]
    for i, context in TREES:
        text, right = texts()[i], int(rng.integers(4, 13))
        paths, parents = [text[: context + j + 1] for j in range(right)], list(range(-1, right - 1))
        for node in range(right, right + int(rng.integers(4, 13))):
            parent = int(rng.integers(node - 4, node))
            # The page table of the text must reach.
            parents.append(parent if len(paths[parent]) < len(text) else -1)
            above = paths[parents[-1]] if parents[-1] >= 0 else text[:context]
            paths.append(above + bytes([int(rng.integers(101))]))
        found.append(Tree(i, context, paths, parents, right))
    return found


def make(numerics: Numerics, windows: bool, threads: int) -> LocalExecutor:
    def windowed(config: ModelConfig) -> Program:
        ops = build(config).ops
        ops = tuple(replace(op, window=WINDOWS[op.layer]) if isinstance(op, Attention) else op for op in ops)
        return replace(build(config), ops=ops)

    # The first layer has an MLP, the second one experts.
    experts = ExpertsConfig(count=9, top_k=3, width=20, normalized=False, dense_layers=frozenset({0}))
    with pytest.MonkeyPatch.context() as patch:
        if windows:  # which no field of the configuration says
            patch.setattr(harness, "build", windowed)
        return harness.make_executor(harness.small_config(experts=experts), numerics, num_threads=threads)


def pair(row: int, path: bytes) -> list[Entry]:
    """An entry that scores a token and one that draws: functions of the path alone."""
    temperature, top_k, min_p = ((0.0, 0, 0.0), (1.0, 0, 0.0), (0.7, 20, 0.0), (1.3, 0, 0.05))[len(path) % 4]
    drawn = Entry(row, -1, temperature, top_k, 1.0, min_p, seed=9, position=len(path), num_logprobs=0)
    return [Entry(row, target=(path[-1] * 7 + 3) % 101, num_logprobs=4), drawn]


Expected = dict[bytes, tuple[Answer, bytes]]  # answer and logits by path: all tokens up to the row


@functools.cache
def expected(numerics: Numerics, windows: bool) -> Expected:
    """Each text in one run; each path of a tree after its text, as one run or token by token."""
    runner, known = make(numerics, windows, threads=1), Expected()

    def feed(text: bytes, start: int, end: int) -> None:
        run = Run(list(text), start, end, range(1, len(text) // PAGE_SIZE + 2))
        paths = [text[: i + 1] for i in range(start, end)]
        entries = [entry for row, path in enumerate(paths) for entry in pair(row, path)]
        found = harness.answers(harness.step(runner, harness.make_batch([run], entries)))
        logits = runner.backend.logits(np.arange(len(paths), dtype=np.int32))
        known.update(zip(paths, zip(found, [row.tobytes() for row in logits], strict=True), strict=True))

    for i, text in enumerate(texts()):
        feed(text, 0, len(text))
        # The longest context first: a path overwrites the text from its context on.
        for tree in sorted((t for t in trees() if t.text == i), key=lambda t: -t.context):
            for leaf in set(range(len(tree.parents))) - set(tree.parents):
                path, size = tree.paths[leaf], len(text) if leaf % 2 else 1
                for start in range(tree.context, len(path), size):
                    feed(path, start, min(start + size, len(path)))
    return known


@dataclass
class Stream:
    """A text on its pages, `done` tokens of which are stored, some perhaps by a step that dropped rows."""

    text: int
    table: list[int]
    done: int = 0
    after_cut: bool = False

    def left(self) -> int:
        return LENGTHS[self.text] - self.done

    def slots(self, start: int, end: int) -> list[int]:
        return [self.table[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(start, end)]


@dataclass
class Piece:
    """One segment: path, slot and parent (in the segment) of each row; `advance` of them are kept."""

    stream: Stream
    context: int
    paths: list[bytes]
    slots: list[int]
    parents: list[int]
    advance: int
    is_tree: bool = False


def plain(stream: Stream, size: int) -> Piece:
    """The next `size` tokens; 0: the last row again, which reads its own key from the page."""
    start = stream.done if size else stream.done - 1
    paths = [texts()[stream.text][: i + 1] for i in range(start, stream.done + size)]
    return Piece(stream, start, paths, stream.slots(start, start + size) or [-1], [-1] * len(paths), size)


def verify(stream: Stream, tree: Tree, scratch: list[int]) -> Piece:
    """The tree in scratch slots. If its context is all there is, its right nodes lie in place, and stay."""
    keep = tree.right if tree.context == stream.done else 0
    slots = stream.slots(stream.done, stream.done + keep) + [scratch.pop() for _ in tree.paths[keep:]]
    return Piece(stream, tree.context, tree.paths, slots, tree.parents, keep, is_tree=True)


def pieces(rng: Generator, streams: list[Stream], free: list[int], rows: int) -> list[Piece]:
    """Segments of `rows` rows, or of as many as there are."""
    found: list[Piece] = []
    scratch = rng.permutation([page * PAGE_SIZE + i for page in free for i in range(PAGE_SIZE)]).tolist()
    order, deepest = rng.permutation(len(streams)).tolist(), trees()[0]
    if rows >= len(deepest.paths):  # its stream comes first
        order.sort(key=lambda i: streams[i].text != deepest.text)
    for stream in (streams[i] for i in order):
        mine = [t for t in trees() if t.text == stream.text]
        ready = [t for t in mine if t.context <= stream.done and len(t.paths) <= rows]
        best = [deepest] if deepest in ready else [t for t in ready if t.context == stream.done] or ready
        if not rows:
            break
        if best and (best == [deepest] or rng.random() < 0.5):
            piece = verify(stream, best[int(rng.integers(len(best)))], scratch)
        else:
            stops = [t.context - stream.done for t in mine if t.context > stream.done and rng.random() < 0.7]
            size = min(rows, stream.left(), int(rng.choice([1, 2, 9, 67])), *stops)
            piece = plain(stream, 0 if stream.done and rng.random() < 0.1 else size)
        found.append(piece)
        rows -= len(piece.paths)
    for i, piece in enumerate(found):
        more = min(rows, piece.stream.left() - piece.advance)
        if piece.advance and not piece.is_tree:
            found[i], rows = plain(piece.stream, piece.advance + more), rows - more
    return found


def compose(found: list[Piece], asked: list[int], copies: list[tuple[int, int]]) -> TokenBatch:
    starts = np.cumsum([0, *(len(piece.paths) for piece in found)]).tolist()
    paths = [path for piece in found for path in piece.paths]
    logical = np.array([len(path) - 1 for path in paths], np.int32)
    tables = [(piece.stream.table + [0] * 30)[:30] for piece in found]
    parents = [p + starts[i] if p >= 0 else -1 for i, piece in enumerate(found) for p in piece.parents]
    batch = TokenBatch(
        token_ids=np.array([path[-1] for path in paths], np.int32), positions=logical, logical=logical.copy(),
        slots=np.array([slot for piece in found for slot in piece.slots], np.int64),
        parents=np.array(parents, np.int32), starts=np.array(starts, np.int32),
        context_lens=np.array([piece.context for piece in found], np.int32),
        page_tables=np.array(tables, np.int32), adapter_slots=np.full(len(found), -1, np.int32),
        work=np.array([Work.VERIFY if piece.is_tree else Work.PREFILL for piece in found], np.int8),
        logit_rows=harness.logit_rows([entry for row in asked for entry in pair(row, paths[row])]),
        page_copies=np.array(copies, np.int32).reshape(-1, 2),
    )  # fmt: skip
    batch.check()
    return batch


def steps(rng: Generator, rounds: int) -> Iterator[tuple[list[Piece], list[tuple[int, int]]]]:
    """Segments and page copies of random steps, until every number of rows has come `rounds` times."""
    seen, free = Counter[int](), rng.permutation(np.arange(1, 96)).tolist()
    streams = [Stream(text, [free.pop() for _ in range(LENGTHS[text] // PAGE_SIZE + 1)]) for text in STREAMS]
    while missing := [n for n in range(1, MOST_ROWS + 1) if seen[n] < rounds]:
        for stream in streams:
            if not stream.left() and rng.random() < 0.5:
                free += stream.table
                rng.shuffle(free)
                stream.table, stream.done, stream.after_cut = [free.pop() for _ in stream.table], 0, False
        copies, moved = [], streams[int(rng.integers(len(streams)))]
        if moved.done and rng.random() < 0.5:
            index = int(rng.integers(moved.done)) // PAGE_SIZE
            copies.append((moved.table[index], free[-1]))
            moved.table[index], free[-1] = free[-1], moved.table[index]
        found = pieces(rng, streams, free, int(rng.choice(missing)))
        seen[sum(len(piece.paths) for piece in found)] += 1
        yield found, copies
        for piece in found:
            piece.stream.done += piece.advance


Plant = Callable[[TokenBatch], int]
Cases = Counter[str | int]  # cases by what they show, and steps by their number of rows


def compare(
    runner: LocalExecutor, known: Expected, seed: list[int], rounds: int, plant: Plant | None = None
) -> tuple[Cases, list[tuple[Answer, Answer]]]:
    """Random steps on `runner`, each row that is asked compared with itself alone: cases, and (found,
    expected) where they differ. Rows that asked for no logits have none, but trees stay whole."""
    rng, cases, wrong = np.random.default_rng(seed), Cases(), []
    for found, copies in steps(rng, rounds):
        owners = [(piece, path) for piece in found for path in piece.paths]
        shares = rng.choice([0.0, 0.1, 0.6, 1.0], len(found)) if rng.random() < 0.7 else [1.0] * len(found)
        wanted = np.repeat(shares, [len(piece.paths) for piece in found]) > rng.random(len(owners))
        asked = rng.permutation(np.flatnonzero(wanted)).tolist()
        dropped = [i for i, (piece, _) in enumerate(owners) if not (piece.is_tree or wanted[i])]
        batch = compose(found, asked, copies)
        cases.update({batch.num_rows: 1, "planted": plant(batch) if plant else 0})
        for row, answer in zip(asked, harness.answers(harness.step(runner, batch)), strict=True):
            piece, path = owners[row]
            cases.update(kinds(piece, path, bool(dropped)))
            if answer != known[path][0]:
                wrong.append((answer, known[path][0]))
            if not plant and row in asked[:3]:
                assert runner.backend.logits(np.array([row], np.int32)).tobytes() == known[path][1]
                cases["logits"] += 1
        for row in dropped[-2:]:
            with pytest.raises(ValueError, match=f"row {row},"):
                runner.backend.logits(np.array([*asked[:1], row], np.int32))
            cases["refused"] += 1
        for piece in found:
            piece.stream.after_cut |= bool(piece.advance and dropped)
    return cases, wrong


def kinds(piece: Piece, path: bytes, dropped: bool) -> list[str]:
    """What a row is a case of."""
    last = len(path) - 1
    is_kind = {
        "all": True, "two splits": last >= SPLIT, "beyond both windows": last >= max(WINDOWS),
        "tree": piece.is_tree, "not stored": piece.slots[0] < 0,
        "tree across splits": piece.is_tree and last // SPLIT * SPLIT > piece.context,
        "40 ancestors": piece.is_tree and last - piece.context >= 40,
        "rows dropped": dropped, "after dropped rows": piece.stream.after_cut,
    }  # fmt: skip
    return [kind for kind, holds in is_kind.items() if holds]


@each_numerics(*NATIVE)
@pytest.mark.parametrize("windows", [False, True], ids=["full", "windows"])
@pytest.mark.parametrize("isa", ISAS)
def test_random_steps(numerics: Numerics, windows: bool, isa: str) -> None:
    """On one and two threads; what is expected comes from the best instruction set on one thread."""
    cases = Cases()
    for threads in (1, 2):
        runner, rounds = make(replace(numerics, isa=isa), windows, threads), 2 if isa == "portable" else 3
        seed = [*isa.encode(), windows, threads, NATIVE.index(numerics)]
        found, wrong = compare(runner, expected(numerics, windows), seed, rounds)
        assert not wrong
        assert all(found[rows] >= rounds for rows in range(1, MOST_ROWS + 1))
        cases += found
    assert not {kind: cases[kind] for kind, least in PROMISED.items() if cases[kind] < least}


def test_the_cases_are_ten_thousand_and_windows_hide_keys() -> None:
    """Even where there is no instruction set but the portable one."""
    assert len(NATIVE) * 2 * PROMISED["all"] >= 10_000
    full, windowed = expected(NATIVE[0], False), expected(NATIVE[0], True)
    assert all((full[path] == windowed[path]) == (len(path) <= min(WINDOWS)) for path in full)


@pytest.mark.parametrize("seed", range(10))
def test_attention_is_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kv_heads, dim = int(rng.integers(1, 4)), 8 * int(rng.integers(1, 17))
    heads, window = kv_heads * int(rng.integers(1, 9)), int(rng.integers(1, 200)) if seed % 2 else 0
    pages = attention.Pages(attention.FORMATS[seed % 3], kv_heads, dim, 120, seed)
    case = attention.make_case(attention.random_segments(rng), pages, seed)
    query = attention.queries(case, heads, dim, seed)
    out = case.run(pages, query, 0.3, window)
    attention.check_oracle(pages, case, query, out, heads, 0.3, window, count=10)
    assert {case.run(pages, query, 0.3, window, 2, isa).tobytes() for isa in ISAS} == {out.tobytes()}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["f32", "bf16", "i8", "i4"])
def test_products_are_the_oracle(name: str, seed: int) -> None:
    rng, group = np.random.default_rng(seed), 32 if name == "i4" else 0
    rows, depth, columns = (int(rng.integers(5, most)) for most in (MOST_ROWS + 1, 200, 130))
    x, weight = (linear.widen(linear.bf16(linear.numbers(rng, n, depth))) for n in (rows, columns))
    chosen = rng.permutation(rows)[:5]
    if name in ("i8", "i4"):
        oracle = linear.quantized(weight, name, group)[1]
        products = np.stack([oracle(*spec.quantize_row(row)) for row in x[chosen]])
    else:
        products = linear.product(x[chosen], weight, name)
    for isa in ISAS:
        out = np.full((rows, columns), np.nan, np.float32)
        _native.PackedLinear([weight], name, group=group).linear(linear.source_of(x, name), out, isa)
        assert out[chosen].tobytes() == products.tobytes()


@pytest.mark.parametrize("seed", range(10))
def test_norms_and_rotations_are_the_oracle(seed: int) -> None:
    """Queries and keys normed and rotated, keys and values stored."""
    rng, dim, format = np.random.default_rng(seed), 8 * (seed + 1), attention.FORMATS[seed % 3]
    rows, heads = int(rng.integers(1, 48)), int(rng.integers(1, 6))
    source, norms = linear.numbers(rng, rows, (heads + 2) * dim), linear.numbers(rng, 2, dim)
    cos, sin = harness.rope_tables(2 * int(rng.integers(1, dim // 2 + 1)))
    positions = rng.integers(0, len(cos), rows).astype(np.int32)
    slots = rng.permutation(3 * PAGE_SIZE)[:rows].astype(np.int64)
    for isa in ISAS:
        pages, out = attention.Pages(format, 1, dim, 3), np.zeros((rows, heads * dim), np.float32)
        _native.kv_store(
            pages.pool, attention.LAYER, source.copy(), out, positions, slots, cos, sin,
            q_norm=norms[0], k_norm=norms[1], epsilon=1e-5, isa=isa,
        )  # fmt: skip
        for row, parts in enumerate(source.reshape(rows, -1, dim)):
            normed = [spec.rms_norm(part, norms[int(i == heads)], 1e-5) for i, part in enumerate(parts[:-1])]
            rotated = [spec.rope(part, cos[positions[row]], sin[positions[row]]) for part in normed]
            stored = [attention.stored(format, part).tobytes() for part in (rotated[-1], parts[-1])]
            assert out[row].tobytes() == np.concatenate(rotated[:-1]).tobytes()
            assert [side.tobytes() for side in pages.pool.read(attention.LAYER, int(slots[row]))] == stored


def swap_pages(batch: TokenBatch) -> int:
    """Two full pages of a split change places: the same keys, rotated for their positions, in other lanes."""
    chosen = np.flatnonzero(batch.context_lens >= 2 * PAGE_SIZE)
    batch.page_tables[chosen, :2] = batch.page_tables[chosen, 1::-1]
    return len(chosen)


def turn_splits(batch: TokenBatch) -> int:
    """The first of three full splits is folded last."""
    chosen, width = np.flatnonzero(batch.context_lens >= 3 * SPLIT), SPLIT // PAGE_SIZE
    batch.page_tables[chosen, : 3 * width] = np.roll(batch.page_tables[chosen, : 3 * width], -width, axis=1)
    return len(chosen)


def wrong_ancestor(batch: TokenBatch) -> int:
    """Rows hang below the first row of their parent's depth."""
    owner = np.repeat(np.arange(batch.num_segments), np.diff(batch.starts))
    places = list(zip(owner.tolist(), batch.logical.tolist(), strict=True))
    first = [places.index(places[parent]) if parent >= 0 else -1 for parent in batch.parents.tolist()]
    changed = int((batch.parents != first).sum())
    batch.parents[:] = first
    return changed


@pytest.mark.parametrize("plant", [swap_pages, turn_splits, wrong_ancestor])
def test_planted_bugs_are_noticed(plant: Plant) -> None:
    cases, wrong = compare(make(NATIVE[0], False, 1), expected(NATIVE[0], False), [3], rounds=6, plant=plant)
    assert cases["planted"] and wrong
    if plant in (swap_pages, turn_splits):
        # Right to rounding: no comparison with a tolerance would have seen it.
        pairs = np.array([[np.frombuffer(side[1], np.float32)[0] for side in pair] for pair in wrong])
        assert np.abs(np.diff(pairs)).max() < 1e-4
