"""Each family with an adapter on every linear and, where it is not tied, the head."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.harness import NATIVE, Numerics, each_numerics, prepared
from tests.models import test_families as families
from tokenloom.adapters.adapter import Adapter, LoraModule, place_modules
from tokenloom.adapters.modules import Places
from tokenloom.kernels.adapter_image import image_dtype, make_image, page_bytes_for
from tokenloom.kernels.program import Embed
from tokenloom.models.rope import rope_tables
from tokenloom.models.weight_sources import source_rows
from tokenloom.runtime.local import LocalExecutor

LENGTH, SLOT, KV_PAGES = 90, 5, 20
Float32 = NDArray[np.float32]


@functools.cache
def adapter_of(name: str) -> Adapter:
    _, program, _ = families.loaded(name)
    rows = source_rows(program)
    tied = {op.weight for op in program.ops if isinstance(op, Embed)}
    rng = np.random.default_rng(3)
    modules = []
    for i, (module, place) in enumerate(Places(program, rows).by_module.items()):
        if place.weight not in tied:
            rank = (1, 4, 9)[i % 3]
            a, b = rng.standard_normal((rank, place.inputs)), rng.standard_normal((place.outputs, rank))
            modules.append(LoraModule(module, a.astype(np.float32) * 0.1, b.astype(np.float32) * 0.1, 1.5))
    return place_modules(modules, program, source_rows=rows)


def executor_of(name: str, numerics: Numerics, weights: dict[str, Float32] | None = None) -> LocalExecutor:
    """As `families.ours`, with frames behind the KV pages for the adapter, which has `SLOT`."""
    config, program, stored = families.loaded(name)
    adapter = adapter_of(name)
    page_bytes = page_bytes_for(program, numerics.dtype)
    image = make_image(program, adapter.blocks, None, image_dtype(numerics.dtype), page_bytes=page_bytes)
    executor = LocalExecutor(
        program,
        prepared(program, stored if weights is None else weights, numerics),
        rope_tables(config),
        num_frames=KV_PAGES + image.layout.num_pages,
        frame_bytes=page_bytes,
        pages_per_frame=1,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        num_threads=2,
        kernels=numerics.kernels,
        isa=numerics.isa,
    )
    pages = np.arange(KV_PAGES, KV_PAGES + image.layout.num_pages, dtype=np.int32)
    executor.backend.write_pages(pages, page_bytes, np.array(image.pages))
    executor.backend.bind_adapter(SLOT, image, pages)
    return executor


@pytest.mark.column("adapters")
@pytest.mark.parametrize("name", families.FAMILIES)
@each_numerics(Numerics(), *NATIVE)
def test_rows_with_an_adapter_and_without(name: str, numerics: Numerics) -> None:
    """In chunks the same bits as whole; rows of the base as in an executor that has no adapter; in fp32 near a model
    whose weights contain the adapter."""
    text = families.tokens(name)[:LENGTH]
    plain = families.logits_of(families.ours(name, numerics), text, [LENGTH])
    executor = executor_of(name, numerics)
    whole = families.logits_of(executor, text, [LENGTH], SLOT)
    assert (families.logits_of(executor, text, [33, 1, 16, 1], SLOT) == whole).all()
    assert (families.logits_of(executor, text, [50, 1], -1) == plain).all()
    assert np.abs(whole - plain).max() > 0.05
    if numerics.dtype == "float32":
        _, _, weights = families.loaded(name)
        merged = {key: np.array(value, np.float32) for key, value in weights.items()}
        for block in adapter_of(name).blocks:
            merged[block.weight][block.begin : block.end] += block.scale * block.b @ block.a
        expected = families.logits_of(executor_of(name, Numerics(), merged), text, [LENGTH])
        np.testing.assert_allclose(whole, expected, rtol=1e-3, atol=1e-3)
