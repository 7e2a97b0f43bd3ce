"""A memory plan must cover what an executor really takes."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.harness import Entry, Run, make_batch, step
from tests.models.hf_fixtures import MIXTRAL, TINY, llama_tensors, mixtral_tensors, write_model
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.weights import WeightPacker
from tokenloom.models.loading import describe_model, load_model
from tokenloom.models.memory_plan import MemoryPlan
from tokenloom.models.weight_sources import roundings
from tokenloom.runtime.local import LocalExecutor

MIDDLE = {
    **TINY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "max_position_embeddings": 1024,
}


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_peak_stays_within_the_plan(tmp_path: Path, stored: str):
    write_model(tmp_path, MIDDLE, llama_tensors(MIDDLE, stored))
    budget = ChunkedPrefill(256)
    tracemalloc.start()
    try:
        model = load_model(tmp_path)
        plan = MemoryPlan.fit(
            model.config, model.program, max_batch_tokens=256, max_running=budget.max_running
        )
        executor = LocalExecutor(
            model.program,
            model.weights,
            model.rope,
            num_frames=plan.num_frames,
            frame_bytes=plan.frame_bytes,
            pages_per_frame=plan.pages_per_frame,
        )
        resident = tracemalloc.get_traced_memory()[0]
        limits = EngineLimits(
            vocab_size=4000, max_context=1024, num_pages=plan.num_pages, pages_per_frame=plan.pages_per_frame
        )
        engine = Engine(executor, limits, budget=budget)
        rng = np.random.default_rng(0)
        for i, length in enumerate([900, 300, 40, 7]):
            params = SamplingParams(temperature=1.0, seed=i, max_tokens=4, logprobs=5)
            prompt = rng.integers(0, 4000, length).tolist()
            engine.add_request(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
        while engine.has_work:
            engine.step()
        peak = tracemalloc.get_traced_memory()[1]
        executor.close()
    finally:
        tracemalloc.stop()
    fixed = plan.weight_bytes + plan.rope_bytes + plan.kv_bytes
    # Padding of packed weights, and the Python objects around everything.
    assert resident <= 1.05 * fixed + (2 << 20)
    assert peak - resident <= plan.workspace_bytes
    assert resident > 0.8 * fixed


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")
@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
@pytest.mark.parametrize(
    ("dtype", "weights", "num_threads", "experts"),
    [
        ("float32", "auto", 1, False),
        ("bfloat16", "int8", 2, False),
        ("bfloat16", "int4", 4, False),
        ("float32", "auto", 2, True),
        ("bfloat16", "int8", 2, True),
    ],
)
def test_native_steps_stay_within_the_plan(
    tmp_path: Path, dtype: str, weights: str, num_threads: int, experts: bool
):
    vocab_size, length = 60_000, 4096
    config = MIDDLE | {"vocab_size": vocab_size, "num_key_value_heads": 1, "max_position_embeddings": length}
    config |= {"hidden_size": 64, "intermediate_size": 176}
    if experts:
        config |= MIXTRAL | {"intermediate_size": 1024}
    tensors = mixtral_tensors(config) if experts else llama_tensors(config)
    directory = write_model(tmp_path, config, tensors)
    program = describe_model(directory).program
    pool = extension.thread_pool(num_threads)
    packer = WeightPacker(program, dtype, pool, roundings(program, weights))  # type: ignore[arg-type]
    model = load_model(directory, dtype=dtype, weights=weights, packer=packer)
    plan = MemoryPlan.fit(
        model.config, program, max_batch_tokens=256, max_running=2, dtype=dtype, kv_dtype=dtype,
        weights=weights, kernels="native", num_threads=num_threads,
    )  # fmt: skip
    executor = LocalExecutor(
        program, model.weights, model.rope, num_frames=plan.num_frames, frame_bytes=plan.frame_bytes,
        pages_per_frame=plan.pages_per_frame, dtype=dtype, kv_dtype=dtype, num_threads=num_threads,
        kernels="native", pool=pool,
    )  # fmt: skip
    before = resident_bytes()
    tokens = np.random.default_rng(0).integers(0, vocab_size, length).tolist()
    pages = range(length // 16)
    starts = [*range(0, length, 256), length - 48, length - 1, length - 100]
    for start in starts:
        rows = min(256, length - start)
        run = Run(tokens, start, start + rows, pages)
        entries = [Entry(row, temperature=1.0, top_p=0.9, num_logprobs=5) for row in range(min(rows, 64))]
        step(executor, make_batch([run], entries))
    taken = resident_bytes() - before
    executor.close()
    # Huge pages that are filled in part, and what Python keeps.
    assert taken <= plan.workspace_bytes + plan.kv_bytes + (12 << 20)
    assert taken > 0.5 * plan.workspace_bytes
