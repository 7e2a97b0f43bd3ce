"""Each architecture of GGUF that is served, against the model of transformers that was written to the file."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.harness import Numerics, each_numerics, page_bytes_of
from tests.models.gguf_fixtures import VOCAB, all_float32, random_model, torch, transformers, write_gguf
from tests.models.test_families import logits_of
from tokenloom.errors import ModelError
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.weights import WeightPacker
from tokenloom.models.gguf_names import NAMINGS
from tokenloom.models.loading import describe_model, load_model
from tokenloom.models.weight_sources import roundings
from tokenloom.runtime.local import LocalExecutor

LENGTH = 200
SHORT = 64
FACTORS = [1.0 + 0.3 * i for i in range(8)]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": FACTORS, "long_factor": FACTORS,
    "original_max_position_embeddings": 256,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 24}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "attention_bias": True}),
    "gemma2": ("Gemma2", {"head_dim": 20, "sliding_window": 37, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 32, "sliding_window": 50, "query_pre_attn_scalar": 32, "num_hidden_layers": 7},
    ),
    "phi3": ("Phi3", {"sliding_window": 130}),
    "phi3, partial": ("Phi3", {"hidden_size": 96, "partial_rotary_factor": 0.75}),
    "phi3, longrope": (
        "Phi3",
        {
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.5,
        },
    ),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    "stablelm, parallel": ("StableLm", {"use_parallel_residual": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3moe": (
        "Qwen3Moe",
        {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 20}
        | {"norm_topk_prob": True},
    ),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}),
}


class Written(NamedTuple):
    """A file and the logits of the model in it."""

    path: Path
    types: Mapping[str, str]
    expected: NDArray[np.float32]


def tokens() -> list[int]:
    return np.random.default_rng(1).integers(0, VOCAB, LENGTH).tolist()


FOLDER = tempfile.TemporaryDirectory(prefix="tokenloom-gguf-")


def written(name: str, kind: str, options: Mapping[str, Any], types: Any) -> Written:
    model = random_model(kind, options)
    path = Path(FOLDER.name) / f"{name}.gguf"
    stored = write_gguf(path, model, types)
    with torch.no_grad():
        logits = model(torch.tensor([tokens()])).logits[0].numpy()
    return Written(path, stored, logits)


@functools.cache
def family(name: str, half: bool = False) -> Written:
    types = (lambda name, shape: "F16") if half else all_float32
    return written(f"{name}-{half}", *FAMILIES[name], types)


def executor(path: Path, numerics: Numerics, weights: str = "auto") -> LocalExecutor:
    """An executor on the file, as a server makes it."""
    packer = None
    if numerics.kernels == "native":
        program = describe_model(path, weights=weights).program
        rounded = roundings(program, weights)  # type: ignore[arg-type]
        packer = WeightPacker(program, numerics.dtype, extension.thread_pool(2), rounded)
    model = load_model(path, dtype=numerics.dtype, weights=weights, packer=packer)
    return LocalExecutor(
        model.program,
        model.weights,
        model.rope,
        num_frames=20,
        frame_bytes=page_bytes_of(model.program, numerics),
        pages_per_frame=1,
        dtype=model.dtype,
        kv_dtype=numerics.kv_dtype,
        num_threads=2,
        kernels=numerics.kernels,
    )


@pytest.mark.parametrize("name", FAMILIES)
@each_numerics(Numerics(), Numerics("native"))
def test_logits_equal_those_of_transformers(name: str, numerics: Numerics) -> None:
    """Prompt chunks, then single rows."""
    found = logits_of(executor(family(name).path, numerics), tokens(), [90, 70, *[1] * 20])
    assert np.abs(family(name).expected).max() > 1
    np.testing.assert_allclose(found, family(name).expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3"])
def test_float16_keeps_its_values(name: str) -> None:
    file = family(name, half=True)
    assert "F16" in file.types.values()
    found = logits_of(executor(file.path, Numerics()), tokens(), [LENGTH])
    np.testing.assert_allclose(found, file.expected, rtol=1e-4, atol=1e-4)


def test_every_architecture_is_here() -> None:
    covered = {name.split(",")[0] for name in FAMILIES} | {"llama"}
    assert set(NAMINGS) <= covered


MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K", "output": "Q6_K"}
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.1}


MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def of_type(kind: str) -> Any:
    return lambda name, shape: kind


def as_mixed(name: str, shape: tuple[int, ...]) -> str:
    """A mixture like llama.cpp's Q4_K_M: some tensors of a stack in 6 bits, others in 4."""
    return next((kind for part, kind in MIXED.items() if f".{part}." in f".{name}"), "Q4_K")


