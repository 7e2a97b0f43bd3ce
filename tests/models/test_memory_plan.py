"""Memory plans: what is chosen, what is honoured, what is refused and with which numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from tests.models.hf_fixtures import TINY
from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.errors import InvalidParameter, OutOfMemory
from tokenloom.models.config import ModelConfig
from tokenloom.models.hf_config import parse_config
from tokenloom.models.machine_memory import MachineMemory
from tokenloom.models.memory_plan import DEFAULT_KV_BYTES, FRAME_BYTES, MemoryPlan, show_bytes
from tokenloom.models.registry import build_program

GIB = 1 << 30
LLAMA_1B = {
    **TINY,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def machine(available: int) -> MachineMemory:
    return MachineMemory(total=2 * available, available=available, source="machine")


def fit(config: ModelConfig, available: int = 16 * GIB, **options: Any) -> MemoryPlan:
    options = {"max_batch_tokens": 512, "max_running": 128} | options
    return MemoryPlan.fit(config, build_program(config), machine=machine(available), **options)


def test_sizes():
    config = parse_config(TINY)
    plan = fit(config)
    multiplied = 64 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    tensors = multiplied + 64 * 32 + 32 + 2 * 2 * 32
    assert plan.weight_bytes == (tensors + multiplied) * 4
    assert fit(config, dtype="bfloat16").weight_bytes == tensors * 2 + multiplied * 4
    assert fit(replace(config, dtype="float16")).weight_bytes == tensors * 2 + multiplied * 4
    assert plan.rope_bytes == 128 * 4 * 2 * 4
    assert plan.page_bytes == 2 * 2 * PAGE_SIZE * 16 * 4
    assert plan.frame_bytes == FRAME_BYTES
    assert plan.pages_per_frame == FRAME_BYTES // plan.page_bytes
    assert plan.kv_bytes == plan.num_frames * plan.frame_bytes
    assert plan.total_bytes <= plan.machine.available - plan.headroom
    assert fit(config, kv_dtype="bfloat16").page_bytes == plan.page_bytes // 2


def test_small_models_get_what_the_running_sequences_need():
    config = parse_config(TINY)
    plan = fit(config)
    needed = 128 * 8  # max_running sequences of 128 tokens
    assert needed <= plan.num_pages < needed + plan.pages_per_frame
    assert plan.num_pages % plan.pages_per_frame == 0
    assert plan.num_full_sequences >= 128
    assert fit(config, max_running=1).num_pages == plan.pages_per_frame


def test_large_models_are_capped():
    config = replace(parse_config(LLAMA_1B), max_context=8192)
    assert fit(config, 64 * GIB).kv_bytes == DEFAULT_KV_BYTES
    plan = fit(config, 12 * GIB)
    left = plan.machine.available - plan.total_bytes + plan.kv_bytes - plan.headroom
    assert 0.45 * left < plan.kv_bytes <= 0.5 * left


def test_one_full_sequence_goes_before_the_cap():
    plan = fit(parse_config(LLAMA_1B), 64 * GIB)
    assert plan.kv_bytes > DEFAULT_KV_BYTES
    assert plan.num_full_sequences == 1


def test_explicit_sizes_are_honoured():
    config = parse_config(TINY)
    assert fit(config, num_pages=7).num_pages == 7
    assert fit(config, num_pages=7).num_frames == 1
    assert fit(config, num_pages=7).num_full_sequences == 0
    plan = fit(config, kv_memory_bytes=10 * FRAME_BYTES + 5)
    assert (plan.num_frames, plan.kv_bytes) == (10, 10 * FRAME_BYTES)
    big = replace(parse_config(LLAMA_1B), max_context=8192)
    assert fit(big, 64 * GIB, kv_memory_bytes=20 * GIB).kv_bytes == 20 * GIB


def test_sizes_that_make_no_sense():
    config = parse_config(TINY)
    with pytest.raises(InvalidParameter, match="kv_memory"):
        fit(config, kv_memory_bytes=1000)
    with pytest.raises(InvalidParameter, match="num_pages"):
        fit(config, kv_memory_bytes=GIB, num_pages=3)


def test_pages_larger_than_a_frame():
    config = parse_config(LLAMA_1B | {"num_hidden_layers": 64, "num_key_value_heads": 32})
    plan = fit(replace(config, max_context=64), 200 * GIB)
    assert plan.page_bytes > FRAME_BYTES
    assert (plan.frame_bytes, plan.pages_per_frame) == (plan.page_bytes, 1)
    plan = fit(replace(config, max_context=64, num_layers=65, num_kv_heads=16, num_heads=16), 200 * GIB)
    assert plan.page_bytes % (256 << 10), "adapter pages would not fit"
    assert plan.frame_bytes % (256 << 10) == 0
    assert 0 < plan.frame_bytes - plan.page_bytes < 256 << 10


def test_refusal_names_numbers_and_a_cure_that_works():
    config = parse_config(LLAMA_1B)
    with pytest.raises(OutOfMemory) as caught:
        fit(config, 10 * GIB)
    text = str(caught.value)
    for part in ("weights 6.9 GiB", "KV 8.0 GiB", "workspace", "10.0 GiB available"):
        assert part in text
    pages, mebibytes, context = map(int, re.findall(r"at most (\d+)", text))
    assert fit(config, 10 * GIB, kv_memory_bytes=mebibytes << 20).num_pages <= pages
    assert fit(config, 10 * GIB, num_pages=pages).num_pages == pages
    with pytest.raises(OutOfMemory):
        fit(config, 10 * GIB, num_pages=pages + fit(config, 64 * GIB).pages_per_frame)
    assert fit(replace(config, max_context=context), 10 * GIB).num_full_sequences >= 1


def test_weights_that_do_not_fit():
    with pytest.raises(OutOfMemory, match="smaller model"):
        fit(parse_config(LLAMA_1B), 4 * GIB)


def test_this_machine_serves_a_tiny_model():
    config = parse_config(TINY)
    plan = MemoryPlan.fit(config, build_program(config), max_batch_tokens=64, max_running=4)
    assert plan.num_pages >= 32


def test_render():
    plan = fit(parse_config(TINY))
    text = plan.render()
    assert f"{plan.num_pages} pages = {plan.num_tokens} tokens" in text
    assert "machine has 16.0 GiB available of 32.0 GiB" in text
    assert len(text.splitlines()) == 4
    assert all(len(line) < 120 for line in text.splitlines())
    assert "limited to 112" in fit(parse_config(TINY), num_pages=7).render()


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")],
)
def test_show_bytes(size: int, text: str):
    assert show_bytes(size) == text
