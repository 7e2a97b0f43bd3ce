"""Llama against the implementation of transformers, in fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.harness import (
    MAX_CONTEXT,
    NATIVE,
    Entry,
    Numerics,
    Run,
    each_numerics,
    make_batch,
    page_bytes_of,
    rope_tables,
    small_config,
    step,
)
from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.models.config import ModelConfig
from tokenloom.models.llama import build
from tokenloom.runtime.local import LocalExecutor

torch = pytest.importorskip("torch", reason="torch is the oracle here")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

FLOAT32 = (Numerics(), NATIVE[0])

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True, "vocab_size": 128},
    "multi-head": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 16, "hidden_size": 48},
    "multi-query": {"num_heads": 6, "num_kv_heads": 1, "head_dim": 8, "hidden_size": 48},
    "wide heads": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 80, "vocab_size": 257},
    "biases": {"attention_bias": True, "output_bias": True, "mlp_bias": True, "num_layers": 1},
    "larger": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 32,
    },
}


def hugging_face(config: ModelConfig) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=MAX_CONTEXT,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            attn_implementation="eager",
            initializer_range=0.15,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def executor_of(config: ModelConfig, model: Any, numerics: Numerics, num_threads: int = 2) -> LocalExecutor:
    program = build(config)
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    weights = {spec.name: np.concatenate([state[name] for name in spec.sources]) for spec in program.weights}
    return LocalExecutor(
        program,
        weights,
        rope_tables(config.head_dim),
        num_frames=40,
        frame_bytes=page_bytes_of(program, numerics),
        pages_per_frame=1,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        num_threads=num_threads,
        kernels=numerics.kernels,
        isa=numerics.isa,
    )


def logits_of(executor: LocalExecutor, tokens: list[int], chunk: int) -> NDArray[np.float32]:
    """Teacher-forced logits [n, vocabulary], the text cut into chunks."""
    pages = list(range(39, 39 - len(tokens) // PAGE_SIZE - 1, -1))
    found = []
    for start in range(0, len(tokens), chunk):
        run = Run(tokens, start, min(start + chunk, len(tokens)), pages)
        rows = np.arange(run.end - run.start, dtype=np.int32)
        step(executor, make_batch([run], [Entry(int(row)) for row in rows]))
        found += [executor.backend.logits(rows[i : i + 64]).copy() for i in range(0, len(rows), 64)]
    return np.concatenate(found)


@each_numerics(*FLOAT32)
@pytest.mark.parametrize("name", SHAPES)
def test_logits(name: str, numerics: Numerics) -> None:
    config = small_config(**SHAPES[name])
    model = hugging_face(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 200).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    found = logits_of(executor_of(config, model, numerics), tokens, 90)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    best = np.sort(expected, axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-5
    assert clear.mean() > 0.9
    assert (found.argmax(axis=1) == expected.argmax(axis=1))[clear].all()


@each_numerics(*FLOAT32)
def test_greedy_generation(numerics: Numerics) -> None:
    config = small_config(**SHAPES["larger"])
    model = hugging_face(config)
    executor = executor_of(config, model, numerics)
    prompt = np.random.default_rng(2).integers(0, config.vocab_size, 20).tolist()
    tokens = list(prompt)
    for _ in range(30):
        start = 0 if len(tokens) == len(prompt) else len(tokens) - 1
        run = Run(tokens, start, len(tokens), range(4))
        entry = Entry(row=len(tokens) - start - 1)
        tokens.append(int(step(executor, make_batch([run], [entry])).token_ids[0]))
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    for position in range(len(prompt), len(tokens)):
        row = expected[position - 1]
        first, second = np.argsort(-row)[:2]
        if row[first] - row[second] > 1e-5:
            assert tokens[position] == first


@each_numerics(
    Numerics(dtype="bfloat16"),
    Numerics(dtype="bfloat16", kv_dtype="bfloat16"),
    Numerics("native", "bfloat16"),
    Numerics("native", "bfloat16", "bfloat16"),
    Numerics("native", "bfloat16", "int8"),
)
def test_bfloat16_stays_near(numerics: Numerics) -> None:
    config = small_config()
    model = hugging_face(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 60).tolist()
    expected = logits_of(executor_of(config, model, Numerics()), tokens, 60)
    found = logits_of(executor_of(config, model, numerics, 1), tokens, 60)
    assert 0 < np.abs(found - expected).mean() < 0.02 * np.abs(expected).mean() + 0.02


def test_float16_weights_are_exact() -> None:
    config = small_config()
    model = hugging_face(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    tokens = list(range(40))
    expected = logits_of(executor_of(config, model, Numerics()), tokens, 40)
    half = executor_of(config, model.half(), Numerics(dtype="float16", kv_dtype="float32"))
    assert (logits_of(half, tokens, 40) == expected).all()
