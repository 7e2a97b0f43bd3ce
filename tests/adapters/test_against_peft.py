"""Adapters that peft saved give the logits that peft computes, in fp32, for several families."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapters import peft_fixtures as fixtures
from tests.models import test_families as families
from tokenloom.adapters.adapter import Adapter
from tokenloom.adapters.peft_directory import read_adapter
from tokenloom.errors import ModelError
from tokenloom.models.weight_sources import source_rows

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, q and v": ("llama", {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "llama, everything, rslora": (
        "llama",
        {
            "r": 5,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": [*ATTENTION, *MLP, "lm_head", "embed_tokens"],
        },
    ),
    "llama, patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": [*ATTENTION, *MLP],
            "rank_pattern": {r"(k|v)_proj": 7, r"^model\.layers\.0\..*_proj": 2, "layers.2.mlp.up_proj": 1},
            "alpha_pattern": {
                "up_proj": 32,
                "layers.2.mlp.up_proj": 5,
                r"layers\.[12]\.self_attn\.q_proj": 1.5,
            },
        },
    ),
    "llama, a pattern of targets": (
        "llama",
        {
            "r": 3,
            "target_modules": r".*\.layers\.(0|2)\..*\.(q_proj|down_proj)",
            "exclude_modules": r".*\.2\.mlp.*",
        },
    ),
    "llama, some layers": (
        "llama",
        {
            "r": 3,
            "target_modules": ["k_proj", "up_proj"],
            "layers_to_transform": [1, 2],
            "layers_pattern": "layers",
        },
    ),
    "llama, one layer, exclusions": (
        "llama",
        {
            "r": 3,
            "target_modules": [*ATTENTION, *MLP],
            "layers_to_transform": 1,
            "exclude_modules": ["up_proj"],
        },
    ),
    "llama, all-linear": ("llama", {"r": 2, "target_modules": "all-linear", "use_rslora": True}),
    "qwen2, tied, head": ("qwen2", {"r": 4, "target_modules": ["lm_head", "o_proj"]}),
    "qwen2, tied, embedding": ("qwen2", {"r": 4, "target_modules": ["embed_tokens"]}),
    "qwen2, tied, both": ("qwen2", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "gate_proj"]}),
    "qwen3": ("qwen3", {"r": 6, "target_modules": [*ATTENTION, *MLP]}),
    "gemma2, all-linear": ("gemma2", {"r": 2, "target_modules": "all-linear"}),
    "gemma3, embedding": ("gemma3", {"r": 3, "target_modules": ["embed_tokens", "v_proj", "down_proj"]}),
    "granite, embedding": ("granite", {"r": 3, "target_modules": ["embed_tokens", "o_proj", "lm_head"]}),
    "olmo2": ("olmo2", {"r": 3, "target_modules": [*ATTENTION, *MLP]}),
    "stablelm": ("stablelm", {"r": 3, "target_modules": "all-linear"}),
    "phi3, fused": ("phi3", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]}),
    "gpt2, turned": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "fan_in_fan_out": True},
    ),
    "gpt2, all-linear": ("gpt2", {"r": 4, "target_modules": "all-linear"}),
    "opt": ("opt", {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}),
    "opt, embedding": ("opt", {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "gpt neox, head by head": (
        "gpt neox",
        {"r": 4, "target_modules": ["query_key_value", "dense_h_to_4h", "attention.dense"]},
    ),
    "gpt neox, all-linear": ("gpt neox, sequential", {"r": 2, "target_modules": "all-linear"}),
    "starcoder2": ("starcoder2", {"r": 4, "target_modules": "all-linear"}),
    "mixtral, attention": ("mixtral", {"r": 4, "target_modules": ATTENTION}),
    "qwen3 moe": ("qwen3 moe", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "a start that keeps the base: orthogonal": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    ),
    "a start that keeps the base: mica": (
        "llama",
        {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"},
    ),
    "a start that keeps the base: gaussian": (
        "opt",
        {"r": 4, "target_modules": ["fc1"], "init_lora_weights": "gaussian"},
    ),
}


def read(directory: Path, family: str) -> Adapter:
    _, program, _ = families.loaded(family)
    with fixtures.base_checkpoint(family) as checkpoint:
        return read_adapter(directory, program, source_rows=source_rows(program), checkpoint=checkpoint)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_peft(name: str, tmp_path: Path) -> None:
    family, options = CASES[name]
    fixtures.save(fixtures.peft_model(family, **options), tmp_path)
    adapter = read(tmp_path, family)
    model = fixtures.reloaded(family, tmp_path)
    expected = fixtures.their_logits(model, family)
    # The adapter matters: without it this test would compare the base model with itself.
    assert np.abs(expected - families.expected(family)[: fixtures.LENGTH]).max() > 0.1
    np.testing.assert_allclose(fixtures.our_logits(family, adapter), expected, rtol=1e-4, atol=1e-4)
    trained = {n.rpartition(".lora_")[0] for n, _ in model.named_parameters() if "lora_" in n}
    assert {f"base_model.model.{module.name}" for module in adapter.modules} == trained


# A start that changes the base weights: what peft computes is not what the tensors give over the original ones.
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_starts_that_change_the_base_are_refused(start: str, tmp_path: Path) -> None:
    model = fixtures.peft_model("llama", r=4, target_modules=["q_proj"], init_lora_weights=start)
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    original = families.theirs("llama").state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert (model.state_dict()[name] - original).abs().max() > 0.01
    with pytest.raises(ModelError, match="init_lora_weights"):
        read(fixtures.save(model, tmp_path), "llama")


UNSERVED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True, "target_modules": ["o_proj"]},
    "trainable_token_indices": {"trainable_token_indices": [3, 5]},
    "target_parameters": {"target_parameters": ["mlp.up_proj.weight"]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [3, 5]},
    "ensure_weight_tying": {"ensure_weight_tying": True, "target_modules": ["embed_tokens"]},
}


@pytest.mark.parametrize("field", UNSERVED)
def test_what_is_not_served_is_refused_as_peft_saves_it(field: str, tmp_path: Path) -> None:
    family = "qwen2" if field == "ensure_weight_tying" else "llama"
    options = {"r": 4, "target_modules": ["q_proj"]} | UNSERVED[field]
    with pytest.raises(ModelError, match=f"adapter_config.json: {field} = "):
        read(fixtures.save(fixtures.peft_model(family, **options), tmp_path), family)


def test_other_methods_are_refused_as_peft_saves_them(tmp_path: Path) -> None:
    peft = fixtures.peft
    for i, config in enumerate(
        (peft.IA3Config(task_type="CAUSAL_LM"), peft.LoKrConfig(target_modules=["q_proj"]))
    ):
        model = peft.get_peft_model(copy.deepcopy(families.theirs("llama")), config)
        with pytest.raises(ModelError, match="peft_type"):
            read(fixtures.save(model, tmp_path / str(i)), "llama")
