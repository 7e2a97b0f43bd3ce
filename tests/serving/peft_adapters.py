"""Adapters that peft saves over the random model of two layers, and what transformers makes of them."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.models.hf_fixtures import TINY, safetensors_bytes
from tests.serving.helpers import VOCAB

INNER = TINY["intermediate_size"]
SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (INNER, 32),
    "mlp.up_proj": (INNER, 32),
    "mlp.down_proj": (32, INNER),
}
"""(outputs, inputs) of the linears of a layer."""


def write_adapter(directory: Path, seed: int, *, rank: int = 4, strength: float = 0.3) -> Path:
    """An adapter of all linears and the head, in the files that peft would write."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    places = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(TINY["num_hidden_layers"])
        for name, shape in SHAPES.items()
    }
    for name, (outputs, inputs) in (places | {"lm_head": (VOCAB, 32)}).items():
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = (rng.standard_normal(shape) * strength).astype(np.float32)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [name.rpartition(".")[2] for name in SHAPES] + ["lm_head"],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    return directory


@functools.cache
def _their_model(model: Path, adapter: Path | None) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    peft = pytest.importorskip("peft", reason="peft is the oracle here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_pretrained(str(model)).eval()
        return base if adapter is None else peft.PeftModel.from_pretrained(base, str(adapter)).eval()


def their_logits(model: Path, adapter: Path | None, tokens: list[int]) -> NDArray[np.float32]:
    """Logits [len(tokens), vocabulary] that transformers and peft compute."""
    torch = pytest.importorskip("torch", reason="torch is the oracle here")
    with torch.no_grad():
        found: NDArray[np.float32] = _their_model(model, adapter)(torch.tensor([tokens])).logits[0].numpy()
    return found


def agreement_with_peft(model: Path, adapter: Path | None, prompt: list[int], output: list[int]) -> int:
    """Tokens of a greedy output that were compared: those where peft's best two logits are 1e-5 apart."""
    logits = their_logits(model, adapter, [*prompt, *output])
    compared = 0
    for token, row in zip(output, logits[len(prompt) - 1 :], strict=False):
        second, best = np.sort(row)[-2:]
        if best - second > 1e-5:
            assert token == row.argmax()
            compared += 1
    return compared
