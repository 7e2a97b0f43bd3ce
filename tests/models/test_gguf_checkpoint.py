"""A GGUF file as a checkpoint: its configuration, what is refused before anything is loaded, its identity."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.gguf_fixtures import VOCAB, gguf, random_model, write_gguf
from tokenloom.errors import InvalidParameter, ModelError, TokenloomError, UnsupportedFeature
from tokenloom.gguf.file import GgufFile
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.packed_forms import expected_forms, form_of
from tokenloom.kernels.native.sizes import form_bytes
from tokenloom.kernels.native.weight_cache import WeightCache
from tokenloom.kernels.native.weights import WeightPacker
from tokenloom.models.config import ExpertsConfig
from tokenloom.models.gguf_checkpoint import GgufCheckpoint
from tokenloom.models.loading import describe_model, load_model
from tokenloom.models.memory_plan import packed_weights
from tokenloom.models.model_files import open_checkpoint, read_architecture
from tokenloom.models.weight_sources import reading_bytes, roundings, stored_bytes
from tokenloom.text.tokenizer import Tokenizer

T = gguf.GGUFValueType
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, random_model("Llama", SMALL), lambda name, shape: "Q4_0" if "ffn" in name else "Q8_0")
    return path


@pytest.fixture(scope="module")
def mixture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routers and all experts in blocks."""
    path = tmp_path_factory.mktemp("gguf") / "mixture.gguf"
    types = {"ffn_gate_exps": "Q8_0", "ffn_up_exps": "Q4_0", "ffn_down_exps": "Q4_0", "ffn_gate_inp": "Q8_0"}
    model = random_model("Mixtral", SMALL | {"num_local_experts": 4})
    write_gguf(path, model, lambda name, shape: types.get(name.split(".")[-2], "F16"))
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(kind: str = "Llama", options: Any = None, **metadata: Any) -> Path:
        path = tmp_path / "model.gguf"
        changed = {key.replace("__", "."): value for key, value in metadata.items()}
        write_gguf(path, random_model(kind, SMALL | (options or {})), metadata=changed)
        return path

    return write


def u32(value: int) -> tuple[int, Any]:
    return value, T.UINT32


