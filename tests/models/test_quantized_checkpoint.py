"""AWQ and GPTQ checkpoints, rounding at load, and files that contradict their config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.hf_fixtures import NUMPY_TYPES, TINY, llama_tensors, write_model
from tests.models.quantized_fixtures import CONFIG, DOWN, GROUP, METHODS, K, Q, Tensors, V, is_linear, make
from tests.quantization.packers import pack_gptq, random_parts
from tests.serving.helpers import write_tokenizer
from tokenloom import LLM, SamplingParams
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.kernels.program import Linear
from tokenloom.models.checkpoint import Checkpoint
from tokenloom.models.hf_config import parse_config
from tokenloom.models.loading import describe_model, load_model, load_weights
from tokenloom.models.memory_plan import weight_bytes
from tokenloom.models.registry import build_program
from tokenloom.models.weight_sources import roundings, stored_bytes, weight_sources
from tokenloom.quantization import round_to_nearest
from tokenloom.quantization.weights import Int4Matrix, Int8Matrix


def refused(folder: Path, config: dict[str, Any], tensors: Tensors) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(write_model(folder, config, tensors))
    return str(caught.value)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_loads_as_its_float_twin(tmp_path: Path, method: str, num_shards: int) -> None:
    packed, plain, config = make(method)
    model = load_model(write_model(tmp_path / "packed", config, packed, num_shards))
    twin = load_model(write_model(tmp_path / "plain", CONFIG, plain))
    assert model.config.quantization is not None
    assert model.config.dtype == "float16"
    assert model.weights.keys() == twin.weights.keys()
    for name, weight in twin.weights.items():
        assert (model.weights[name].astype(np.float32) == weight.astype(np.float32)).all()
    linears = {op.weight for op in model.program.ops if isinstance(op, Linear)}
    assert {model.weights[name].dtype for name in linears} == {np.dtype(np.float32)}
    assert model.weights["lm_head.weight"].dtype == np.float16
    assert (model.weight_format, model.identity) == ("auto", model.content_id)


@pytest.mark.parametrize("method", METHODS)
def test_says_what_its_float_twin_says(tmp_path: Path, method: str) -> None:
    packed, plain, config = make(method)
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=3, ignore_eos=True)
    outputs = []
    for name, own, tensors in (("packed", config, packed), ("plain", CONFIG, plain)):
        directory = write_model(write_tokenizer(tmp_path / name), own, tensors)
        with LLM(str(directory), kernels="reference", dtype="float32", num_pages=64) as llm:
            outputs.append([out.outputs for out in llm.generate(["Once", "a b c", "xyz"], params)])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_arithmetic_leaves_the_formats_values(tmp_path: Path, dtype: str) -> None:
    packed, plain, config = make("awq")
    model = load_model(write_model(tmp_path, config, packed), dtype=dtype)
    assert (model.weights[f"{DOWN}.weight"] == plain[f"{DOWN}.weight"]).all()
    assert model.weights["model.norm.weight"].dtype == NUMPY_TYPES[dtype]


@pytest.mark.parametrize("method", METHODS)
def test_linears_that_are_left_as_they_were(tmp_path: Path, method: str) -> None:
    """v_proj stays plain, so that q, k and v are one weight of two kinds of sources."""
    packed, plain, config = make(method, lambda name: "v_proj" in name)
    config["quantization_config"]["modules_to_not_convert"] = ["v_proj", "lm_head"]
    directory = write_model(tmp_path / "packed", config, packed)
    model = load_model(directory)
    name = f"{Q}.weight+{K}.weight+{V}.weight"
    assert (model.weights[name] == np.concatenate([plain[part] for part in name.split("+")])).all()
    with Checkpoint.open(directory) as checkpoint:
        found = {spec.name: sources for spec, sources in weight_sources(model.program, checkpoint)}
        kinds = [type(source) for source in found[name]]
        assert kinds == [Int4Matrix, Int4Matrix, np.ndarray]
        assert checkpoint.dtype(f"{Q}.qweight") == "int32"
    assert [type(source) for source in found[f"{DOWN}.weight"]] == [Int4Matrix]


def test_a_head_in_4_bits(tmp_path: Path) -> None:
    config = CONFIG | {"vocab_size": 264, "quantization_config": METHODS["gptq"] | {"lm_head": True}}
    packed, _, _ = make("gptq")
    packed = {name: t for name, t in packed.items() if "embed" not in name and "lm_head" not in name}
    packed["model.embed_tokens.weight"] = np.ones((264, 32), np.float16)
    q, scales, zeros = random_parts(264, 32, GROUP, zero_from=1)
    packed |= {f"lm_head.{part}": values for part, values in pack_gptq(q, scales, zeros).items()}
    model = load_model(write_model(tmp_path, config, packed))
    wanted = Int4Matrix(q, scales, zeros, GROUP).dequantize()
    assert (model.weights["lm_head.weight"] == wanted).all()


def test_biases_of_zeros_that_gptq_tools_add(tmp_path: Path) -> None:
    packed, _, config = make("gptq")
    packed[f"{DOWN}.bias"] = np.zeros(32, np.float16)
    model = load_model(write_model(tmp_path / "zeros", config, packed))
    assert f"{DOWN}.bias" not in model.weights
    packed[f"{DOWN}.bias"][3] = 0.5
    assert f"unexpected {DOWN}.bias" in refused(tmp_path / "other", config, packed)


# --- rounding at load --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", NUMPY_TYPES)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounding_at_load(tmp_path: Path, weights: str, stored: str, tied: bool) -> None:
    config = TINY | {"tie_word_embeddings": tied, "attention_bias": True}
    tensors = llama_tensors(config, stored)
    directory = write_model(tmp_path, config, tensors)
    plain, model = load_model(directory), load_model(directory, weights=weights)
    assert model.content_id == plain.content_id
    assert (model.weight_format, model.identity) == (weights, f"{plain.content_id}:{weights}")
    for spec in model.program.weights:
        found = model.weights[spec.name]
        if len(spec.shape) == 1:
            assert found.dtype == NUMPY_TYPES[stored]
            assert (found == plain.weights[spec.name]).all()
            continue
        is_outer = spec.name in ("model.embed_tokens.weight", "lm_head.weight")
        rounded = round_to_nearest.int4 if weights == "int4" and not is_outer else round_to_nearest.int8
        parts = [rounded(tensors[source]) for source in spec.sources]
        assert found.dtype == np.float32
        assert (found == np.concatenate([part.dequantize() for part in parts])).all()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounding_comes_before_the_arithmetics_type(tmp_path: Path, weights: str) -> None:
    directory = write_model(tmp_path, TINY, llama_tensors(TINY))
    exact = load_model(directory, weights=weights)
    narrow = load_model(directory, weights=weights, dtype="bfloat16")
    for name in roundings(exact.program, "int8"):
        assert (exact.weights[name] == narrow.weights[name]).all()


def test_the_seam_hands_out_matrices_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_model(tmp_path, TINY, llama_tensors(TINY))
    program = describe_model(directory).program
    released: list[str] = []
    calls: list[tuple[str, int, int]] = []
    release = Checkpoint.release

    def listen(self: Checkpoint, name: str) -> None:
        released.append(name)
        release(self, name)

    monkeypatch.setattr(Checkpoint, "release", listen)
    with Checkpoint.open(directory) as checkpoint:
        sourced = weight_sources(program, checkpoint, "int4", lambda *call: calls.append(call))
        first = next(sourced)
        assert first.spec.name == "model.embed_tokens.weight"
        assert isinstance(first.sources[0], Int8Matrix)
        assert released == []
        second = next(sourced)
        assert isinstance(second.sources[0], np.ndarray)
        assert released == ["model.embed_tokens.weight"]
        assert [calls[-1][1]] == [checkpoint.tensor_bytes("model.embed_tokens.weight")]
        for spec, sources in sourced:
            assert sum(source.shape[0] for source in sources) == spec.shape[0]
        assert sorted(released) == list(checkpoint.names)
        assert calls[-1] == ("weights", checkpoint.num_bytes, checkpoint.num_bytes)


def test_transposed_weights(tmp_path: Path) -> None:
    """A plain weight that is stored [in, out] is turned; packed parts have one layout in any case."""
    packed, plain, config = make("awq", lambda name: "up_proj" in name)
    config["quantization_config"]["modules_to_not_convert"] = ["up_proj"]
    stored = packed | {name: np.ascontiguousarray(t.T) for name, t in packed.items() if "up_proj" in name}
    write_model(tmp_path, config, stored)
    program = build_program(parse_config(config))
    turned = replace(
        program, weights=tuple(replace(spec, transposed="gate_proj" in spec.name) for spec in program.weights)
    )
    with Checkpoint.open(tmp_path) as checkpoint:
        loaded = load_weights(turned, checkpoint)
    for spec in program.weights:
        assert (loaded[spec.name] == np.concatenate([plain[source] for source in spec.sources])).all()
    tensors = llama_tensors(TINY)
    expected = load_model(write_model(tmp_path / "straight", TINY, tensors), weights="int4")
    bent = {name: np.ascontiguousarray(t.T) if is_linear(name) else t for name, t in tensors.items()}
    program = replace(
        expected.program,
        weights=tuple(replace(w, transposed="_proj" in w.name) for w in expected.program.weights),
    )
    with Checkpoint.open(write_model(tmp_path / "turned", TINY, bent)) as checkpoint:
        loaded = load_weights(program, checkpoint, weights="int4")
    assert all((loaded[name] == weight).all() for name, weight in expected.weights.items())


def test_bytes(tmp_path: Path) -> None:
    tensors = llama_tensors(TINY, "bfloat16")
    directory = write_model(tmp_path / "plain", TINY, tensors)
    program = describe_model(directory).program
    with Checkpoint.open(directory) as checkpoint:
        assert stored_bytes(program, checkpoint) == sum(t.nbytes for t in tensors.values())
        for weights in ("int8", "int4"):
            total = 0
            for _, sources in weight_sources(program, checkpoint, weights):
                total += sum(s.nbytes if isinstance(s, np.ndarray) else s.num_bytes for s in sources)
            assert stored_bytes(program, checkpoint, weights) == total  # type: ignore[arg-type]
    packed, _, config = make("awq")
    for options in ({"weights": "int8"}, {"weights": "int4"}, {}):
        own, stored = (config, packed) if not options else (TINY, tensors)
        model = load_model(write_model(tmp_path / "model", own, stored), **options)
        multiplied = {op.weight for op in model.program.ops if isinstance(op, Linear)} | {"lm_head.weight"}
        held = sum(w.nbytes + (4 * w.size if n in multiplied else 0) for n, w in model.weights.items())
        planned = weight_bytes(model.config, model.program, "auto", options.get("weights", "auto"))
        assert held <= planned <= 1.2 * held


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantised_checkpoint_is_not_rounded_again(tmp_path: Path, weights: str) -> None:
    packed, _, config = make("gptq")
    write_model(write_tokenizer(tmp_path), config, packed)
    for load in (load_model, describe_model, lambda folder, weights: LLM(str(folder), weights=weights)):
        with pytest.raises(InvalidParameter, match=r"weights: got 'int\d'.*auto.*quantised already \(gptq\)"):
            load(tmp_path, weights=weights)


def test_unknown_formats(tmp_path: Path) -> None:
    directory = write_model(tmp_path, TINY, llama_tensors(TINY))
    with pytest.raises(InvalidParameter, match="weights: got 'int2'"):
        load_model(directory, weights="int2")
    with pytest.raises(InvalidParameter, match="weights"):
        LLM(str(directory), weights="fp8")


def test_rounded_weights_have_their_own_identity(tmp_path: Path) -> None:
    directory = write_model(write_tokenizer(tmp_path), CONFIG, llama_tensors(CONFIG))
    identities, fingerprints, logprobs = set(), set(), set()
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=0, ignore_eos=True)
    for weights in ("auto", "int8", "int4"):
        with LLM(str(directory), kernels="reference", weights=weights, num_pages=64) as llm:
            identities.add(llm._parts.engine.limits.identity)
            fingerprints.add(llm.card.numerics_id)
            logprobs.add(llm.generate("Once upon", params)[0].outputs[0].cumulative_logprob)
    assert len(identities) == len(fingerprints) == len(logprobs) == 3


# --- what does not fit -------------------------------------------------------------------------------------


def bad_scale(tensors: Tensors) -> None:
    tensors[f"{DOWN}.scales"][1, 5] = np.nan


def mixed(tensors: Tensors) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"{DOWN}.{part}", None)
    tensors[f"{DOWN}.weight"] = np.ones((32, 64), np.float16)


def put(name: str, value: np.ndarray) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, value)


BROKEN: list[tuple[Callable[[Tensors], Any], tuple[str, ...]]] = [
    (bad_scale, (f"{DOWN}.scales", "not finite")),
    (lambda t: t.pop(f"{DOWN}.scales"), (f"missing {DOWN}.scales",)),
    (lambda t: t.pop(f"{DOWN}.qzeros"), (f"missing {DOWN}.qzeros",)),
    (
        lambda t: t.pop(f"{DOWN}.qweight"),
        (f"missing {DOWN}.weight", f"unexpected {DOWN}.scales", f"unexpected {DOWN}.qzeros"),
    ),
    (mixed, (f"{DOWN}.weight that is not quantised", "quantization_config")),
    (put(f"{DOWN}.weight", np.ones((32, 64), np.float16)), (f"{DOWN}.weight beside {DOWN}.qweight",)),
    (put(f"{DOWN}.qweight", np.ones((64, 4), np.float16)), (f"{DOWN}.qweight of dtype float16", "int32")),
    (put(f"{DOWN}.scales", np.ones((2, 32), np.int32)), (f"{DOWN}.scales of dtype int32", "float16")),
    (put(f"{DOWN}.scales", np.ones((1, 32), np.float16)), (f"{DOWN}.scales of shape [1, 32]", "[2, 32]")),
    (put(f"{DOWN}.qzeros", np.ones((2, 5), np.int32)), (f"{DOWN}.qzeros of shape [2, 5]", "[2, 4]")),
    (put(f"{DOWN}.qweight", np.ones(8, np.int32)), (f"{DOWN}.qweight of shape [8]", "a matrix")),
    (put("model.norm.weight", np.ones(32, np.int32)), ("model.norm.weight of dtype int32", "float32")),
    (put("lm_head.qweight", np.ones((4, 8), np.int32)), ("lm_head.",)),
    (put("model.embed_tokens.qweight", np.ones((4, 8), np.int32)), ("model.embed_tokens.",)),
    (put("extra.qweight", np.ones((4, 8), np.int32)), ("unexpected extra.qweight",)),
]


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize(("bend", "named"), BROKEN)
def test_broken_checkpoints(
    tmp_path: Path, bend: Callable[[Tensors], Any], named: tuple[str, ...], method: str
) -> None:
    tensors, _, config = make(method)
    bend(tensors)
    message = refused(tmp_path, config, tensors)
    for text in named:
        assert text in message


def test_a_linear_of_another_shape(tmp_path: Path) -> None:
    tensors, _, config = make("awq")
    for part in ("qweight", "qzeros", "scales"):
        tensors[f"{Q}.{part}"], tensors[f"{K}.{part}"] = tensors[f"{K}.{part}"], tensors[f"{Q}.{part}"]
    message = refused(tmp_path, config, tensors)
    assert f"{Q}.weight of shape [16, 32] instead of [32, 32]" in message
    assert f"{K}.weight of shape [32, 32] instead of [16, 32]" in message


def test_activation_order(tmp_path: Path) -> None:
    tensors, _, config = make("gptq")
    tensors[f"{DOWN}.g_idx"][3] = 7
    assert f"{DOWN}.g_idx with groups from 0 to 7" in refused(tmp_path / "wrong", config, tensors)
    tensors, _, config = make("gptq_v2")
    del tensors[f"{DOWN}.g_idx"]
    assert f"missing {DOWN}.g_idx" in refused(tmp_path / "missing", config, tensors)
    tensors, _, config = make("awq")
    tensors[f"{DOWN}.g_idx"] = np.zeros(64, np.int32)
    assert f"unexpected {DOWN}.g_idx" in refused(tmp_path / "awq", config, tensors)


def test_quantised_against_the_configs_word(tmp_path: Path) -> None:
    tensors, _, config = make("awq")
    config["quantization_config"]["modules_to_not_convert"] = ["down_proj"]
    message = refused(tmp_path / "excepted", config, tensors)
    assert f"{DOWN}.qweight, though quantization_config leaves {DOWN} as it was" in message
    del config["quantization_config"]
    message = refused(tmp_path / "plain", config, tensors)
    assert f"missing {DOWN}.weight ({DOWN}.qweight needs a quantization_config in config.json)" in message


def test_a_plain_checkpoint_with_integers(tmp_path: Path) -> None:
    tensors = llama_tensors(TINY) | {"model.norm.weight": np.ones(32, np.int32)}
    message = refused(tmp_path, TINY, tensors)
    assert "model.norm.weight of dtype int32 instead of float32, bfloat16, float16" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method = 'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits = 3"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version = 'gemv'"),
    ],
)
def test_formats_that_are_not_offered(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    config = TINY | {"quantization_config": changes}
    assert named in refused(tmp_path, config, llama_tensors(TINY))


@pytest.mark.parametrize("cut", [1, 1000, 30_000])
def test_truncated_files(tmp_path: Path, cut: int) -> None:
    packed, _, config = make("awq")
    file = write_model(tmp_path, config, packed) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ModelError, match="cut short"):
        load_model(tmp_path)


def test_weights_that_cannot_be_rounded(tmp_path: Path) -> None:
    tensors = llama_tensors(TINY)
    tensors[f"{DOWN}.weight"][3, 3] = np.inf
    directory = write_model(tmp_path, TINY, tensors)
    for weights in ("int8", "int4"):
        with pytest.raises(ModelError, match=rf"{DOWN}\.weight with the value inf"):
            load_model(directory, weights=weights)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_real_checkpoint_of_the_test_data(shared_data: Path, method: str) -> None:
    """Not among the data at the time of writing; one that is put there is read in full."""
    found = [
        path.parent
        for path in (shared_data / "models").rglob("config.json")
        if (json.loads(path.read_text()).get("quantization_config") or {}).get("quant_method") == method
    ]
    if not found:
        pytest.skip(f"no {method} checkpoint among the test data")
    for directory in found:
        model = load_model(directory)
        assert all(np.isfinite(weight.astype(np.float32)).all() for weight in model.weights.values())


@pytest.mark.parametrize("method", METHODS)
def test_widened_to_the_values_that_it_has(tmp_path: Path, method: str) -> None:
    packed, plain, config = make(method)
    directory = write_model(tmp_path / "packed", config, packed)
    described = describe_model(directory, weights="float")
    assert described.stored is not None
    assert not described.is_quantized
    assert describe_model(directory).is_quantized
    model = load_model(directory, weights="float")
    for name, weight in load_model(write_model(tmp_path / "plain", CONFIG, plain)).weights.items():
        assert (model.weights[name].astype(np.float32) == weight.astype(np.float32)).all()
    assert model.identity == f"{model.content_id}:float"