@functools.cache
def quantized(kind: str, architecture: str = "Llama") -> Written:
    options: dict[str, Any] = {}
    if architecture == "GPT2":
        options = {"n_embd": 256, "n_head": 4, "n_layer": 2, "n_positions": 256}
    if architecture == "Granite":
        options = {"attention_multiplier": 0.125}
    if architecture in MIXTURES:
        options = MIXTURES[architecture]
    types = as_mixed if kind == "mixed" else of_type(kind)
    return written(f"{kind}-{architecture}", architecture, LARGE | options, types)


QUANTIZED = ["BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q5_1", "Q4_K", "Q4_1", "Q4_0", "mixed"]


@pytest.mark.parametrize("kind", QUANTIZED)
@each_numerics(Numerics(), Numerics("native"))
def test_widened_blocks_have_their_values(kind: str, numerics: Numerics) -> None:
    """--weights float: logits of transformers with the values that the gguf package gives."""
    file = quantized(kind)
    expected = file.expected[:SHORT]
    assert set(file.types.values()) > {"F32"}
    found = logits_of(executor(file.path, numerics, "float"), tokens()[:SHORT], [40, 24])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("architecture", ["GPT2", "Phi3", "Gemma2", "Granite", *MIXTURES])
def test_blocks_that_are_turned_fused_or_interleaved(architecture: str) -> None:
    file = quantized("mixed", architecture)
    expected = file.expected[:SHORT]
    found = logits_of(executor(file.path, Numerics(), "float"), tokens()[:SHORT], [SHORT])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("architecture", ["GPT2", "Phi3", "Gemma2", "Granite", *MIXTURES])
@each_numerics(Numerics("native", "bfloat16", "bfloat16"))
def test_and_the_native_kernels_pack_them(architecture: str, numerics: Numerics) -> None:
    file = quantized("mixed", architecture)
    expected = file.expected[:SHORT]
    text = tokens()[:SHORT]
    for weights, bound in (("int8", 0.25), ("auto", 0.6)):
        made = executor(file.path, numerics, weights)
        found = logits_of(made, text, [SHORT])
        assert np.abs(found - expected).mean() < bound * np.abs(expected).mean()
        assert (logits_of(made, text, [33, 1, 29, 1]) == found).all()


# Mean distance of logits, relative to their mean size; random weights are hard on it. Another model is above 1.
BOUNDS = {"BF16": 1e-4, "Q4_1": 0.5, "Q4_K": 0.5, "mixed": 0.3}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_repacked_blocks_stay_near(kind: str, weights: str) -> None:
    """The numpy backend leaves activations alone, so this is what repacking costs."""
    file = quantized(kind)
    expected = file.expected[:SHORT]
    found = logits_of(executor(file.path, Numerics(), weights), tokens()[:SHORT], [SHORT])
    bound = BOUNDS.get(kind, 0.1) if weights == "auto" else 0.1
    assert np.abs(found - expected).mean() < bound * np.abs(expected).mean()


@pytest.mark.parametrize("weights", ["auto", "int8", "int4", "float"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "mixed"])
@pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")
def test_both_backends_have_the_same_weights(kind: str, weights: str) -> None:
    file = quantized(kind)
    native = logits_of(executor(file.path, Numerics("native"), weights), tokens()[:SHORT], [SHORT])
    numpy = logits_of(executor(file.path, Numerics(), weights), tokens()[:SHORT], [SHORT])
    # The native kernels round activations to 8 bits where weights are integers.
    bound = 1e-4 if weights == "float" else 0.12
    assert np.abs(native - numpy).mean() < bound * np.abs(numpy).mean()


def test_a_file_whose_rows_are_no_heads(tmp_path: Path) -> None:
    model = random_model("Llama", {})
    path = tmp_path / "model.gguf"
    write_gguf(path, model)
    data = bytearray(path.read_bytes())
    at = data.index(b"llama.attention.head_count") + len(b"llama.attention.head_count") + 4
    data[at : at + 4] = (5).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ModelError, match="head_count"):
        load_model(path)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("Q8_0", "Llama"), ("Q4_0", "Llama"), ("mixed", "Llama"), ("Q8_0", "Qwen3Moe"), ("mixed", "Qwen3Moe")],
)
def test_logits_equal_those_of_transformers_own_reader(kind: str, architecture: str) -> None:
    """Here transformers reads the file by itself; of experts it is told what it does not read."""
    file = quantized(kind, architecture)
    told = {
        name: MIXTURES.get(architecture, {}).get(name) for name in ("moe_intermediate_size", "norm_topk_prob")
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.path.parent, gguf_file=file.path.name, dtype=torch.float32,
        **{name: value for name, value in told.items() if value is not None},
    )  # fmt: skip
    with torch.no_grad():
        theirs = model(torch.tensor([tokens()[:SHORT]])).logits[0].numpy()
    found = logits_of(executor(file.path, Numerics(), "float"), tokens()[:SHORT], [SHORT])
    np.testing.assert_allclose(found, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
