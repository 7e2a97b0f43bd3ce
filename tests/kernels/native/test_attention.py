"""Native attention and the KV pool: bits of the oracles, whatever the batch, pages, plan and instruction set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.kernels import spec

_native = pytest.importorskip("tokenloom.kernels.native._native")

Float32 = NDArray[np.float32]

FORMATS = ("float32", "bfloat16", "int8")
# (head_dim, query heads, KV heads): groups of 1, 2, 3, 4, 7, 8 and one that needs two tiles.
SHAPES = (
    (8, 2, 2),
    (24, 4, 2),
    (64, 14, 2),
    (64, 8, 2),
    (80, 3, 1),
    (128, 8, 1),
    (96, 6, 2),
    (16, 13, 1),
    (256, 2, 1),
)
LAYERS, LAYER = 2, 1


def bits(values: Float32) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


@dataclass
class Pages:
    """A pool whose slots all hold something, and what they hold: K and V [slots, kv_heads, dim] as given."""

    format: str
    heads: int
    dim: int
    count: int
    seed: int = 0
    pool: Any = None
    k: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    v: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        page_bytes = _native.kv_page_bytes(self.format, LAYERS, self.heads, self.dim)
        self.pool = _native.KVPool(
            num_frames=-(-self.count // 3),
            frame_bytes=3 * page_bytes + 64,
            pages_per_frame=3,
            num_layers=LAYERS,
            num_kv_heads=self.heads,
            head_dim=self.dim,
            format=self.format,
        )
        rng = np.random.default_rng(self.seed)
        shape = (self.count * PAGE_SIZE, self.heads, self.dim)
        # Stale slots hold larger numbers than live ones.
        self.k = rng.standard_normal(shape).astype(np.float32) * np.float32(30)
        self.v = rng.standard_normal(shape).astype(np.float32) * np.float32(1000)
        self.store(np.arange(len(self.k)), self.k, self.v)

    def store(self, slots: NDArray[Any], k: Float32, v: Float32, isa: str = "") -> None:
        self.k[slots], self.v[slots] = k, v
        rows = len(slots)
        q = np.zeros((rows, self.dim), np.float32)
        source = np.concatenate([q, k.reshape(rows, -1), v.reshape(rows, -1)], axis=1)
        none = np.zeros((1, 0), np.float32)
        zeros = np.zeros(rows, np.int32)
        _native.kv_store(
            self.pool,
            LAYER,
            np.ascontiguousarray(source),
            q,
            zeros,
            slots.astype(np.int64),
            none,
            none,
            isa=isa,
        )

    def oracle(self, query: Float32, slots: NDArray[Any], head: int, scale: float, first: int) -> Float32:
        keys, values = self.k[slots, head], self.v[slots, head]
        if self.format == "float32":
            return spec.attention(query, spec.stored_fp32(keys), spec.stored_fp32(values), scale, first)
        if self.format == "bfloat16":
            return spec.attention_bf16(query, spec.stored_bf16(keys), spec.stored_bf16(values), scale, first)
        rounded = []
        for side in (keys, values):
            stored = [spec.stored_int8(row) for row in side]
            rounded.append((np.stack([x for x, _ in stored]), np.array([s for _, s in stored], np.float32)))
        return spec.attention_int8(query, rounded[0], rounded[1], scale, first)


@dataclass
class Segment:
    """`rows` query rows after `context` tokens; a tree where `parents` (within the segment) are given."""

    context: int
    rows: int = 1
    parents: list[int] | None = None
    in_place: float = 0.3
    """Share of tree rows whose keys lie where the page table says."""


@dataclass
class Case:
    """A batch, and for each row the slots of its path."""

    logical: NDArray[np.int32]
    slots: NDArray[np.int64]
    parents: NDArray[np.int32]
    starts: NDArray[np.int32]
    page_tables: NDArray[np.int32]
    paths: list[NDArray[np.int64]]

    def run(
        self,
        pages: Pages,
        query: Float32,
        scale: float,
        window: int = 0,
        threads: int = 1,
        isa: str = "",
        dtype: Any = np.float32,
    ) -> NDArray[Any]:
        out = np.full(query.shape, 7, dtype)
        self.counts = _native.attention(
            pages.pool, LAYER, query, out, scale, window, self.logical, self.slots, self.parents, self.starts,
            self.page_tables, num_threads=threads, isa=isa,
        )  # fmt: skip
        return out


def make_case(segments: list[Segment], pages: Pages, seed: int = 0) -> Case:
    """Pages in random order; every key that some row sees is stored with numbers of ordinary size."""
    rng = np.random.default_rng(seed)
    free = rng.permutation(pages.count).tolist()
    logical: list[int] = []
    slots: list[int] = []
    parents: list[int] = []
    starts = [0]
    tables: list[list[int]] = []
    paths: list[NDArray[np.int64]] = []
    for segment in segments:
        begin = len(logical)
        depth: list[int] = []
        for row in range(segment.rows):
            parent = row - 1 if segment.parents is None else segment.parents[row]
            depth.append(depth[parent] + 1 if parent >= 0 else segment.context)
        table = [free.pop() for _ in range(max(depth) // PAGE_SIZE + 1)]
        own = np.array([table[j // PAGE_SIZE] * PAGE_SIZE + j % PAGE_SIZE for j in range(max(depth) + 1)])
        scratch = [free.pop() for _ in range(-(-segment.rows // PAGE_SIZE))] if segment.parents else []
        places = rng.permutation([page * PAGE_SIZE + i for page in scratch for i in range(PAGE_SIZE)])
        taken: set[int] = set()
        for row in range(segment.rows):
            place = int(own[depth[row]])
            if segment.parents is None:
                parents.append(-1)
                path = own[: depth[row] + 1]
                slots.append(place if rng.random() < 0.9 else -1)
            else:
                parent = segment.parents[row]
                parents.append(parent + begin if parent >= 0 else -1)
                if place in taken or rng.random() >= segment.in_place:
                    place = int(places[row])
                taken.add(place)
                path = np.append(paths[begin + parent] if parent >= 0 else own[: segment.context], place)
                slots.append(place)
            logical.append(depth[row])
            paths.append(path.astype(np.int64))
        starts.append(len(logical))
        tables.append(table)
    width = max(map(len, tables)) + 1
    page_tables = np.zeros((len(tables), width), np.int32)
    for i, table in enumerate(tables):
        page_tables[i, : len(table)] = table
    live = np.unique(np.concatenate(paths))
    shape = (len(live), pages.heads, pages.dim)
    pages.store(
        live, rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)
    )
    return Case(
        np.array(logical, np.int32),
        np.array(slots, np.int64),
        np.array(parents, np.int32),
        np.array(starts, np.int32),
        page_tables,
        paths,
    )


def random_tree(rng: np.random.Generator, rows: int) -> list[int]:
    return [-1] + [int(rng.integers(max(0, row - 4), row)) for row in range(1, rows)]


def random_segments(rng: np.random.Generator) -> list[Segment]:
    tree = random_tree(rng, int(rng.integers(2, 13)))
    segments = [
        Segment(int(rng.integers(100, 300)), int(rng.integers(1, 40))),
        Segment(0, int(rng.integers(1, 20))),
        Segment(int(rng.integers(120, 135))),
        Segment(int(rng.integers(0, 60))),
        Segment(int(rng.integers(118, 128)), len(tree), tree),
    ]
    return [segments[i] for i in rng.permutation(len(segments))]


def queries(case: Case, heads: int, dim: int, seed: int = 0) -> Float32:
    rng = np.random.default_rng(seed + 100)
    return rng.standard_normal((len(case.logical), heads * dim)).astype(np.float32)


def first_key(case: Case, row: int, window: int) -> int:
    return max(int(case.logical[row]) - window + 1, 0) if window else 0


def check_oracle(
    pages: Pages, case: Case, query: Float32, out: Float32, heads: int, scale: float, window: int, count: int
) -> None:
    """`count` rows and heads, the last row of the batch among them."""
    rng = np.random.default_rng(3)
    dim, group = pages.dim, heads // pages.heads
    for i in range(count):
        row = int(rng.integers(len(case.paths))) if i else len(case.paths) - 1
        head = int(rng.integers(heads))
        part = slice(head * dim, (head + 1) * dim)
        first = first_key(case, row, window)
        expected = pages.oracle(query[row, part], case.paths[row], head // group, scale, first)
        assert bits(out[row, part]).tolist() == bits(expected).tolist(), (row, head, len(case.paths[row]))


@pytest.mark.parametrize("window", [0, 5, 150])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_bits_of_the_oracle(format: str, shape: tuple[int, int, int], window: int) -> None:
    dim, heads, kv_heads = shape
    pages = Pages(format, kv_heads, dim, 120)
    case = make_case(random_segments(np.random.default_rng(dim + window)), pages)
    query = queries(case, heads, dim)
    scale = dim**-0.5
    out = case.run(pages, query, scale, window)
    check_oracle(pages, case, query, out, heads, scale, window, count=8)
    for isa in _native.isas():
        for threads in (1, 2):
            found = case.run(pages, query, scale, window, threads, isa)
            assert (bits(found) == bits(out)).all(), (isa, threads)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dim, heads, kv_heads = SHAPES[seed % len(SHAPES)]
    format = FORMATS[seed % 3]
    window = int(rng.integers(1, 200)) if seed % 2 else 0
    pages = Pages(format, kv_heads, dim, 120, seed)
    case = make_case(random_segments(rng), pages, seed)
    query = queries(case, heads, dim, seed)
    out = case.run(pages, query, 0.3, window)
    check_oracle(pages, case, query, out, heads, 0.3, window, count=12)


@pytest.mark.parametrize("format", FORMATS)
def test_batch_chunks_and_pages_do_not_matter(format: str) -> None:
    """Each row alone gives what it gives among others, in chunks of any size and on other pages."""
    rng = np.random.default_rng(5)
    segments = random_segments(rng)
    pages = Pages(format, 2, 64, 120)
    case = make_case(segments, pages, seed=1)
    query = queries(case, 14, 64)
    out = case.run(pages, query, 0.125)

    moved = Pages(format, 2, 64, 120, seed=9)
    other = make_case(segments, moved, seed=2)
    for mine, theirs in zip(case.paths, other.paths, strict=True):
        moved.store(theirs, pages.k[mine], pages.v[mine])
    assert (bits(other.run(moved, query, 0.125)) == bits(out)).all()

    for s, segment in enumerate(segments):
        begin, end = int(case.starts[s]), int(case.starts[s + 1])
        sizes = [end - begin] if segment.parents else [1, 7, 1000]
        for size in sizes:
            for start in range(begin, end, size):
                rows = slice(start, min(start + size, end))
                count = rows.stop - rows.start
                parents = case.parents[rows]
                part = Case(
                    case.logical[rows],
                    case.slots[rows],
                    np.where(parents >= 0, parents - start, -1).astype(np.int32),
                    np.array([0, count], np.int32),
                    case.page_tables[s : s + 1],
                    [],
                )
                found = part.run(pages, np.ascontiguousarray(query[rows]), 0.125)
                assert (bits(found) == bits(out[rows])).all()


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("format", FORMATS)
def test_long_context_cut_into_tasks(format: str, window: int) -> None:
    pages = Pages(format, 1, 16, 200)
    tree = [-1, 0, 0, 1, 1, 4, 5]
    case = make_case([Segment(2300), Segment(40, 3), Segment(500, len(tree), tree)], pages)
    query = queries(case, 5, 16)
    out = case.run(pages, query, 0.25, window)
    assert case.counts[1] == 0
    check_oracle(pages, case, query, out, 5, 0.25, window, count=6)
    for threads in (2, 3, 8):
        found = case.run(pages, query, 0.25, window, threads)
        assert window or case.counts[1] > 0
        assert (bits(found) == bits(out)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_deep_tree(format: str) -> None:
    """64 ancestors in scattered slots, across a split."""
    pages = Pages(format, 1, 24, 60)
    case = make_case([Segment(100, 65, list(range(-1, 64)), in_place=0.1)], pages)
    query = queries(case, 2, 24)
    out = case.run(pages, query, 0.2)
    check_oracle(pages, case, query, out, 2, 0.2, 0, count=10)
    for isa in _native.isas():
        assert (bits(case.run(pages, query, 0.2, isa=isa)) == bits(out)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1e-18, 1e-3, 30.0, 1e4])
def test_extreme_scores(format: str, size: float) -> None:
    """Underflowing shares, ties and denormals."""
    pages = Pages(format, 1, 16, 40)
    case = make_case([Segment(150, 9)], pages)
    live = np.unique(np.concatenate(case.paths))
    rng = np.random.default_rng(1)
    v = rng.standard_normal((len(live), 1, 16)).astype(np.float32) * np.float32(1e-38)
    v[:, :, 3] = -0.0
    v[:, :, 4] = 0.0
    pages.store(live, rng.standard_normal((len(live), 1, 16)).astype(np.float32), v)
    query = queries(case, 1, 16) * np.float32(size)
    out = case.run(pages, query, 1.0)
    check_oracle(pages, case, query, out, 1, 1.0, 0, count=6)
    assert not np.signbit(out[out == 0]).any()
    for isa in _native.isas():
        assert (bits(case.run(pages, query, 1.0, isa=isa)) == bits(out)).all()


def test_bfloat16_output() -> None:
    pages = Pages("bfloat16", 2, 24, 60)
    case = make_case([Segment(130, 20)], pages)
    query = queries(case, 4, 24)
    exact = case.run(pages, query, 0.2)
    for isa in _native.isas():
        out = case.run(pages, query, 0.2, isa=isa, dtype=np.uint16)
        assert (out.astype(np.uint32) << 16 == bits(spec.bf16(exact))).all()


# --- the KV pool ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (24, 24), (80, 32), (8, 4), (128, 128), (16, 0)])
@pytest.mark.parametrize("format", FORMATS)
def test_rope_store(format: str, dim: int, rotary: int, norms: bool, isa: str) -> None:
    rng = np.random.default_rng(dim)
    rows, heads, kv_heads = 11, 4, 2
    pages = Pages(format, kv_heads, dim, 4)
    source = rng.standard_normal((rows, (heads + 2 * kv_heads) * dim)).astype(np.float32)
    angles = rng.uniform(0, 6, (30, rotary // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    weights = rng.standard_normal((2, dim)).astype(np.float32)
    positions = rng.integers(0, 30, rows).astype(np.int32)
    slots = rng.permutation(4 * PAGE_SIZE)[:rows].astype(np.int64)
    slots[3] = -1
    untouched = {slot: pages.pool.read(LAYER, slot) for slot in range(4 * PAGE_SIZE) if slot not in slots}
    out = np.zeros((rows, heads * dim), np.float32)
    _native.kv_store(
        pages.pool, LAYER, source.copy(), out, positions, slots, cos, sin,
        q_norm=weights[0] if norms else None, k_norm=weights[1] if norms else None, epsilon=1e-6, isa=isa,
    )  # fmt: skip
    for row in range(rows):
        table = cos[positions[row]], sin[positions[row]]
        parts = source[row].reshape(-1, dim)
        for head in range(heads + kv_heads):
            x = parts[head]
            if norms:
                x = spec.rms_norm(x, weights[0 if head < heads else 1], 1e-6)
            x = spec.rope(x, *table)
            if head < heads:
                assert (bits(out[row, head * dim : (head + 1) * dim]) == bits(x)).all()
            elif slots[row] >= 0:
                k, v = pages.pool.read(LAYER, int(slots[row]))
                assert (bits(k[head - heads]) == bits(stored(format, x))).all()
                assert (bits(v[head - heads]) == bits(stored(format, parts[head + kv_heads]))).all()
    for slot, (k, v) in untouched.items():
        found = pages.pool.read(LAYER, slot)
        assert (bits(found[0]) == bits(k)).all()
        assert (bits(found[1]) == bits(v)).all()
    assert not pages.pool.read(1 - LAYER, 5)[0].any()


def stored(format: str, x: Float32) -> Float32:
    if format == "float32":
        return spec.stored_fp32(x)
    if format == "bfloat16":
        return spec.stored_bf16(x)
    rounded, scale = spec.stored_int8(x)
    with np.errstate(over="ignore"):
        return rounded * scale


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_is_replaced(format: str, isa: str) -> None:
    pages = Pages(format, 1, 16, 1)
    rows = np.zeros((4, 1, 16), np.float32)
    rows[0, 0, :6] = [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, -np.nan]
    rows[1, 0, :3] = [1e-45, -1e-45, 1e-40]
    rows[2, 0, :3] = [1.0, 2**-8 + 1, 3 * 2**-8 + 1]
    pages.store(np.arange(4), rows, rows[::-1], isa)
    for slot in range(4):
        k, v = pages.pool.read(LAYER, slot)
        # The largest number / 127 * 127 rounds up; what the int8 pool keeps is finite all the same.
        assert format == "int8" or np.isfinite(k).all()
        assert (bits(k[0]) == bits(stored(format, rows[slot, 0]))).all()
        assert (bits(v[0]) == bits(stored(format, rows[3 - slot, 0]))).all()


@pytest.mark.parametrize("format", FORMATS)
def test_copy_pages_reads_before_it_writes(format: str) -> None:
    pages = Pages(format, 2, 24, 7)
    before = [pages.pool.read(LAYER, slot) for slot in range(7 * PAGE_SIZE)]
    # A swap, a chain and a copy onto itself.
    copies = np.array([[0, 1], [1, 0], [2, 3], [3, 4], [5, 5]], np.int32)
    pages.pool.copy_pages(copies)
    source = {1: 0, 0: 1, 3: 2, 4: 3}
    for slot in range(7 * PAGE_SIZE):
        page = source.get(slot // PAGE_SIZE, slot // PAGE_SIZE)
        expected = before[page * PAGE_SIZE + slot % PAGE_SIZE]
        found = pages.pool.read(LAYER, slot)
        assert (bits(found[0]) == bits(expected[0])).all()
        assert (bits(found[1]) == bits(expected[1])).all()


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logical", [16 * 2]),
        ("logical", [-1]),
        ("slots", [-2]),
        ("slots", [16 * 6]),
        ("parents", [0]),
        ("parents", [-2]),
        ("starts", [0, 2]),
        ("starts", [1, 1]),
        ("page_tables", [[6, 0]]),
        ("page_tables", [[-1, 0]]),
        ("logical", [0, 1]),
        ("page_tables", [[0], [0]]),
    ],
)
def test_illegal_batches_are_refused(name: str, value: list[Any]) -> None:
    pages = Pages("bfloat16", 1, 16, 6)
    arrays: dict[str, Any] = {
        "logical": np.array([5], np.int32),
        "slots": np.array([5], np.int64),
        "parents": np.array([-1], np.int32),
        "starts": np.array([0, 1], np.int32),
        "page_tables": np.zeros((1, 2), np.int32),
    }
    query = np.zeros((1, 16), np.float32)
    _native.attention(pages.pool, 0, query, query.copy(), 1.0, 0, **arrays)
    arrays[name] = np.array(value, arrays[name].dtype)
    with pytest.raises(ValueError, match=name):
        _native.attention(pages.pool, 0, query, query.copy(), 1.0, 0, **arrays)


def test_illegal_trees_are_refused() -> None:
    pages = Pages("bfloat16", 1, 16, 12)

    def run(rows: int, logical: list[int], parents: list[int], starts: list[int]) -> None:
        query = np.zeros((rows, 16), np.float32)
        _native.attention(
            pages.pool, 0, query, query.copy(), 1.0, 0, np.array(logical, np.int32),
            np.full(rows, -1, np.int64), np.array(parents, np.int32), np.array(starts, np.int32),
            np.zeros((len(starts) - 1, 8), np.int32),
        )  # fmt: skip

    run(65, list(range(65)), list(range(-1, 64)), [0, 65])
    with pytest.raises(ValueError, match="64 ancestors"):
        run(66, list(range(66)), list(range(-1, 65)), [0, 66])
    with pytest.raises(ValueError, match="another segment"):
        run(2, [3, 4], [-1, 0], [0, 1, 2])
    with pytest.raises(ValueError, match="one more"):
        run(2, [3, 3], [-1, 0], [0, 2])


def test_illegal_stores_and_copies_are_refused() -> None:
    pages = Pages("bfloat16", 1, 16, 3)
    source, out = np.zeros((1, 48), np.float32), np.zeros((1, 16), np.float32)
    table = np.zeros((4, 8), np.float32)

    def run(position: int = 0, slot: int = 0, layer: int = 0, **changes: Any) -> None:
        arguments = {"source": source, "out": out, "cos": table, "sin": table} | changes
        _native.kv_store(
            pages.pool,
            layer,
            positions=np.array([position], np.int32),
            slots=np.array([slot], np.int64),
            **arguments,
        )

    run()
    for name, changes in {
        "positions": {"position": 4},
        "slots": {"slot": 48},
        "layer": {"layer": 2},
        "source": {"source": np.zeros((1, 40), np.float32)},
        "out": {"out": np.zeros((1, 32), np.float32)},
        "cos": {"cos": np.zeros((4, 9), np.float32)},
        "sin": {"sin": np.zeros((3, 8), np.float32)},
        "q_norm": {"q_norm": np.zeros(8, np.float32)},
    }.items():
        with pytest.raises(ValueError, match=name):
            run(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outside the pool"):
        pages.pool.copy_pages(np.array([[0, 3]], np.int32))
    with pytest.raises(ValueError, match="slot"):
        pages.pool.read(0, 48)
    with pytest.raises(ValueError, match="frame_bytes"):
        _native.KVPool(
            num_frames=1,
            frame_bytes=64,
            pages_per_frame=1,
            num_layers=1,
            num_kv_heads=1,
            head_dim=16,
            format="int8",
        )
