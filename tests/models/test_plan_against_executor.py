"""A memory plan must cover what an executor really takes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.models.hf_fixtures import TINY, llama_tensors, write_model
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.models.loading import load_model
from tokenloom.models.memory_plan import MemoryPlan
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
