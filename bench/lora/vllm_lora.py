"""vLLM on the CPU with adapters, in its own environment; the last line is the result."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import vllm
from cases import Choice, Prompts
from rounds import Case, Referee, say
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

MAX_RANK = 64


def main() -> None:
    spec: dict[str, Any] = json.loads(sys.argv[1])
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    shape = cases.shape_of(spec["quick"])
    config = json.loads((Path(spec["model"]) / "config.json").read_text(encoding="utf-8"))
    options: dict[str, Any] = {
        "model": spec["model"],
        "dtype": "bfloat16",
        "max_model_len": min(spec["max_context"], config["max_position_embeddings"]),
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    if spec["lora"]:
        options |= {"enable_lora": True, "max_loras": shape.requests, "max_lora_rank": MAX_RANK}
        options |= {"max_cpu_loras": len(spec["adapters"])}
    started = time.perf_counter()
    llm = LLM(**options)
    start_seconds = time.perf_counter() - started
    say(f"  vLLM is there after {start_seconds:.0f} s")
    requests = [
        LoRARequest(Path(path).name, number + 1, path) for number, path in enumerate(spec["adapters"])
    ]

    def serve(prompts: Prompts, num_output: int, adapters: Sequence[Choice]) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True, detokenize=False)
        lora = [None if number is None else requests[number] for number in adapters]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            params,
            use_tqdm=False,
            lora_request=lora if spec["lora"] else None,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    first_tokens: dict[str, list[int]] = {}
    count = shape.requests
    measured: dict[str, Case] = {
        "base": cases.decode(serve, shape, [None] * count, first_tokens),
        "prefill": cases.prefill(serve, shape, None),
    }
    if spec["lora"]:
        measured["distinct"] = cases.decode(serve, shape, list(range(count)), first_tokens)
        measured["prefill_adapter"] = cases.prefill(serve, shape, count)
    found = Referee.of(spec).measure(measured)
    result: dict[str, Any] = {"version": vllm.__version__, "start_seconds": start_seconds}
    if spec["lora"]:
        result["distinct_over_base"] = found.ratio("distinct", "base", "decode_tok_s")
        result["prefill_adapter_over_base"] = found.ratio("prefill_adapter", "prefill", "prefill_tok_s")
    print(json.dumps(result | {"first_tokens": first_tokens} | found.summary()), file=report, flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
