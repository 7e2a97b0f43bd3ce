"""Checkpoints in fp8, compressed-tensors and GPTQ's further formats: their numbers, their memory, and what is
refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.native.test_weight_cache_starts import Start, assert_same
from tests.models.format_fixtures import BASE, STORED, Stored, make_stored
from tests.models.hf_fixtures import TINY, llama_tensors, write_model
from tests.models.quantized_fixtures import DOWN, K, Q, Tensors, V
from tests.models.test_native_weights import load, logits, native, nbytes, values
from tests.serving.helpers import write_tokenizer
from tokenloom import LLM, SamplingParams
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.kernels.native.packed_forms import expected_forms, form_of
from tokenloom.kernels.program import Gather, Linear, Program
from tokenloom.models.checkpoint import Checkpoint
from tokenloom.models.loading import LoadedModel, describe_model, load_model, load_weights
from tokenloom.models.memory_plan import native_building_bytes, packed_weight_bytes, packed_weights
from tokenloom.models.registry import build_program
from tokenloom.models.weight_sources import source_forms, stored_bytes, weight_sources
from tokenloom.quantization import round_to_nearest

STACK = f"{Q}.weight+{K}.weight+{V}.weight"


def unordered(program: Program, name: str, weight: np.ndarray, weights: dict[str, Any]) -> np.ndarray:
    """`weight` with its columns where the inputs are."""
    spec = next(spec for spec in program.weights if spec.name == name)
    if spec.input_order is None:
        return weight
    out = np.empty_like(weight)
    out[:, weights[spec.input_order]] = weight
    return out


def check_values(
    model: LoadedModel, plain: Tensors, distance: float, read: Callable[[Any], np.ndarray]
) -> None:
    for spec in model.program.weights:
        if spec.integers:
            continue
        wanted = np.concatenate([plain[name].astype(np.float32) for name in spec.sources])
        found = unordered(model.program, spec.name, read(model.weights[spec.name]), model.weights)
        np.testing.assert_allclose(found, wanted, rtol=distance, atol=0, err_msg=spec.name)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("name", STORED)
def test_the_reference_has_the_files_numbers(tmp_path: Path, name: str, num_shards: int) -> None:
    packed, plain, config = make_stored(STORED[name])
    model = load_model(write_model(tmp_path, config, packed, num_shards))
    assert model.config.quantization is not None
    check_values(model, plain, STORED[name].distance, lambda weight: weight.astype(np.float32))


@pytest.mark.parametrize("kept", ["", "v_proj"])
@pytest.mark.parametrize("name", STORED)
def test_the_kernels_have_the_files_numbers(tmp_path: Path, name: str, kept: str) -> None:
    stored = STORED[name]
    packed, plain, config = make_stored(stored, lambda name: bool(kept) and kept in name)
    leave(config, kept)
    directory = write_model(tmp_path, config, packed)
    if kept and name == "gptq ordered":
        with pytest.raises(ModelError, match=r"v_proj.weight with its inputs in another order.*g_idx"):
            load(directory)
        return
    model = load(directory)
    check_values(model, plain, stored.distance, values)
    wanted = "float32" if stored.form == "float" else stored.form
    assert model.weights[f"{DOWN}.weight"].format == wanted
    assert model.weights[STACK].format == ("float32" if kept else wanted)
    assert packed_weight_bytes(model.config, model.program, "float32") == nbytes(model)
    with Checkpoint.open(directory) as checkpoint:
        forms = expected_forms(model.program, "float32", {}, source_forms(model.program, checkpoint))
    assert forms == {name: form_of(weight) for name, weight in model.weights.items()}


def leave(config: dict[str, Any], kept: str) -> None:
    if kept:
        field = "ignore" if "ignore" in config["quantization_config"] else "modules_to_not_convert"
        pattern = f"re:.*{kept}" if field == "ignore" else kept
        config["quantization_config"][field] = [pattern, "lm_head"]


@pytest.mark.parametrize("name", STORED)
def test_logits_are_those_of_the_float_twin(tmp_path: Path, name: str) -> None:
    packed, plain, config = make_stored(STORED[name])
    directory = write_model(tmp_path / "packed", config, packed)
    twin = load_model(write_model(tmp_path / "plain", BASE, plain))
    expected = logits(twin, "reference")
    most = np.abs(expected).max()
    assert np.abs(logits(load_model(directory), "reference") - expected).max() < 2e-3 * most
    found = logits(load(directory), "native")
    # The integer kernels round each row of activations to 8 bits.
    assert np.abs(found - expected).max() < (1e-4 if STORED[name].form == "float" else 0.05) * most
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("name", ["packed 4", "int8", "fp8 block", "gptq ordered"])
def test_answers_do_not_depend_on_company(tmp_path: Path, name: str) -> None:
    packed, _, config = make_stored(STORED[name])
    directory = write_tokenizer(write_model(tmp_path, config, packed))
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=3, ignore_eos=True)
    prompts = ["Once", "a b c", "Once upon a time there was " * 3]
    answers = []
    for options in ({}, {"max_batch_tokens": 5}, {"threads": 2}, {"prefix_cache": False}):
        with LLM(str(directory), kernels="native", num_pages=64, **options) as llm:
            answers.append([out.outputs for out in llm.generate(prompts, params)])
            answers.append([llm.generate([prompt], params)[0].outputs for prompt in prompts])
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STORED)
def test_the_second_start_packs_nothing(tmp_path: Path, name: str, dtype: str) -> None:
    packed, _, config = make_stored(STORED[name])
    model = write_model(tmp_path / "model", config, packed)
    first = Start(model, tmp_path / "cache", dtype)
    assert first.num_packed == len(first.model.weights)
    assert list(first.expected.items()) == [(name, form_of(w)) for name, w in first.model.weights.items()]
    second = Start(model, tmp_path / "cache", dtype)
    assert second.num_packed == 0
    assert_same(second.model.weights, first.model.weights)
    if dtype == "float32":
        assert (logits(second.model, "native") == logits(first.model, "native")).all()


def test_gathers_are_where_inputs_are_reordered(tmp_path: Path) -> None:
    def has_gathers(stored: Stored) -> list[bool]:
        packed, _, config = make_stored(stored)
        program = describe_model(write_model(tmp_path, config, packed)).program
        found = []
        for before, op in zip(program.ops, program.ops[1:], strict=False):
            if isinstance(op, Linear):
                found.append(isinstance(before, Gather) and before.out == op.source)
        assert sum(isinstance(op, Gather) for op in program.ops) == sum(found)
        return found

    assert all(has_gathers(STORED["gptq ordered"]))
    for name in ("gptq row", "gptq 8 ordered", "packed 4"):
        assert not any(has_gathers(STORED[name]))


def nibbles(words: np.ndarray) -> np.ndarray:
    """uint8 [R, 8 C] of int32 [R, C]."""
    return (words.view(np.uint32)[:, :, None] >> (4 * np.arange(8)) & 15).reshape(len(words), -1)


def packed_words(numbers: np.ndarray) -> np.ndarray:
    """int32 [R, C] of [R, 8 C]."""
    shifted = numbers.reshape(len(numbers), -1, 8).astype(np.uint64) << (4 * np.arange(8)).astype(np.uint64)
    return shifted.sum(2).astype(np.uint32).view(np.int32)


def test_a_twin_whose_rows_lie_in_the_order(tmp_path: Path) -> None:
    """Bit for bit: down_proj with its inputs in another order, and gate and up with their outputs in the same one,
    so that the gather puts them back."""
    packed, _, config = make_stored(STORED["packed 4 float32"])
    groups = np.random.default_rng(1).permutation(np.arange(96) // 32).astype(np.int32)
    order = np.argsort(groups, kind="stable")
    bent = dict(packed)

    def move(name: str, tensor: np.ndarray) -> None:
        bent[name] = np.empty_like(tensor)
        bent[name][order] = tensor

    for layer in (0, 1):
        mlp = f"model.layers.{layer}.mlp."
        columns = np.empty((64, 96), np.uint8)
        columns[:, order] = nibbles(packed[f"{mlp}down_proj.weight_packed"])
        bent[f"{mlp}down_proj.weight_packed"] = packed_words(columns)
        bent[f"{mlp}down_proj.weight_g_idx"] = groups
        for name in (f"{mlp}gate_proj", f"{mlp}up_proj"):
            for part in ("weight_packed", "weight_scale"):
                move(f"{name}.{part}", packed[f"{name}.{part}"])
            zeros = np.empty((96, 2), np.uint8)
            zeros[order] = nibbles(np.ascontiguousarray(packed[f"{name}.weight_zero_point"].T)).T
            words = packed_words(np.ascontiguousarray(zeros.T))
            bent[f"{name}.weight_zero_point"] = np.ascontiguousarray(words.T)
    straight = load(write_model(tmp_path / "straight", config, packed))
    crooked = load(write_model(tmp_path / "crooked", config, bent))
    assert sum(isinstance(op, Gather) for op in crooked.program.ops) == 2
    assert (logits(straight, "native") == logits(crooked, "native")).all()


# --- rounding what is stored in 8-bit floats ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8 block", "float8", "gptq 8", "packed 8 group"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_values_may_be_rounded_further(tmp_path: Path, name: str, weights: str) -> None:
    packed, plain, config = make_stored(STORED[name])
    directory = write_model(tmp_path, config, packed)
    expected = load_model(directory, weights=weights)
    model = load(directory, "bfloat16", weights)
    rounded = getattr(round_to_nearest, weights)(plain[f"{DOWN}.weight"]).dequantize()
    assert (expected.weights[f"{DOWN}.weight"] == rounded).all()
    assert (values(model.weights[f"{DOWN}.weight"]) == rounded).all()
    assert model.weights[f"{DOWN}.weight"].format == weights
    described = describe_model(directory, weights=weights)
    assert packed_weight_bytes(described.config, described.program, "bfloat16", weights) == nbytes(model)


@pytest.mark.parametrize("name", ["packed 4", "int8", "gptq 8 row", "gptq ordered"])
def test_what_is_rounded_already_is_not(tmp_path: Path, name: str) -> None:
    packed, _, config = make_stored(STORED[name])
    directory = write_model(tmp_path, config, packed)
    with pytest.raises(InvalidParameter, match="weights: got 'int8'.*quantised already"):
        describe_model(directory, weights="int8")


@pytest.mark.parametrize("kept", ["", "v_proj"])
@pytest.mark.parametrize("name", STORED)
def test_the_plan_covers_what_is_read(tmp_path: Path, name: str, kept: str) -> None:
    packed, _, config = make_stored(STORED[name], lambda name: bool(kept) and kept in name)
    leave(config, kept)
    if kept and name == "gptq ordered":
        pytest.skip("refused")
    described = describe_model(write_model(tmp_path, config, packed))
    most = 0
    with Checkpoint.open(tmp_path) as checkpoint:
        for spec, sources in weight_sources(described.program, checkpoint):
            held = 0
            for source, form in zip(sources, map(checkpoint.source_form, spec.sources), strict=True):
                if not isinstance(source, np.ndarray):
                    held += (
                        source.q.nbytes + source.scales.nbytes + getattr(source, "zeros", source.q[:0]).nbytes
                    )
                elif form == ("float32", 0):
                    held += source.nbytes
            most = max(most, held)
    assert most > 0
    assert native_building_bytes(described.config, described.program, {}) >= most


@pytest.mark.parametrize("kept", ["", "v_proj"])
@pytest.mark.parametrize("name", STORED)
def test_widened_to_the_values_that_it_has(tmp_path: Path, name: str, kept: str) -> None:
    packed, plain, config = make_stored(STORED[name], lambda name: bool(kept) and kept in name)
    leave(config, kept)
    if kept and name == "gptq ordered":
        pytest.skip("refused")
    directory = write_model(tmp_path, config, packed)
    described = describe_model(directory, weights="float")
    assert (described.is_quantized, described.config.dtype) == (False, "float32")
    for start, read in ((load_model, lambda weight: weight.astype(np.float32)), (load, values)):
        model = start(directory, weights="float")
        check_values(model, plain, STORED[name].distance, read)
        assert model.identity == f"{model.content_id}:float"
    program, config = described.program, described.config
    wanted = packed_weights(config, program, "float32", "float", described.stored)
    assert {name: form_of(weight) for name, weight in model.weights.items()} == wanted
    assert {form.format for form in wanted.values() if form.kind == "packed"} == {"float32"}
    with Checkpoint.open(directory) as checkpoint:
        forms = source_forms(program, checkpoint, "float")
        most = 0
        for spec, sources in weight_sources(program, checkpoint, "float"):
            assert tuple(source.dtype.name for source in sources) == tuple(
                form.dtype for form in forms[spec.name]
            )
            widened = [source.nbytes for source in sources if source.dtype == np.float32]
            most = max(most, sum(widened))
        assert native_building_bytes(config, program, {}, described.reading_bytes) >= most > 0
        held = 0
        for spec in program.weights:
            wide = any(form.dtype in ("float32", "int32") for form in forms[spec.name])
            held += math.prod(spec.shape) * (4 if wide else 2)
        assert stored_bytes(program, checkpoint, "float") == held


# --- plain 8-bit floats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_plain_8_bit_floats(tmp_path: Path, dtype: str) -> None:
    """Without any configuration: the tensors are what they are."""
    narrow = getattr(ml_dtypes, dtype)
    tensors = {name: tensor.astype(narrow) for name, tensor in llama_tensors(TINY).items()}
    directory = write_model(tmp_path, TINY, tensors)
    model = load_model(directory)
    assert model.config.dtype == "bfloat16"
    for spec in model.program.weights:
        wanted = np.concatenate([tensors[name] for name in spec.sources]).astype(np.float32)
        assert (model.weights[spec.name].astype(np.float32) == wanted).all()
        for kind in ("float32", "bfloat16"):
            assert (values(load(directory, kind).weights[spec.name]) == wanted).all()
    packed = load(directory, "bfloat16")
    assert packed_weight_bytes(packed.config, packed.program, "bfloat16") == nbytes(packed)


def test_plain_8_bit_floats_beside_scales(tmp_path: Path) -> None:
    packed, _, config = make_stored(STORED["fp8 block"])
    del config["quantization_config"]
    with pytest.raises(ModelError, match=r"unexpected model.*\.weight_scale_inv"):
        load_model(write_model(tmp_path, config, packed))


# --- what does not fit -------------------------------------------------------------------------------------


def put(name: str, value: np.ndarray) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.__setitem__(name, value)


PLAIN = np.ones((64, 96), np.float16)
E4M3 = ml_dtypes.float8_e4m3fn
BROKEN: list[tuple[str, Callable[[Tensors], Any], str]] = [
    ("packed 4", lambda t: t.pop(f"{DOWN}.weight_scale"), f"missing {DOWN}.weight_scale"),
    ("packed 4", lambda t: t.pop(f"{DOWN}.weight_packed"), f"missing {DOWN}.weight"),
    ("packed 4", put(f"{DOWN}.weight", PLAIN), f"{DOWN}.weight beside {DOWN}.weight_packed"),
    ("packed 4", put(f"{DOWN}.weight_zero_point", np.ones((8, 3), np.int32)), f"unexpected {DOWN}.weight_zero"),
    ("packed 4", put(f"{DOWN}.weight_packed", np.ones((64, 11), np.int32)), f"{DOWN}.weight of shape [64, 88]"),
    ("packed 4", put(f"{DOWN}.weight_scale", np.ones((64, 2), np.float32)), f"{DOWN}.weight_scale of shape [64, 2]"),
    ("packed 4", put(f"{DOWN}.weight_scale", np.ones((64, 3), np.int32)), f"{DOWN}.weight_scale of dtype int32"),
    ("packed 4", put(f"{DOWN}.weight_shape", np.array([64, 97])), f"{DOWN}.weight_shape = [64, 97]"),
    ("packed 4", put("lm_head.weight_packed", np.ones((264, 8), np.int32)), "missing lm_head.weight_scale"),
    ("packed 4", put("extra.weight_packed", np.ones((4, 4), np.int32)), "unexpected extra.weight_packed"),
    ("packed 4 float32", lambda t: t.pop(f"{DOWN}.weight_zero_point"), f"missing {DOWN}.weight_zero_point"),
    ("int8", lambda t: t.pop(f"{DOWN}.weight_scale"), f"missing {DOWN}.weight_scale"),
    ("int8", put(f"{DOWN}.weight", PLAIN), f"{DOWN}.weight that is not quantised"),
    ("int8", put(f"{DOWN}.weight", np.ones((64, 95), np.int8)), f"{DOWN}.weight of shape [64, 95] instead of [64, 96]"),
    ("int8", put("lm_head.weight", np.ones((264, 64), np.int8)), "missing lm_head.weight_scale"),
    ("int8", put("model.norm.weight", np.ones(64, np.int8)), "missing model.norm.weight_scale"),
    ("float8", lambda t: t.pop(f"{DOWN}.weight_scale"), f"{DOWN}.weight in float8 without its scale"),
    ("float8", put(f"{DOWN}.weight", np.ones((64, 96), np.int8)), f"{DOWN}.weight of dtype int8"),
    ("fp8 block", put(f"{DOWN}.weight_scale_inv", np.ones((4, 2), np.float32)), f"{DOWN}.weight_scale_inv of shape"),
    ("fp8 block", put(f"{DOWN}.weight_scale_inv", np.full((4, 3), np.nan, np.float32)), "not finite"),
    ("fp8 block", put("model.embed_tokens.weight", np.ones((264, 64), E4M3)), "embed_tokens.weight that is quantised"),
    ("gptq ordered", put(f"{DOWN}.g_idx", np.zeros(96, np.int32)), f"{DOWN}.g_idx with groups of different sizes"),
    ("gptq ordered", put(f"{DOWN}.g_idx", np.full(96, 9, np.int32)), f"{DOWN}.g_idx with groups from 9 to 9"),
    ("gptq ordered", put(f"{DOWN}.g_idx", np.zeros((96, 1), np.int32)), f"{DOWN}.g_idx of shape [96, 1]"),
    ("gptq ordered", put(f"{DOWN}.g_idx", np.zeros(96, np.float32)), f"{DOWN}.g_idx of dtype float32"),
    ("gptq 8", put(f"{DOWN}.g_idx", np.full(96, 9, np.int32)), f"{DOWN}.g_idx with groups from 9 to 9"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bend", "named"), BROKEN)
def test_broken_checkpoints(tmp_path: Path, name: str, bend: Callable[[Tensors], Any], named: str) -> None:
    tensors, _, config = make_stored(STORED[name])
    bend(tensors)
    directory = write_model(tmp_path, config, tensors)
    for start in (load_model, load):
        with pytest.raises(ModelError) as caught:
            start(directory)
        assert named in str(caught.value)


@pytest.mark.parametrize("other", ["in order", "another"])
def test_orders_that_differ_in_a_stack(tmp_path: Path, other: str) -> None:
    tensors, _, config = make_stored(STORED["gptq ordered"])
    groups = (np.arange(64) // 32).astype(np.int32)
    tensors[f"{K}.g_idx"] = groups if other == "in order" else groups[::-1].copy()
    directory = write_model(tmp_path, config, tensors)
    for start in (describe_model, load_model):
        with pytest.raises(
            ModelError, match=rf"{K}\.weight with its inputs in another order.*{Q}\.weight.*one order"
        ):
            start(directory)


def test_a_program_without_gathers_is_refused(tmp_path: Path) -> None:
    tensors, _, config = make_stored(STORED["gptq ordered"])
    directory = write_model(tmp_path, config, tensors)
    with Checkpoint.open(directory) as checkpoint:
        program = build_program(describe_model(directory).config)
        with pytest.raises(ModelError, match=rf"{DOWN}\.weight with reordered inputs \(desc_act\)"):
            load_weights(program, checkpoint)


def test_scales_of_kv_are_not_read(tmp_path: Path) -> None:
    tensors, _, config = make_stored(STORED["float8"])
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    expected = load_model(write_model(tmp_path, config, tensors)).weights
    for name in ("k_scale", "v_scale"):
        tensors[f"model.layers.0.self_attn.{name}"] = np.full(1, np.nan, np.float32)
    tensors["model.layers.1.self_attn.k_proj.output_scale"] = np.ones(1, np.float32)
    found = load_model(write_model(tmp_path, config, tensors)).weights
    assert all((found[name] == weight).all() for name, weight in expected.items())


assert native is not None
