"""vLLM on the CPU, through its `LLM`. The environment variables it needs are set by variants.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import vllm
from vllm import LLM, SamplingParams
from workloads import Request

from backends import Engine

MAX_CONTEXT = 4096


class Backend:
    """Its defaults, but for the longest context, which the workloads do not need."""

    def __init__(self, engine: Engine) -> None:
        options = {
            "model": engine.model,
            "dtype": "bfloat16",
            "max_model_len": min(MAX_CONTEXT, longest_context(Path(engine.model))),
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        self._llm = LLM(**(options | engine.options))

    def generate(self, requests: list[Request]) -> list[list[int]]:
        params = [
            SamplingParams(temperature=0.0, max_tokens=request.num_output, ignore_eos=True, detokenize=False)
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def versions(self) -> dict[str, str]:
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "preload": " ".join(Path(part).name for part in os.environ.get("LD_PRELOAD", "").split(":")),
        }

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def longest_context(model: Path) -> int:
    """What the checkpoint allows; vLLM refuses to start with more."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return int(config["max_position_embeddings"])