def f32(value: float) -> tuple[float, Any]:
    return value, T.FLOAT32


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"general__architecture": ("rwkv6", T.STRING)},
        "general.architecture = 'rwkv6'",
    ),
    "an architecture in figures": ({"general__architecture": u32(3)}, "general.architecture = 3"),
    "experts that nobody chooses": ({"llama__expert_count": u32(8)}, "without llama.expert_used_count"),
    "experts that are not there": (
        {"llama__expert_count": u32(2), "llama__expert_used_count": u32(1)},
        "missing model.layers.0.block_sparse_moe.gate.weight",
    ),
    "too many experts": ({"llama__expert_count": u32(1 << 20)}, "expert_count = 1048576"),
    "one part of several": ({"split__count": (3, T.UINT16)}, "split.count = 3"),
    "a key that is not known": ({"llama__attention__clamp_kqv": f32(8.0)}, "llama.attention.clamp_kqv"),
    "no layers": ({"llama__block_count": u32(0)}, "llama.block_count = 0"),
    "a million layers": ({"llama__block_count": u32(1 << 20)}, "llama.block_count"),
    "layers in words": ({"llama__block_count": ("2", T.STRING)}, "llama.block_count = '2'"),
    "layers by layer": ({"llama__attention__head_count_kv": ([2, 2], T.ARRAY, T.UINT32)}, "an array of 2"),
    "five heads": ({"llama__attention__head_count": u32(5)}, "head_count = 5"),
    "values of another size": ({"llama__attention__value_length": u32(8)}, "value_length = 8"),
    "half a rotation": ({"llama__rope__dimension_count": u32(8)}, "dimension_count = 8"),
    "an epsilon of nothing": ({"llama__attention__layer_norm_rms_epsilon": f32(0.0)}, "rms_norm_eps = 0"),
    "an epsilon that is none": (
        {"llama__attention__layer_norm_rms_epsilon": f32(float("nan"))},
        "rms_epsilon",
    ),
    "a base of 0": ({"llama__rope__freq_base": f32(0.0)}, "rope_theta = 0"),
    "another scaling": (
        {"llama__rope__scaling__type": ("longrope", T.STRING)},
        "rope.scaling.type = 'longrope'",
    ),
    "yarn of another kind": (
        {
            "llama__rope__scaling__type": ("yarn", T.STRING),
            "llama__rope__scaling__factor": f32(4.0),
            "llama__rope__scaling__yarn_log_multiplier": f32(0.1),
        },
        "yarn_log_multiplier",
    ),
    "both directions": ({"llama__attention__causal": (False, T.BOOL)}, "attention.causal = False"),
    "a scale that llama has not": ({"llama__attention__scale": f32(0.5)}, "attention.scale"),
    "a bos beyond": ({"tokenizer__ggml__bos_token_id": u32(VOCAB)}, "bos_token_id = 96"),
    "an end of turn beyond": ({"tokenizer__ggml__eot_token_id": u32(1 << 31)}, "eot_token_id"),
    "more tokens than rows": (
        {"tokenizer__ggml__tokens": ([f"t{i}" for i in range(VOCAB + 1)], T.ARRAY, T.STRING)},
        "at most the 96 tokens",
    ),
    "a wrong width": ({"llama__feed_forward_length": u32(97)}, r"gate_proj.weight of shape \[96, 64\]"),
    "a layer that is not there": ({"llama__block_count": u32(3)}, "missing model.layers.2"),
    "a layer too many": ({"llama__block_count": u32(1)}, "unexpected model.layers.1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_loaded(name: str, write: Callable[..., Path]) -> None:
    metadata, found = REFUSED[name]
    path = write(**metadata)
    with pytest.raises(ModelError, match=found.replace(".", r"\.") if "[" not in found else found):
        load_model(path)


MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no experts": ("Qwen3Moe", {"qwen3moe__expert_count": u32(0)}, "expert_count = 0"),
    "none chosen": ("Qwen3Moe", {"qwen3moe__expert_used_count": u32(0)}, "expert_used_count = 0"),
    "more chosen than there are": ("Qwen3Moe", {"qwen3moe__expert_used_count": u32(5)}, "from 1 to 4"),
    "another width": (
        "Qwen3Moe",
        {"qwen3moe__expert_feed_forward_length": u32(48)},
        r"experts\.0\.gate_proj.weight of shape \[32, 64\] instead of \[48, 64\]",
    ),
    "another number": (
        "Qwen3Moe",
        {"qwen3moe__expert_count": u32(3)},
        r"ffn_[a-z]+_exps.weight of shape \[4, ",
    ),
    "a width of their own": (
        "Olmoe",
        {"olmoe__expert_feed_forward_length": u32(32)},
        "feed_forward_length = 32",
    ),
    "a shared expert": ("Olmoe", {"olmoe__expert_shared_count": u32(1)}, "expert_shared_count, which is not"),
    "another scale": (
        "Qwen3Moe",
        {"qwen3moe__expert_weights_scale": f32(2.0)},
        "expert_weights_scale, which",
    ),
    "in a family without": ("Qwen3", {"qwen3__expert_count": u32(4)}, "qwen3.expert_count = 4"),
}


@pytest.mark.parametrize("name", MIXTURES_REFUSED)
def test_mixtures_that_are_refused(name: str, write: Callable[..., Path]) -> None:
    kind, metadata, found = MIXTURES_REFUSED[name]
    path = write(kind, MIXTURE if kind != "Qwen3" else {}, **metadata)
    with pytest.raises(ModelError, match=found):
        load_model(path)


def test_numbers_of_a_mixture(write: Callable[..., Path]) -> None:
    experts = read_architecture(write("Qwen3Moe", MIXTURE)).config.experts
    assert experts == ExpertsConfig(count=4, top_k=2, width=32, normalized=True)
    assert read_architecture(write("Olmoe", MIXTURE)).config.experts == replace(
        experts, width=96, normalized=False
    )
    mixtral = read_architecture(write("Mixtral", MIXTURE | {"num_local_experts": 4})).config
    assert (mixtral.family, mixtral.experts) == ("mixtral", replace(experts, width=96))
    # Files of early converters lack the key: llama.cpp divides.
    path = write("Qwen3Moe", MIXTURE | {"moe_intermediate_size": 48})
    data = path.read_bytes().replace(
        b"qwen3moe.expert_feed_forward_length", b"general.expert_feed_forward_lengths"
    )
    path.write_bytes(data)
    assert read_architecture(path).config.experts == replace(experts, width=48)
    load_model(path)


