"""Rows with adapters: the updates are those of the oracle, and nobody else's row knows of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.harness import (
    NATIVE,
    Entry,
    Numerics,
    Run,
    each_numerics,
    make_batch,
    make_executor,
    random_weights,
    small_config,
    step,
)
from tokenloom.engine.batch import StepResult
from tokenloom.errors import ModelError
from tokenloom.kernels import spec
from tokenloom.kernels.adapter_image import (
    MAX_RANK,
    PAGE_BYTES,
    AdapterImage,
    make_image,
    page_bytes_for,
    read_blocks,
)
from tokenloom.kernels.mapped_file import map_file
from tokenloom.kernels.native import extension
from tokenloom.kernels.program import Program
from tokenloom.models.config import ExpertsConfig
from tokenloom.models.llama import build
from tokenloom.runtime.local import LocalExecutor

Float32 = NDArray[np.float32]
FRAME = 4 * PAGE_BYTES
CONFIG = small_config(num_heads=5, num_kv_heads=1, head_dim=24, tie_word_embeddings=False)
"""q, k and v begin at odd places: 120 and 144 of 168 columns."""


@dataclass(frozen=True)
class Block:
    weight: str
    begin: int
    end: int
    a: NDArray[Any]
    b: NDArray[Any]
    scale: float


@dataclass(frozen=True)
class Embedding:
    a: NDArray[Any]
    b: NDArray[Any]
    scale: float


def modules(program: Program) -> dict[str, tuple[str, int, int]]:
    """(weight, begin, end) of each linear that an adapter may update."""
    found: dict[str, tuple[str, int, int]] = {}
    sizes = {"q_proj": 120, "k_proj": 24, "v_proj": 24, "gate_proj": 72, "up_proj": 72}
    for spec_ in program.weights:
        at = 0
        for source in spec_.sources:
            name = source.removesuffix(".weight")
            if len(spec_.shape) == 2 and "experts" not in name and "embed" not in name:
                rows = sizes.get(name.rpartition(".")[2], spec_.shape[0])
                found[name] = (spec_.name, at, at + rows)
                at += rows
    return found


def make_blocks(program: Program, seed: int, ranks: tuple[int, ...], part: str = "") -> list[Block]:
    rng = np.random.default_rng(seed)
    shapes = {s.name: s.shape for s in program.weights}
    blocks = []
    for i, (name, (weight, begin, end)) in enumerate(modules(program).items()):
        if part not in name:
            continue
        rank = ranks[i % len(ranks)]
        a, b = rng.standard_normal((rank, shapes[weight][1])), rng.standard_normal((end - begin, rank))
        a, b = (values.astype(ml_dtypes.bfloat16).astype(np.float32) * 0.25 for values in (a, b))
        blocks.append(Block(weight, begin, end, a, b, 0.5 + 0.3 * seed))
    return blocks


def make_embedding(seed: int, rank: int) -> Embedding:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, CONFIG.vocab_size)), rng.standard_normal((CONFIG.hidden_size, rank))
    a, b = (values.astype(ml_dtypes.bfloat16).astype(np.float32) for values in (a, b))
    return Embedding(a, b, 0.7)


class Host:
    """An executor and pages for its adapters at the end of the pool."""

    def __init__(self, numerics: Numerics, config: Any = CONFIG, threads: int = 2) -> None:
        self.config = config
        self.program = build(config)
        self.dtype = numerics.dtype
        self.executor: LocalExecutor = make_executor(config, numerics, num_threads=threads, frame_bytes=FRAME)
        self.next_page = 32 * (FRAME // PAGE_BYTES) - 1

    def load(self, slot: int, blocks: list[Block], embedding: Embedding | None = None) -> AdapterImage:
        image = make_image(self.program, blocks, embedding, self.dtype, page_bytes=PAGE_BYTES)
        count = image.layout.num_pages
        # In falling order: pages lie anywhere.
        pages = np.arange(self.next_page, self.next_page - count, -1, dtype=np.int32)
        self.next_page -= count
        self.executor.backend.write_pages(pages, PAGE_BYTES, np.array(image.pages))
        self.executor.backend.bind_adapter(slot, image, pages)
        return image


def texts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 101, int(n)).tolist() for n in rng.integers(20, 60, count)]


def results(result: StepResult) -> list[Any]:
    """Everything about each entry as comparable bits."""
    return [
        (
            int(result.token_ids[i]),
            result.logprobs[i].tobytes(),
            result.top[i].rank,
            result.top[i].token_ids.tobytes(),
            result.top[i].logprobs.tobytes(),
        )
        for i in range(len(result.token_ids))
    ]


def run(host: Host, runs: list[Run], slots: list[int]) -> list[Any]:
    """Answers and logits of every row."""
    rows = sum(r.end - r.start for r in runs)
    batch = make_batch(runs, [Entry(i, num_logprobs=3) for i in range(rows)])
    batch.adapter_slots = np.array(slots, np.int32)
    result = results(step(host.executor, batch))
    logits = [
        host.executor.backend.logits(np.arange(i, min(i + 64, rows), dtype=np.int32))
        for i in range(0, rows, 64)
    ]
    return [(answer, row.tobytes()) for answer, row in zip(result, np.concatenate(logits), strict=True)]


def pages_of(index: int) -> list[int]:
    return [1 + 4 * index + i for i in range(4)]


@each_numerics(*NATIVE[:2], Numerics())
def test_updates_are_those_of_merged_weights(numerics: Numerics) -> None:
    """A base with W + scale * B A, in float32 near the same logits."""
    host = Host(numerics)
    blocks = make_blocks(host.program, 1, (3, 8, 20))
    host.load(4, blocks, make_embedding(1, 5))
    text = texts(1)[0]
    run(host, [Run(text, 0, len(text), pages_of(0))], [4])
    found = host.executor.backend.logits(np.arange(len(text), dtype=np.int32)).copy()
    weights = random_weights(host.program)
    for block in blocks:
        weights[block.weight][block.begin : block.end] += block.scale * block.b @ block.a
    e = make_embedding(1, 5)
    weights["model.embed_tokens.weight"] += e.scale * (e.b @ e.a).T
    merged = make_executor(CONFIG, Numerics(), weights=weights)
    batch = make_batch([Run(text, 0, len(text), pages_of(0))], [Entry(i) for i in range(len(text))])
    step(merged, batch)
    expected = merged.backend.logits(np.arange(len(text), dtype=np.int32))
    tolerance = 1e-4 if numerics.dtype == "float32" else 0.06
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@each_numerics()
def test_a_row_depends_on_its_own_adapter_alone(numerics: Numerics) -> None:
    """Six texts, four adapters of different ranks and the base in one batch, whole or in chunks or token by
    token, against each text alone in an executor that has only its own adapter; base rows against one that has
    none."""
    chosen = texts(6)
    slots = [2, -1, 0, 2, 7, -1]
    made = {
        0: (make_blocks(build(CONFIG), 10, (1,)), None),
        2: (make_blocks(build(CONFIG), 12, (16, 5)), make_embedding(2, 3)),
        7: (make_blocks(build(CONFIG), 17, (33,), "down_proj"), None),
    }
    alone: list[list[Any]] = []
    for i, text in enumerate(chosen):
        host = Host(numerics, threads=1)
        if slots[i] >= 0:
            host.load(slots[i], *made[slots[i]])
        alone.append(run(host, [Run(text, 0, len(text), pages_of(i))], [slots[i]]))
    assert alone[0] != alone[3]
    host = Host(numerics)
    for slot, parts in made.items():
        host.load(slot, *parts)
    whole = run(host, [Run(t, 0, len(t), pages_of(i)) for i, t in enumerate(chosen)], slots)
    assert whole == [row for rows in alone for row in rows]
    for size in (1, 7):
        found: list[list[Any]] = [[] for _ in chosen]
        while any(len(f) < len(t) for f, t in zip(found, chosen, strict=True)):
            left = [i for i, t in enumerate(chosen) if len(found[i]) < len(t)]
            runs = [
                Run(chosen[i], len(found[i]), min(len(found[i]) + size, len(chosen[i])), pages_of(i))
                for i in left
            ]
            rows = iter(run(host, runs, [slots[i] for i in left]))
            for i, r in zip(left, runs, strict=True):
                found[i] += [next(rows) for _ in range(r.end - r.start)]
        assert found == alone


@each_numerics(*NATIVE)
def test_rows_that_are_dropped_at_the_end_keep_their_adapters(numerics: Numerics) -> None:
    """Only some rows of a prompt want logits."""
    host = Host(numerics)
    host.load(3, make_blocks(host.program, 1, (6,)))
    host.load(0, make_blocks(host.program, 2, (2, 40)))
    first, second = texts(2)
    runs = [Run(first, 0, len(first), pages_of(0)), Run(second, 0, len(second), pages_of(1))]
    whole = run(host, runs, [3, 0])
    wanted = [3, len(first) - 1, len(first) + 2]
    batch = make_batch(runs, [Entry(i, num_logprobs=3) for i in wanted])
    batch.adapter_slots = np.array([3, 0], np.int32)
    found = results(step(host.executor, batch))
    assert found == [whole[i][0] for i in wanted]


@pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_instruction_sets_and_threads_give_the_same_bits(dtype: str) -> None:
    found = []
    text = texts(1)[0]
    for isa in extension.isas():
        for threads in (1, 3):
            host = Host(Numerics("native", dtype, dtype, isa=isa), threads=threads)
            host.load(0, make_blocks(host.program, 3, (1, 9, 30)), make_embedding(1, 5))
            found.append(run(host, [Run(text, 0, len(text), pages_of(0))], [0]))
    assert all(rows == found[0] for rows in found[1:])


@each_numerics(*NATIVE[:4], Numerics())
def test_experts_beside_an_adapter(numerics: Numerics) -> None:
    """The router and attention have adapters where the MLP is one of experts."""
    config = small_config(
        num_heads=5, num_kv_heads=1, experts=ExpertsConfig(count=5, top_k=2, width=16, normalized=True)
    )
    text = texts(1)[0]
    host = Host(numerics, config)
    base = run(host, [Run(text, 0, len(text), pages_of(0))], [-1])
    host.load(1, make_blocks(host.program, 1, (4,)))
    adapted = run(host, [Run(text, 0, len(text), pages_of(0))], [1])
    assert run(host, [Run(text, 0, len(text), pages_of(0))], [-1]) == base
    assert adapted != base


@each_numerics(*NATIVE[:2], Numerics())
def test_slots_come_and_go(numerics: Numerics) -> None:
    text = texts(1)[0]
    runs = [Run(text, 0, len(text), pages_of(0))]
    host = Host(numerics)
    base = run(host, runs, [-1])
    with pytest.raises(ValueError, match="no adapter is bound"):
        run(host, runs, [0])
    host.load(0, make_blocks(host.program, 1, (4,)))
    first = run(host, runs, [0])
    with pytest.raises(ValueError, match="is taken"):
        host.load(0, make_blocks(host.program, 2, (4,)))
    with pytest.raises(ValueError, match="no adapter is bound"):
        run(host, runs, [1])
    host.executor.backend.unbind_adapter(0)
    with pytest.raises(ValueError, match="is empty"):
        host.executor.backend.unbind_adapter(0)
    with pytest.raises(ValueError, match="no adapter is bound"):
        run(host, runs, [0])
    host.load(0, make_blocks(host.program, 2, (4,)))
    assert run(host, runs, [0]) != first
    assert run(host, runs, [-1]) == base


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")
def test_products_are_the_oracle(narrow: bool) -> None:
    """One layer's logits with an adapter on the head alone: base, then `spec.shrink` and `spec.expand`."""
    dtype = "bfloat16" if narrow else "float32"
    host = Host(Numerics("native", dtype, dtype))
    text = texts(1)[0]
    runs = [Run(text, 0, len(text), pages_of(0))]
    base = run(host, runs, [-1])
    blocks = make_blocks(host.program, 1, (19,), "lm_head")
    host.load(0, blocks)
    found = run(host, runs, [0])
    block = blocks[0]
    hidden = hidden_rows(host, text, narrow)
    for row, source in enumerate(hidden):
        v = spec.shrink(source, block.a, block.scale, narrow=narrow)
        expected = np.frombuffer(base[row][1], np.float32) + spec.expand(v, block.b)
        assert (np.frombuffer(found[row][1], np.float32) == expected).all()


