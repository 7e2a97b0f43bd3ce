"""Two real checkpoints must say exactly what their authors' program says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.models.loading import load_model
from tokenloom.models.memory_plan import MemoryPlan
from tokenloom.runtime.local import LocalExecutor

# fmt: off
GREEDY: dict[str, list[tuple[list[int], list[int]]]] = {
    "stories3M": [
        (
            [1, 403, 407, 261, 378],
            [4016, 383, 286, 261, 376, 445, 395, 317, 4010, 338, 435, 267, 337, 590, 322, 265, 2236, 4010,
             385, 328, 4016, 358, 425, 267],
        ),
        (
            [1, 317, 269, 458, 425, 267, 265],
            [524, 335, 707, 4010, 342, 394, 261, 370, 1130, 269, 436, 267, 337, 353, 312, 4010, 707, 336,
             4016, 313, 2504, 795, 4016, 317],
        ),
        (
            [1, 291, 519, 286, 491, 613],
            [281, 286, 448, 1599, 4010, 346, 286, 1194, 387, 261, 1046, 267, 1000, 4010, 346, 394, 261, 370,
             539, 269, 281, 615, 281, 456],
        ),
    ],
    "stories260K": [
        (
            [1, 403, 407, 261, 378],
            [432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337, 410, 408, 419,
             292, 411, 322, 265, 282],
        ),
        (
            [1, 317, 269, 274, 287, 263, 377, 267, 265],
            [282, 295, 433, 426, 342, 394, 261, 370, 268, 414, 444, 335, 261, 370, 268, 414, 444, 426, 342,
             391, 266, 267, 337, 335],
        ),
    ],
}
# fmt: on


def greedy(engine: Engine, cases: list[tuple[list[int], list[int]]]) -> list[list[int]]:
    """The tokens that follow each prompt, all requests at once, as many as are listed."""
    for i, (prompt, wanted) in enumerate(cases):
        params = SamplingParams(temperature=0.0, max_tokens=len(wanted))
        engine.add_request(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    tokens: list[list[int]] = [[] for _ in cases]
    for _ in range(100):
        if not engine.has_work:
            break
        for delta in engine.step():
            tokens[int(delta.request_id)].extend(delta.token_ids)
    return tokens


@pytest.mark.parametrize("max_batch_tokens", [64, 8])
@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens(name: str, max_batch_tokens: int, shared_data: Path):
    model = load_model(shared_data / "models" / "hf" / name)
    budget = ChunkedPrefill(max_batch_tokens)
    plan = MemoryPlan.fit(
        model.config, model.program, max_batch_tokens=max_batch_tokens, max_running=budget.max_running
    )
    executor = LocalExecutor(
        model.program,
        model.weights,
        model.rope,
        num_frames=plan.num_frames,
        frame_bytes=plan.frame_bytes,
        pages_per_frame=plan.pages_per_frame,
    )
    limits = EngineLimits(
        vocab_size=model.config.vocab_size,
        max_context=model.config.max_context,
        num_pages=plan.num_pages,
        pages_per_frame=plan.pages_per_frame,
        eos_token_ids=model.config.eos_token_ids,
        debug=True,
    )
    engine = Engine(executor, limits, budget=budget)
    assert greedy(engine, GREEDY[name]) == [wanted for _, wanted in GREEDY[name]]
    executor.close()