@pytest.mark.parametrize("weights", ["auto", "float", "int8", "int4"])
def test_routers_in_blocks_are_widened(tmp_path: Path, weights: Any) -> None:
    path = tmp_path / "model.gguf"
    model = random_model("Qwen3Moe", SMALL | MIXTURE)
    write_gguf(path, model, lambda name, shape: "Q4_0")
    described = describe_model(path, weights=weights)
    assert described.stored is not None
    router = "model.layers.1.mlp.gate.weight"
    assert described.stored[router] == (("float32", 0),)
    wanted = model.state_dict()[router].numpy()
    assert (load_model(path, weights=weights).weights[router] == wanted).all()
    down = "model.layers.1.mlp.experts.3.down_proj.weight"
    kinds = {"auto": ("int4", 32), "float": ("float32", 0), "int8": ("int8", 0), "int4": ("int4", 32)}
    assert described.stored[down] == (kinds[weights],)
    if weights in ("auto", "float", "int4"):
        stack = model.state_dict()["model.layers.1.mlp.experts.down_proj"].numpy()
        assert (load_model(path, weights=weights).weights[down] == stack[3]).all()


def test_a_missing_key_is_named(write: Callable[..., Path]) -> None:
    path = write()
    data = path.read_bytes()
    for key in ("block_count", "embedding_length", "attention.head_count", "context_length"):
        # Of the same length, so that everything else stays where it is.
        other = b"other." + b"x" * (len(f"llama.{key}") - 6)
        path.write_bytes(data.replace(f"llama.{key}".encode() + b"\4", other + b"\4", 1))
        with pytest.raises(ModelError, match=f"without llama.{key}"):
            read_architecture(path)


def test_numbers_of_the_configuration(write: Callable[..., Path]) -> None:
    path = write(
        tokenizer__ggml__eot_token_id=u32(7),
        general__sampling__temp=f32(0.7),
        general__sampling__top_k=(20, T.INT32),
    )
    architecture = read_architecture(path)
    config = architecture.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert (config.vocab_size, config.max_context, config.rms_norm_eps) == (VOCAB, 64, pytest.approx(1e-6))
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 7))
    assert architecture.generation.as_sampling() == {"temperature": 0.7, "top_k": 20}


def test_control_tokens_that_end_a_turn_stop(write: Callable[..., Path]) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<|eot_id|>", "<|im_end|>", *(f"t{i}" for i in range(VOCAB - 5))]
    kinds = [2, 3, 3, 3, 1] + [1] * (VOCAB - 5)
    path = write(
        tokenizer__ggml__tokens=(tokens, T.ARRAY, T.STRING),
        tokenizer__ggml__token_type=(kinds, T.ARRAY, T.INT32),
    )
    assert read_architecture(path).config.eos_token_ids == (2, 3)


def test_windows_of_mistral_and_gemma(write: Callable[..., Path]) -> None:
    config = read_architecture(write(llama__attention__sliding_window=u32(9))).config
    assert (config.family, config.windows) == ("mistral", (9, 9))
    gemma = {"num_hidden_layers": 4, "head_dim": 32}
    pattern = ([True, False, True, True], T.ARRAY, T.BOOL)
    path = write("Gemma3", gemma, gemma3__attention__sliding_window_pattern=pattern)
    assert [window is None for window in read_architecture(path).config.windows] == [
        False,
        True,
        False,
        False,
    ]
    path = write("Gemma3", gemma, gemma3__attention__sliding_window_pattern=u32(2))
    assert [window is None for window in read_architecture(path).config.windows] == [False, True, False, True]
    path = write("Gemma3", gemma, gemma3__attention__sliding_window_pattern=([True], T.ARRAY, T.BOOL))
    with pytest.raises(ModelError, match="a flag for each of the 4 layers"):
        read_architecture(path)


def test_gemma_stretches_the_layers_that_see_all(write: Callable[..., Path]) -> None:
    scaling = {
        "gemma3__rope__scaling__type": ("linear", T.STRING),
        "gemma3__rope__scaling__factor": f32(8.0),
        "gemma3__rope__freq_base": f32(1e6),
    }
    config = read_architecture(write("Gemma3", {"head_dim": 32}, **scaling)).config
    assert config.local_rope is not None
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == ("linear", 8.0, 1e6)
    assert (config.local_rope.kind, config.local_rope.theta) == ("default", 1e4)


def test_a_directory_with_one_file(model_file: Path, tmp_path: Path) -> None:
    shutil.copy(model_file, tmp_path / "any name.gguf")
    assert describe_model(tmp_path).config == describe_model(model_file).config
    shutil.copy(model_file, tmp_path / "second.gguf")
    with pytest.raises(ModelError, match="2 .gguf files"):
        describe_model(tmp_path)


