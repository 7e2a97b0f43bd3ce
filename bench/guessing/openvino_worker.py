"""OpenVINO GenAI with a target model, in its own environment: one line of JSON in, one line out.

The argument says which model, which draft (none: prompt look-up) and how many threads. A request is {"options",
"prompts", "max_tokens"}, where no options mean plain decoding; the answer is {"token_ids", "seconds", "steps"}, as
`guessing.peer_engines.Decoded` has them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

CACHE_GB = 1


def open_pipeline(spec: dict[str, Any], **more: Any) -> openvino_genai.LLMPipeline:
    """Paged attention as by default, without a prefix cache; keys and values as wide as the weights."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.enable_prefix_caching = False
    return openvino_genai.LLMPipeline(
        spec["model"], "CPU", scheduler_config=scheduler, **properties(spec), **more
    )


def properties(spec: dict[str, Any]) -> dict[str, Any]:
    return {"INFERENCE_NUM_THREADS": spec["threads"], "KV_CACHE_PRECISION": "bf16"}


def decode(pipeline: openvino_genai.LLMPipeline, request: dict[str, Any], end_of_text: int) -> dict[str, Any]:
    """Greedy output for one prompt after another."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = request["max_tokens"]
    config.do_sample = False
    config.eos_token_id = end_of_text
    for name, value in request["options"].items():
        setattr(config, name, value)
    outputs, seconds, steps = [], 0.0, 0
    for prompt in request["prompts"]:
        started = time.perf_counter()
        result = pipeline.generate(openvino.Tensor(np.array([prompt], dtype=np.int64)), config)
        seconds += time.perf_counter() - started - result.perf_metrics.get_ttft().mean / 1e3
        outputs.append([int(token) for token in result.tokens[0]])
        # One entry for each step of the target: the tokens it gave. The first is that of the prompt.
        per_step = result.perf_metrics.raw_metrics.m_batch_sizes
        if sum(per_step) != len(outputs[-1]):
            raise RuntimeError(
                f"{sum(per_step)} tokens in {len(per_step)} steps, {len(outputs[-1])} came out"
            )
        steps += len(per_step) - 1
    return {"token_ids": outputs, "seconds": seconds, "steps": steps}


def main() -> None:
    spec: dict[str, Any] = json.loads(sys.argv[1])
    report = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    plain = open_pipeline(spec)
    if spec["draft"]:
        guess = {"draft_model": openvino_genai.draft_model(spec["draft"], "CPU", **properties(spec))}
    else:
        guess = {"prompt_lookup": True}
    speculative = open_pipeline(spec, **guess)
    versions = {"openvino": openvino.__version__, "openvino_genai": openvino_genai.__version__}
    print(json.dumps({"versions": versions}), file=report)
    for line in sys.stdin:
        request = json.loads(line)
        pipeline = speculative if request["options"] else plain
        print(json.dumps(decode(pipeline, request, spec["end_of_text"])), file=report)
    # Its destructors sometimes hang when the interpreter ends; there is nothing left to save.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