def hidden_rows(host: Host, text: list[int], narrow: bool) -> list[Float32]:
    """What the head reads, found by a head that is the identity."""
    vocab, width = next(s.shape for s in host.program.weights if s.name == "lm_head.weight")
    weights = random_weights(host.program)
    weights["lm_head.weight"] = np.eye(vocab, width, dtype=np.float32)
    dtype = "bfloat16" if narrow else "float32"
    executor = make_executor(host.config, Numerics("native", dtype, dtype), weights=weights)
    entries = [Entry(i) for i in range(len(text))]
    step(executor, make_batch([Run(text, 0, len(text), range(1, 2 + len(text) // 16))], entries))
    rows = [np.arange(i, min(i + 64, len(text)), dtype=np.int32) for i in range(0, len(text), 64)]
    found = np.concatenate([executor.backend.logits(part).copy() for part in rows])
    return [row[:width].copy() for row in found]


def test_images_keep_what_they_were_made_of(tmp_path: Path) -> None:
    program = build(CONFIG)
    blocks = make_blocks(program, 1, (1, 8, 70))
    image = make_image(program, blocks, make_embedding(1, 5), "float32", page_bytes=PAGE_BYTES)
    image.save(tmp_path / "x.image")
    again = AdapterImage.open(tmp_path / "x.image")
    assert again.layout == image.layout
    assert (np.asarray(again.pages) == image.pages).all()
    assert [p.name for p in tmp_path.iterdir()] == ["x.image"]
    numbers = sum(block.a.size + block.b.size for block in blocks) + 5 * (101 + 40)
    assert image.num_bytes < 4 * numbers * 1.5 + PAGE_BYTES, "ranks are not padded"
    assert sum(a.shape[0] for _, a, _ in read_blocks(again)) >= sum(len(block.a) for block in blocks)
    raw = (tmp_path / "x.image").read_bytes()
    for damaged in (raw[:-1], raw[:40], b"", b"x" + raw[1:], raw[:26] + b"\xff" * 8 + raw[34:]):
        (tmp_path / "x.image").write_bytes(damaged)
        with pytest.raises(ModelError):
            AdapterImage.open(tmp_path / "x.image")


def test_open_images_have_no_file_descriptor(tmp_path: Path) -> None:
    program = build(CONFIG)
    make_image(program, make_blocks(program, 1, (4,)), None, "float32", page_bytes=PAGE_BYTES).save(
        tmp_path / "x"
    )
    AdapterImage.open(tmp_path / "x")
    descriptors = len(os.listdir("/proc/self/fd"))
    images = [AdapterImage.open(tmp_path / "x") for _ in range(2000)]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    (tmp_path / "x").unlink()
    for image in images[::100]:
        image.will_need(0, image.layout.num_pages)
        assert image.is_sound()
        assert not image.pages.flags.writeable
    part = images[7].pages[0]
    count = Path("/proc/self/maps").read_text().count(f"{tmp_path}/x")
    del images, image
    assert part.any(), "a view keeps its mapping"
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(f"{tmp_path}/x") <= 1 < count
    with pytest.raises(OSError, match="No such file"):
        map_file(tmp_path / "x")


def test_numbers_that_do_not_fit_are_refused() -> None:
    program = build(CONFIG)
    (block,) = make_blocks(program, 1, (2,), "lm_head")
    for value in (np.nan, np.inf, 3.4e38):
        block.a[0, 0] = value
        with pytest.raises(ModelError, match="does not hold"):
            make_image(program, [block], None, "bfloat16", page_bytes=PAGE_BYTES)


def test_long_vectors_take_larger_pages() -> None:
    program = build(small_config(hidden_size=20_000, intermediate_size=8, num_layers=1, vocab_size=5))
    block = Block("lm_head.weight", 0, 5, np.ones((2, 20_000)), np.ones((5, 2)), 1.0)
    assert page_bytes_for(program, "bfloat16") == PAGE_BYTES
    assert page_bytes_for(program, "float32") == page_bytes_for(program, "float16") == 2 * PAGE_BYTES
    image = make_image(program, [block], None, "float32", page_bytes=2 * PAGE_BYTES)
    assert image.layout.page_bytes == 2 * PAGE_BYTES
    with pytest.raises(ModelError, match="a vector of 80000 bytes"):
        make_image(program, [block], None, "float32", page_bytes=PAGE_BYTES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_hold_the_largest_rank(dtype: str) -> None:
    program = build(CONFIG)
    blocks = make_blocks(program, 1, (MAX_RANK,))
    size = page_bytes_for(program, dtype)
    assert size == PAGE_BYTES
    assert make_image(program, blocks, make_embedding(1, MAX_RANK), dtype, page_bytes=size).layout.num_pages


@pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")
def test_hostile_layouts_are_refused() -> None:
    host = Host(Numerics("native"))
    model = host.executor.backend._model  # type: ignore[attr-defined]
    none = np.zeros(0, np.int64)
    good: dict[str, Any] = {
        "slot": 0, "pages": np.array([8], np.int32), "page_bytes": PAGE_BYTES,
        "blocks": np.array([[2, 0, 1, -1, 1]], np.int64), "scales": np.ones(1, np.float32),
        "a": np.array([0], np.int64), "b": np.array([256], np.int64), "embedding_rank": 0, "embedding_scale": 0.0,
        "embedding_a": none, "embedding_b": none,
    }  # fmt: skip
    bad: list[dict[str, Any]] = [
        {"slot": -1}, {"slot": 1 << 40}, {"pages": np.array([10**6], np.int32)}, {"pages": np.array([-1], np.int32)},
        {"page_bytes": 0}, {"page_bytes": 96}, {"page_bytes": -64}, {"page_bytes": 1 << 40},
        {"a": np.array([-64], np.int64)}, {"a": np.array([PAGE_BYTES], np.int64)}, {"a": np.array([8], np.int64)},
        {"a": np.array([PAGE_BYTES - 64], np.int64)}, {"a": none}, {"b": none}, {"scales": np.ones(2, np.float32)},
        {"b": np.array([1 << 62], np.int64)}, {"embedding_rank": -1}, {"embedding_rank": 3},
        *({"blocks": np.array([row], np.int64)} for row in (
            [0, 0, 1, -1, 1], [-1, 0, 1, -1, 1], [99, 0, 1, -1, 1], [2, -1, 1, -1, 1], [2, 6, 1, -1, 1],
            [2, 0, 1 << 40, -1, 1], [2, 0, 1, 0, 1], [2, 0, 1, -1, 0], [2, 0, 1, -1, 1 << 33], [2, 0, 0, -1, 1],
        )),
    ]  # fmt: skip
    for change in bad:
        with pytest.raises((ValueError, TypeError)):
            model.bind_adapter(**(good | change))
    model.bind_adapter(**good)
    for pages in ([10**6], [-1]):
        with pytest.raises(ValueError, match="outside the pool"):
            model.write_pages(np.array(pages, np.int32), PAGE_BYTES, np.zeros(PAGE_BYTES, np.uint8))