def test_identity(model_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy2(model_file, copy)
    with open_checkpoint(model_file) as first, open_checkpoint(copy) as second:
        content = first.content_id()
        assert (second.content_id(), second.files_id() == first.files_id()) == (content, False)
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    with open_checkpoint(copy) as changed:
        other = changed.content_id()
        assert other != content
    data[data.index(b"llama.context_length") + 24] ^= 1
    copy.write_bytes(data)
    with open_checkpoint(copy) as longer:
        assert longer.content_id() not in (content, other)


def test_tensors_have_the_names_and_shapes_of_hugging_face(model_file: Path) -> None:
    model = random_model("Llama", SMALL)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with GgufCheckpoint.open(model_file) as checkpoint:
        assert {name: checkpoint.shape(name) for name in checkpoint.names} == shapes
        assert checkpoint.source_bytes("absent") == 0
        assert checkpoint.source_tensors("absent") == ()
        for ask in (checkpoint.shape, checkpoint.dtype, checkpoint.source, checkpoint.source_shape):
            with pytest.raises(ModelError, match="no tensor 'absent'"):
                ask("absent")
        name = "model.layers.1.self_attn.k_proj.weight"
        distance = np.abs(checkpoint.tensor(name) - model.state_dict()[name].numpy()).max()
        assert 0 < distance < 0.01


@pytest.mark.parametrize("weights", ["auto", "float", "int8", "int4"])
@pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")
@pytest.mark.parametrize("file", ["model_file", "mixture_file"])
def test_the_plan_knows_every_packed_weight(
    file: str, weights: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model_file = request.getfixturevalue(file)
    described = describe_model(model_file, weights=weights)
    rounded = roundings(described.program, weights)
    packer = WeightPacker(described.program, "bfloat16", extension.thread_pool(1), rounded)
    wanted = packed_weights(described.config, described.program, "bfloat16", weights, described.stored)

    expect = partial(expected_forms, described.program, "bfloat16", rounded)
    cache = WeightCache(tmp_path, extension.thread_pool(1), expect)
    for _ in range(2):
        model = load_model(model_file, dtype="bfloat16", weights=weights, packer=packer, cache=cache)
        assert {name: form_of(weight) for name, weight in model.weights.items()} == wanted
    assert described.is_quantized == (weights != "float")
    assert model.identity.endswith("" if weights == "auto" else f":{weights}")
    with open_checkpoint(model_file) as checkpoint:
        assert described.reading_bytes == reading_bytes(described.program, checkpoint, weights) > 0
        sizes = sum(form_bytes(form) for form in wanted.values())
        # Packed forms are padded, and plain weights are packed in the type of the arithmetic.
        assert stored_bytes(described.program, checkpoint, weights) < 2 * sizes
        assert stored_bytes(described.program, checkpoint, weights) > sizes / 3


def test_another_format_is_refused(model_file: Path) -> None:
    with pytest.raises(InvalidParameter, match="weights"):
        load_model(model_file, weights="int3")


def test_random_mutations_are_refused_or_load(tmp_path: Path) -> None:
    """Bytes of the header are changed, dropped and put in: an error for users, or a model."""
    originals = []
    for kind, options in (("Llama", {}), ("Gemma3", {"head_dim": 16}), ("GPT2", {"n_embd": 64, "n_head": 4})):
        path = tmp_path / f"{kind}.gguf"
        options = SMALL | {"num_hidden_layers": 1, "n_layer": 1, "n_positions": 64} | options
        write_gguf(path, random_model(kind, options), lambda name, shape: "Q4_0")
        with GgufFile(path) as file:
            originals.append((path.read_bytes(), len(file.header_bytes)))
    rng = random.Random(0)
    path = tmp_path / "mutated.gguf"
    loaded = refused = 0
    end = time.monotonic() + 10
    while loaded + refused < 2500 and time.monotonic() < end:
        original, header = rng.choice(originals)
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(header)
            change = rng.randrange(4)
            if change == 0:
                data[at : at + 8] = b"\xff" * 8
            elif change == 1:
                del data[at : at + rng.randrange(1, 9)]
            elif change == 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            else:
                data[at] = rng.randrange(256)
        path.write_bytes(data)
        for read in (lambda: Tokenizer.from_dir(path), lambda: load_model(path, max_context=16)):
            try:
                read()
                loaded += 1
            except TokenloomError:
                refused += 1
    assert loaded > 20
    assert refused > 100


def test_a_missing_package_is_named(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedFeature, match=r"tokenloom\[gguf\]"):
        describe_model(model_file)


def test_scales_that_are_not_finite_are_named(model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = bytearray(model_file.read_bytes())
    with GgufFile(model_file) as file:
        at = file.tensors["blk.1.ffn_down.weight"].begin
    data[at : at + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(path)
