"""transformers: `generate` on static, left-padded batches, or its continuous batching (`mode: cb`)."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from workloads import Request

from backends import Engine

BATCH = 32
CACHE_GB = 2
PAGE_SIZE = 256
NO_TOKEN = -1
"""As the end of text: never generated, so nothing ends early."""


class Backend:
    """The model in bf16 with torch's own attention."""

    def __init__(self, engine: Engine) -> None:
        warnings.filterwarnings("ignore")
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(engine.threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            engine.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._batch = engine.options.get("batch", BATCH)
        self._continuous = engine.options.get("mode") == "cb"
        if self._continuous:
            self._start_continuous()

    def _start_continuous(self) -> None:
        config = self._model.config
        bytes_per_token = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 2
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=512, eos_token_id=NO_TOKEN, pad_token_id=0
            ),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                max_batch_tokens=2048,
                page_size=PAGE_SIZE,
                num_blocks=CACHE_GB * 2**30 // bytes_per_token // PAGE_SIZE,
            ),
        )
        self._manager.start()

    def generate(self, requests: list[Request]) -> list[list[int]]:
        return self._generate_continuous(requests) if self._continuous else self._generate_static(requests)

    def _generate_continuous(self, requests: list[Request]) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in requests]
        waiting = {
            self._manager.add_request(
                request.prompt, max_new_tokens=request.num_output, streaming=False
            ): index
            for index, request in enumerate(requests)
        }
        while waiting:
            result = self._manager.get_result(timeout=5)
            if result is None and not self._manager.is_running():
                raise RuntimeError("the continuous batching of transformers ended")
            if result is not None and result.is_finished():
                outputs[waiting.pop(result.request_id)] = list(result.generated_tokens)
        return outputs

    def _generate_static(self, requests: list[Request]) -> list[list[int]]:
        """Batches of requests of similar output length, which is the best a user of `generate` can do."""
        outputs: list[list[int]] = [[] for _ in requests]
        order = sorted(range(len(requests)), key=lambda i: (requests[i].num_output, len(requests[i].prompt)))
        for start in range(0, len(order), self._batch):
            group = order[start : start + self._batch]
            width = max(len(requests[index].prompt) for index in group)
            ids = torch.zeros(len(group), width, dtype=torch.long)
            mask = torch.zeros(len(group), width, dtype=torch.long)
            for row, index in enumerate(group):
                prompt = requests[index].prompt
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            with torch.inference_mode():
                sequences = self._model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=max(requests[index].num_output for index in group),
                    do_sample=False,
                    eos_token_id=NO_TOKEN,
                    pad_token_id=0,
                )
            for row, index in enumerate(group):
                outputs[index] = sequences[row, width : width + requests[index].num_output].tolist()
        return outputs

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def close(self) -> None:
        if self._continuous:
            self._manager.stop(block=True, timeout=10)
        # The threads of the manager may outlive it; there is nothing left to save.
        sys.stderr.flush()
        os._exit(0)
