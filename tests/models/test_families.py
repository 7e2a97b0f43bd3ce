"""Each family against the implementation of transformers, in fp32, and against itself in other formats.

A family is one line of `FAMILIES`: the name of its classes in transformers, and options that exercise what is its
own. The models are small and random.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.harness import (
    NATIVE,
    Entry,
    Numerics,
    Run,
    each_numerics,
    make_batch,
    page_bytes_of,
    prepared,
    step,
)
from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.kernels.native import extension
from tokenloom.kernels.program import Program
from tokenloom.models import registry
from tokenloom.models.config import ModelConfig
from tokenloom.models.loading import load_model
from tokenloom.models.rope import rope_tables
from tokenloom.runtime.local import LocalExecutor

torch = pytest.importorskip("torch", reason="torch is the oracle here")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

LENGTH = 200
SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 37}),
    "mistral, no window": ("Mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "gemma2": ("Gemma2", {"head_dim": 20, "sliding_window": 37, "query_pre_attn_scalar": 31}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": 50, "query_pre_attn_scalar": 20, "sliding_window_pattern": 3},
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.5,
            "attention_bias": True,
        },
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "hidden_size": 64, "partial_rotary_factor": 0.25}),
    "stablelm, parallel": ("StableLm", {"use_parallel_residual": True, "hidden_size": 64}),
    "gpt2": ("GPT2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "gpt2, exact gelu": (
        "GPT2",
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "activation_function": "gelu"},
    ),
    "gpt neox": ("GPTNeoX", {"hidden_size": 64}),
    "gpt neox, sequential": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "hidden_act": "gelu_fast",
            "attention_bias": False,
            "rotary_pct": 0.5,
        },
    ),
    "starcoder2": ("Starcoder2", {"sliding_window": 60}),
    "starcoder2, no biases": ("Starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    "opt": ("OPT", {"ffn_dim": 80, "word_embed_proj_dim": 48, "init_std": 0.15}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "sliding_window": 60}),
    "qwen3 moe": (
        "Qwen3Moe",
        {
            "num_experts": 20,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "head_dim": 16,
        },
    ),
    "qwen3 moe, every other": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 6, "moe_intermediate_size": 40, "decoder_sparse_step": 2},
    ),
    "qwen3 moe, windows": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "use_sliding_window": True,
            "sliding_window": 50,
            "max_window_layers": 2,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 17, "num_experts_per_tok": 4, "intermediate_size": 28}),
    "phi3": ("Phi3", {"sliding_window": 130}),
    "phi3, partial": ("Phi3", {"hidden_size": 64, "partial_rotary_factor": 0.75}),
}


def architecture(kind: str) -> str:
    return "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"


@functools.cache
def theirs(name: str) -> Any:
    """The model of transformers, its norms and biases shaken out of their ones and zeros."""
    kind, options = FAMILIES[name]
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config"))(
        **(SMALL | options)
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, architecture(kind))(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@functools.cache
def tokens(name: str) -> list[int]:
    return np.random.default_rng(1).integers(0, SMALL["vocab_size"], LENGTH).tolist()


@functools.cache
def expected(name: str) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = theirs(name)(torch.tensor([tokens(name)])).logits[0].numpy()
    return logits


@functools.cache
def loaded(name: str) -> tuple[ModelConfig, Program, dict[str, NDArray[Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        theirs(name).save_pretrained(folder)
        model = load_model(folder)
    return model.config, model.program, model.weights


def ours(name: str, numerics: Numerics, num_pages: int = 20, num_threads: int = 2) -> LocalExecutor:
    """Built from the files that transformers writes."""
    config, program, weights = loaded(name)
    return LocalExecutor(
        program,
        prepared(program, weights, numerics),
        rope_tables(config),
        num_frames=num_pages,
        frame_bytes=page_bytes_of(program, numerics),
        pages_per_frame=1,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        num_threads=num_threads,
        kernels=numerics.kernels,
        isa=numerics.isa,
    )


def logits_of(
    executor: LocalExecutor, text: list[int], chunks: list[int], adapter_slot: int = -1
) -> NDArray[np.float32]:
    """Teacher-forced logits [n, vocabulary], the text cut into chunks of these lengths in turn."""
    pages = list(range(19, 19 - len(text) // PAGE_SIZE - 1, -1))
    found, start = [], 0
    while start < len(text):
        end = min(start + chunks[len(found) % len(chunks)], len(text))
        rows = np.arange(end - start, dtype=np.int32)
        batch = make_batch([Run(text, start, end, pages)], [Entry(int(row)) for row in rows])
        batch.adapter_slots[:] = adapter_slot
        step(executor, batch)
        found.append(
            np.concatenate(
                [executor.backend.logits(rows[i : i + 64]).copy() for i in range(0, len(rows), 64)]
            )
        )
        start = end
    return np.concatenate(found)


@pytest.mark.column("fp32")
@pytest.mark.parametrize("name", FAMILIES)
@each_numerics(Numerics(), NATIVE[0])
def test_logits_equal_those_of_transformers(name: str, numerics: Numerics) -> None:
    """Prompt chunks, then single rows."""
    found = logits_of(ours(name, numerics), tokens(name), [90, 70, *[1] * 20])
    assert np.abs(expected(name)).max() > 1
    np.testing.assert_allclose(found, expected(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_shorter_context_leaves_learned_positions_alone(name: str, tmp_path: Path) -> None:
    theirs(name).save_pretrained(tmp_path)
    model = load_model(tmp_path, max_context=64)
    assert (model.config.max_context, len(model.rope[0])) == (64, 64)
    whole = loaded(name)[2]
    assert all((weight == whole[key]).all() for key, weight in model.weights.items())


def format_of(numerics: Numerics) -> str:
    """The column of a format in the table of docs/models.md."""
    return numerics.weights or ("int8 KV" if numerics.kv_dtype == "int8" else "bf16")


@pytest.mark.column.with_args(format_of)
@pytest.mark.parametrize("name", FAMILIES)
@each_numerics(*NATIVE[1:])
def test_formats_stay_near_and_do_not_depend_on_chunks(name: str, numerics: Numerics) -> None:
    whole = logits_of(ours(name, numerics), tokens(name), [LENGTH])
    assert (logits_of(ours(name, numerics), tokens(name), [33, 1, 64, 1, 1, 16]) == whole).all()
    # 4 bits cost random weights dearly; what has nothing to do with the model is farther than 1 away. Where a
    # router changes its mind a row may be anywhere, hence the median.
    bound = 0.7 if numerics.weights == "int4" else 0.06
    assert np.median(np.abs(whole - expected(name))) < bound * np.abs(expected(name)).mean()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")
def test_instruction_sets_give_the_same_bits(name: str) -> None:
    text = tokens(name)[:70]
    found = [
        logits_of(ours(name, Numerics("native", "bfloat16", "bfloat16", isa=isa)), text, [40, 1])
        for isa in extension.isas()
    ]
    for other in found[1:]:
        assert (other == found[0]).all()


def test_every_family_is_here() -> None:
    kinds = {kind for kind, _ in FAMILIES.values()}
    assert {family.architecture for family in registry.FAMILIES.values()} == set(map(architecture, kinds))
