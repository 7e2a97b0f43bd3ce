"""Weights against what was written, and checkpoints that do not fit their configuration."""

from __future__ import annotations

import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.hf_fixtures import NUMPY_TYPES, TINY, llama_tensors, write_model
from tokenloom.errors import InvalidParameter, ModelError, TokenloomError
from tokenloom.kernels.program import Program
from tokenloom.models.checkpoint import Checkpoint
from tokenloom.models.config import ModelConfig
from tokenloom.models.hf_config import parse_config
from tokenloom.models.loading import describe_model, load_model, load_weights
from tokenloom.models.registry import build_program
from tokenloom.models.weight_sources import check_weights

Q, K, V = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
GATE, UP = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def expected(program: Program, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        spec.name: np.concatenate([tensors[source].astype(np.float32) for source in spec.sources])
        for spec in program.weights
    }


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("stored", NUMPY_TYPES)
@pytest.mark.parametrize("extra", [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 10}])
def test_auto_is_exact(tmp_path: Path, stored: str, num_shards: int, extra: dict[str, Any]):
    tensors = llama_tensors(TINY | extra, stored)
    write_model(
        tmp_path, TINY | extra, tensors, num_shards, generation={"eos_token_id": 7, "temperature": 0.5}
    )
    model = load_model(tmp_path)
    wanted = expected(model.program, tensors)
    assert model.weights.keys() == wanted.keys()
    for name, weight in model.weights.items():
        assert weight.dtype == NUMPY_TYPES[stored]
        assert weight.flags.c_contiguous
        assert (weight == wanted[name]).all()
    assert model.dtype == "float32"
    assert model.config.dtype == stored
    assert model.config.eos_token_ids == (7,)
    assert model.generation.temperature == 0.5
    assert model.rope[0].shape == (128, (extra.get("head_dim") or 8) // 2)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert model.content_id == checkpoint.content_id()


@pytest.mark.parametrize("stored", NUMPY_TYPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_types(tmp_path: Path, dtype: str, stored: str):
    tensors = llama_tensors(TINY, stored)
    write_model(tmp_path, TINY, tensors)
    model = load_model(tmp_path, dtype=dtype)
    assert model.dtype == dtype
    for name, weight in expected(model.program, tensors).items():
        assert model.weights[name].dtype == NUMPY_TYPES[dtype]
        assert (model.weights[name] == weight.astype(NUMPY_TYPES[dtype])).all()


def test_sources_of_different_types_are_widened(tmp_path: Path):
    tensors = llama_tensors(TINY, "bfloat16") | {K: llama_tensors(TINY, "float16")[K]}
    model = load_model(write_model(tmp_path, TINY, tensors))
    stacked = model.weights[f"{Q}+{K}+{V}"]
    assert stacked.dtype == np.float32
    assert (stacked == expected(model.program, tensors)[f"{Q}+{K}+{V}"]).all()
    assert model.weights["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert model.config.dtype == "bfloat16"


def test_rounding_matches_torch(tmp_path: Path):
    torch = pytest.importorskip("torch")
    tensors = llama_tensors(TINY)
    write_model(tmp_path, TINY, tensors)
    for dtype in ("bfloat16", "float16"):
        weight = load_model(tmp_path, dtype=dtype).weights["model.norm.weight"]
        theirs = torch.from_numpy(tensors["model.norm.weight"]).to(getattr(torch, dtype)).float().numpy()
        assert (weight.astype(np.float32) == theirs).all()


def test_value_that_overflows_the_type(tmp_path: Path):
    tensors = llama_tensors(TINY)
    tensors[UP][3, 4] = 1e6
    write_model(tmp_path, TINY, tensors)
    assert load_model(tmp_path, dtype="bfloat16").weights
    with pytest.raises(ModelError, match=f"{UP} with the value 1e\\+06.*float16"):
        load_model(tmp_path, dtype="float16")


def test_unknown_dtype(tmp_path: Path):
    with pytest.raises(InvalidParameter, match="dtype"):
        load_model(tmp_path, dtype="int8")


def test_tied_head_is_ignored_when_it_is_a_copy(tmp_path: Path):
    config = TINY | {"tie_word_embeddings": True}
    tensors = llama_tensors(config)
    plain = load_model(write_model(tmp_path / "plain", config, tensors))
    copy = tensors | {HEAD: tensors[EMBEDDING].copy()}
    copy["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    loaded = load_model(write_model(tmp_path / "copy", config, copy))
    assert loaded.weights.keys() == plain.weights.keys()
    assert HEAD not in loaded.weights
    copy[HEAD][5, 5] += 1
    with pytest.raises(ModelError, match="differs from model.embed_tokens.weight"):
        load_model(write_model(tmp_path / "other", config, copy))


def test_every_problem_is_listed(tmp_path: Path):
    tensors = llama_tensors(TINY)
    del tensors[K], tensors[HEAD]
    tensors["model.norm.weight"] = np.ones(33, np.float32)
    tensors["model.layers.9.extra"] = np.ones((2, 3), np.float32)
    write_model(tmp_path, TINY, tensors)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    for text in (
        f"missing {K}",
        f"missing {HEAD}",
        "model.norm.weight of shape [33] instead of [32]",
        "unexpected model.layers.9.extra [2, 3]",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "rows"),
    [(Q, K, (24, 24)), (K, V, (12, 20)), (GATE, UP, (40, 56))],
)
def test_parts_of_a_stack_are_checked_one_by_one(
    tmp_path: Path, first: str, second: str, rows: tuple[int, int]
):
    tensors = llama_tensors(TINY)
    assert len(tensors[first]) + len(tensors[second]) == sum(rows)
    for name, count in zip((first, second), rows, strict=True):
        tensors[name] = np.ones((count, 32), np.float32)
    write_model(tmp_path, TINY, tensors)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert first in str(caught.value)
    assert second in str(caught.value)


@pytest.mark.parametrize("shape", [(), (32,), (16, 32, 1), (32, 16)])
def test_wrong_dimensions(tmp_path: Path, shape: tuple[int, ...]):
    tensors = llama_tensors(TINY) | {V: np.ones(shape, np.float32)}
    write_model(tmp_path, TINY, tensors)
    with pytest.raises(ModelError, match="v_proj"):
        load_model(tmp_path)


def test_scalars_in_place_of_matrices(tmp_path: Path):
    config = TINY | {"tie_word_embeddings": True}
    scalar = np.ones((), np.float32)
    write_model(tmp_path, config, llama_tensors(config) | {HEAD: scalar, EMBEDDING: scalar})
    with pytest.raises(ModelError, match=r"embed_tokens\.weight of shape \[\]"):
        load_model(tmp_path)


def test_long_lists_of_problems_are_cut(tmp_path: Path):
    config = TINY | {"num_hidden_layers": 40}
    write_model(tmp_path, config, llama_tensors(TINY))
    with pytest.raises(ModelError, match="and 292 more"):
        load_model(tmp_path)


def test_nothing_is_allocated_before_the_check(tmp_path: Path):
    """A config that asks for terabytes is refused by comparing shapes."""
    config = TINY | {
        "vocab_size": 1 << 24,
        "hidden_size": 1 << 20,
        "head_dim": 8,
        "intermediate_size": 1 << 20,
    }
    write_model(tmp_path, config, llama_tensors(TINY))
    tracemalloc.start()
    with pytest.raises(ModelError, match=r"instead of \[16777216, 1048576\]"):
        load_model(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_optional_and_transposed_weights(tmp_path: Path):
    tensors = llama_tensors(TINY)
    tensors[EMBEDDING] = np.ascontiguousarray(tensors[EMBEDDING].T)
    write_model(tmp_path, TINY, tensors)
    program = build_program(parse_config(TINY))
    weights = tuple(replace(w, transposed=w.name == EMBEDDING) for w in program.weights)
    ghost = replace(weights[-1], name="ghost", sources=("ghost.a", "ghost.b"), optional=True)
    bent = replace(program, weights=(*weights, ghost))
    with Checkpoint.open(tmp_path) as checkpoint:
        loaded = load_weights(bent, checkpoint)
    assert "ghost" not in loaded
    assert (loaded[EMBEDDING] == tensors[EMBEDDING].T).all()
    tensors["ghost.a"] = np.ones((32, 32), np.float32)
    write_model(tmp_path, TINY, tensors)
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(ModelError, match=r"missing ghost\.b"):
        check_weights(bent, checkpoint)


def test_large_tensors_convert_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tokenloom.quantization.weights.BLOCK_ELEMENTS", 100)
    config = TINY | {"tie_word_embeddings": True}
    tensors = llama_tensors(config)
    tensors[HEAD] = tensors[EMBEDDING]
    write_model(tmp_path, config, tensors)
    model = load_model(tmp_path, dtype="bfloat16")
    for name, weight in expected(model.program, tensors).items():
        assert (model.weights[name] == weight.astype(ml_dtypes.bfloat16).astype(np.float32)).all()


def test_max_context(tmp_path: Path):
    write_model(tmp_path, TINY, llama_tensors(TINY))
    model = load_model(tmp_path, max_context=48)
    assert model.config.max_context == 48
    assert model.rope[1].shape == (48, 4)
    assert describe_model(tmp_path).config.max_context == 128
    with pytest.raises(InvalidParameter, match="max_context"):
        load_model(tmp_path, max_context=129)


def test_dynamic_rope_beyond_its_original_length(tmp_path: Path):
    write_model(tmp_path, TINY | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, llama_tensors(TINY))
    assert load_model(tmp_path).config.max_context == 128
    with pytest.raises(InvalidParameter, match="rope type 'dynamic' is served up to its original length 128"):
        load_model(tmp_path, max_context=256)


def test_progress(tmp_path: Path):
    tensors = llama_tensors(TINY, "bfloat16")
    write_model(tmp_path, TINY, tensors)
    calls: list[tuple[str, int, int]] = []
    load_model(tmp_path, progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert len(calls) == len(tensors)
    assert calls[-1] == ("weights", total, total)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_an_unknown_family_is_refused():
    config = parse_config(TINY)
    assert build_program(config).vocab_size == 64
    unknown: ModelConfig = replace(config, family="mystery")
    with pytest.raises(ModelError, match="mystery"):
        build_program(unknown)


_COMPLETE = llama_tensors(TINY | {"attention_bias": True, "mlp_bias": True}, "bfloat16")
_SMALL = st.sampled_from([*range(12), 16, 24, 32, 48, 64, 128, 1 << 20, -1, None, True, 2.5, "x", [2], {}])


@settings(max_examples=150)
@given(
    st.dictionaries(st.sampled_from(sorted(TINY)), _SMALL, max_size=2),
    st.lists(st.sampled_from(sorted(_COMPLETE)), max_size=2),
    st.booleans(),
)
def test_any_mutation_loads_or_is_refused(changes: dict[str, Any], dropped: list[str], has_bias: bool):
    """Numbers of the config changed, tensors dropped: a model, or an error that is meant for the user."""
    config = TINY | {"attention_bias": has_bias, "mlp_bias": has_bias} | changes
    kept = {name: t for name, t in _COMPLETE.items() if name not in dropped}
    if not has_bias:
        kept = {name: t for name, t in kept.items() if not name.endswith("bias")}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), config, kept)
        try:
            model = load_model(folder)
        except TokenloomError:
            return
    assert model.weights.keys() == {spec.name for spec in model.program.weights}
    assert len(model.rope[0]) == model.config.max_context
