"""transformers with peft; the last line is the result."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import cases
import peft
import torch
import transformers
from cases import Choice, Prompts
from rounds import Case, Referee
from transformers import AutoModelForCausalLM

NO_TOKEN = -1
"""As the end of text: never generated, so nothing ends early."""
ALONE = 4
"""Requests that are measured one after another."""
BASE = "__base__"
"""What peft calls the model itself in a mixed batch."""


class Peft:
    """The model in bf16 with every adapter loaded under its number."""

    def __init__(self, spec: dict[str, Any]) -> None:
        warnings.filterwarnings("ignore")
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(spec["threads"])
        base = AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        first, *others = spec["adapters"]
        self._model = peft.PeftModel.from_pretrained(base, first, adapter_name="0").eval()
        for number, path in enumerate(others, 1):
            self._model.load_adapter(path, adapter_name=str(number))

    def mixed(self, prompts: Prompts, num_output: int, adapters: Sequence[Choice]) -> list[list[int]]:
        """One batch."""
        ids = torch.tensor(prompts)
        options: dict[str, Any] = {}
        if any(number is not None for number in adapters):
            options["adapter_names"] = [BASE if number is None else str(number) for number in adapters]
        with torch.inference_mode():
            if options:
                return self._generate(ids, num_output, options)
            with self._model.disable_adapter():
                return self._generate(ids, num_output, options)

    def one_by_one(self, prompts: Prompts, num_output: int, adapters: Sequence[Choice]) -> list[list[int]]:
        """A batch of one for each request, with its adapter active."""
        outputs = []
        for prompt, number in zip(prompts, adapters, strict=True):
            self._model.set_adapter(str(number))
            with torch.inference_mode():
                outputs += self._generate(torch.tensor([prompt]), num_output, {})
        return outputs

    def _generate(self, ids: torch.Tensor, num_output: int, options: dict[str, Any]) -> list[list[int]]:
        sequences = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_output,
            do_sample=False,
            eos_token_id=NO_TOKEN,
            pad_token_id=0,
            **options,
        )
        found: list[list[int]] = sequences[:, ids.shape[1] :].tolist()
        return found


def main() -> None:
    spec: dict[str, Any] = json.loads(sys.argv[1])
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    shape = cases.shape_of(spec["quick"])
    model = Peft(spec)
    count = shape.requests
    first_tokens: dict[str, list[int]] = {}
    everyone: list[Choice] = list(range(count))
    measured: dict[str, Case] = {
        "base": cases.decode(model.mixed, shape, [None] * count, first_tokens),
        "distinct": cases.decode(model.mixed, shape, everyone, first_tokens),
        "one_by_one": cases.decode(model.one_by_one, shape, everyone[: min(ALONE, count)]),
        "prefill": cases.prefill(model.mixed, shape, None),
        "prefill_adapter": cases.prefill(model.one_by_one, shape, count),
    }
    found = Referee.of(spec).measure(measured)
    result = {
        "versions": {"peft": peft.__version__, "transformers": transformers.__version__},
        "distinct_over_base": found.ratio("distinct", "base", "decode_tok_s"),
        "one_by_one_over_base": found.ratio("one_by_one", "base", "decode_tok_s"),
        "prefill_adapter_over_base": found.ratio("prefill_adapter", "prefill", "prefill_tok_s"),
        "first_tokens": first_tokens,
    }
    print(json.dumps(result | found.summary()), file=report, flush=True)


if __name__ == "__main__":
    main()
