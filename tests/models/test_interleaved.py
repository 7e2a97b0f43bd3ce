"""Fused tensors whose rows lie head by head, in every format, and what old GPT-NeoX checkpoints hold besides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.format_fixtures import STORED, make_stored
from tests.models.hf_fixtures import TINY, llama_tensors, write_model
from tests.models.quantized_fixtures import DOWN
from tokenloom.errors import ModelError
from tokenloom.kernels.program import Program
from tokenloom.kernels.program_check import check_program
from tokenloom.models.checkpoint import Checkpoint
from tokenloom.models.hf_config import parse_config
from tokenloom.models.loading import describe_model, load_model, load_weights
from tokenloom.models.memory_plan import native_building_bytes
from tokenloom.models.weight_sources import weight_sources

WEIGHT = f"{DOWN}.weight"
PARTS = (5, 2, 1)


def interleaved(program: Program, parts: tuple[int, ...] = PARTS) -> Program:
    weights = tuple(replace(w, interleaved=parts) if w.name == WEIGHT else w for w in program.weights)
    return replace(program, weights=weights)


def part_by_part(tensor: np.ndarray) -> np.ndarray:
    groups = tensor.reshape(-1, 8, *tensor.shape[1:])
    cuts = (groups[:, :5], groups[:, 5:7], groups[:, 7:])
    return np.concatenate([part.reshape(-1, *tensor.shape[1:]) for part in cuts])


@pytest.mark.parametrize("name", STORED)
def test_quantised_rows_move_with_their_scales(tmp_path: Path, name: str) -> None:
    packed, _, config = make_stored(STORED[name])
    directory = write_model(tmp_path, config, packed)
    described = describe_model(directory)
    program = interleaved(described.program)
    with Checkpoint.open(directory) as checkpoint:
        straight = load_weights(described.program, checkpoint)[WEIGHT]
        found = load_weights(program, checkpoint)[WEIGHT]
        sources = next(
            sources for spec, sources in weight_sources(program, checkpoint) if spec.name == WEIGHT
        )
    assert (found == part_by_part(straight)).all()
    assert (found != straight).any()
    source = sources[0]
    # A copy is made of what was unpacked: both are there for a moment.
    parts = [source] if isinstance(source, np.ndarray) else [source.q, source.scales]
    assert native_building_bytes(described.config, program, {}) >= 2 * sum(part.nbytes for part in parts)


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_plain_rows(tmp_path: Path, weights: str, dtype: str, transposed: bool) -> None:
    tensors = llama_tensors(TINY, dtype)
    directory = write_model(tmp_path / "straight", TINY | {"torch_dtype": dtype}, tensors)
    straight = load_model(directory, weights=weights)
    bent = interleaved(straight.program)
    bent = replace(
        bent, weights=tuple(replace(w, transposed=transposed and w.name == WEIGHT) for w in bent.weights)
    )
    stored = tensors | ({WEIGHT: np.ascontiguousarray(tensors[WEIGHT].T)} if transposed else {})
    with Checkpoint.open(write_model(tmp_path / "bent", TINY, stored)) as checkpoint:
        found = load_weights(bent, checkpoint, weights=weights)[WEIGHT]
    assert (found == part_by_part(straight.weights[WEIGHT])).all()


def test_what_cannot_be_interleaved(tmp_path: Path) -> None:
    program = describe_model(write_model(tmp_path, TINY, llama_tensors(TINY))).program
    check_program(interleaved(program))
    for parts in ((5, 2), (8, 0), (33,)):
        with pytest.raises(ValueError, match="interleaved"):
            check_program(interleaved(program, parts))
    weights = tuple(replace(w, interleaved=(4, 4)) if len(w.sources) > 1 else w for w in program.weights)
    with pytest.raises(ValueError, match="interleaved"):
        check_program(replace(program, weights=weights))


# --- GPT-NeoX ----------------------------------------------------------------------------------------------

NEOX: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rotary_pct": 0.5,
    "rotary_emb_base": 5000,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float16",
}


def neox_tensors(mask: str = "uint8") -> dict[str, np.ndarray]:
    """Random tensors as published checkpoints hold them, masks and frequencies included."""
    rng = np.random.default_rng(0)
    hidden, inner, vocab = NEOX["hidden_size"], NEOX["intermediate_size"], NEOX["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"embed_in.weight": (vocab, hidden)}
    linears = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for name, shape in linears.items():
        shapes |= {f"layers.0.{name}.weight": shape, f"layers.0.{name}.bias": shape[:1]}
    shapes |= {"final_layer_norm.weight": (hidden,), "final_layer_norm.bias": (hidden,)}
    tensors = {f"gpt_neox.{n}": rng.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    tensors["embed_out.weight"] = rng.standard_normal((vocab, hidden)).astype(np.float16)
    attention = "gpt_neox.layers.0.attention."
    tensors[attention + "bias"] = np.tri(64, dtype=mask)[None, None]
    tensors[attention + "masked_bias"] = np.array(-1e9, np.float32)
    tensors[attention + "rotary_emb.inv_freq"] = np.ones(4, np.float16)
    return tensors


@pytest.mark.parametrize("mask", ["uint8", "bool"])
def test_masks_of_published_checkpoints(tmp_path: Path, mask: str) -> None:
    model = load_model(write_model(tmp_path, NEOX, neox_tensors(mask)))
    assert model.config.dtype == "float16"
    assert (model.config.rope.rotary_dim, model.config.rope.theta) == (8, 5000)
    fused = neox_tensors()["gpt_neox.layers.0.attention.query_key_value.weight"]
    found = model.weights["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert (found == fused.reshape(2, 3, 16, 32).swapaxes(0, 1).reshape(96, 32)).all()


@pytest.mark.parametrize(
    ("name", "shape"), [("bias", (64, 64)), ("bias", (1, 1, 64, 63)), ("masked_bias", (2,)), ("scale", (1,))]
)
def test_what_is_no_mask_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = neox_tensors() | {f"gpt_neox.layers.0.attention.{name}": np.ones(shape, np.float32)}
    with pytest.raises(ModelError, match=rf"unexpected gpt_neox\.layers\.0\.attention\.{name}"):
        load_model(write_model(tmp_path, NEOX, tensors))


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    config, tensors = NEOX | {"tie_word_embeddings": True}, neox_tensors()
    with pytest.raises(ModelError, match=r"embed_out\.weight that differs from gpt_neox\.embed_in"):
        load_model(write_model(tmp_path, config, tensors))
    tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"]
    assert "embed_out.weight" not in load_model(write_model(tmp_path, config, tensors)).weights


@pytest.mark.parametrize(
    ("model_type", "fields", "field"),
    [
        ("gpt_neox", {"hidden_act": "silu"}, "hidden_act"),
        ("gpt_neox", {"hidden_act": ["gelu"]}, "hidden_act"),
        ("gpt_neox", {"head_dim": 8}, "head_dim"),
        ("gpt_neox", {"rotary_pct": 0.2}, "partial_rotary_factor"),
        ("gpt_neox", {"layer_norm_eps": -1}, "layer_norm_eps"),
        ("gpt_neox", {"use_parallel_residual": 1}, "use_parallel_residual"),
        ("starcoder2", {"hidden_act": "quick_gelu"}, "hidden_act"),
        ("starcoder2", {"norm_epsilon": "1e-5"}, "norm_epsilon"),
        ("starcoder2", {"sliding_window": 0}, "sliding_window"),
        ("starcoder2", {"use_bias": "no"}, "use_bias"),
    ],
)
def test_fields_that_are_refused(model_type: str, fields: dict[str, Any], field: str) -> None:
    kind = {"gpt_neox": "GPTNeoX", "starcoder2": "Starcoder2"}[model_type]
    config = NEOX | {"model_type": model_type, "architectures": [f"{kind}ForCausalLM"]}
    parse_config(config)
    with pytest.raises(ModelError, match=field):
        parse_config(json.loads(json.dumps(config | fields)))
