"""Checkpoints on the native kernels: the numbers of each format, what is refused, and the memory it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native kernels were not built")

from tests.kernels.harness import Entry, Run, make_batch, step  # noqa: E402
from tests.models.hf_fixtures import TINY, llama_tensors, write_model  # noqa: E402
from tests.models.quantized_fixtures import CONFIG, DOWN, GROUP, METHODS, K, Q, Tensors, V, make  # noqa: E402
from tests.quantization.packers import pack_gptq, random_parts  # noqa: E402
from tests.serving.helpers import write_tokenizer  # noqa: E402
from tokenloom import LLM, SamplingParams  # noqa: E402
from tokenloom.engine.batch import PAGE_SIZE  # noqa: E402
from tokenloom.errors import ModelError, OutOfMemory  # noqa: E402
from tokenloom.kernels.backend import kv_page_bytes  # noqa: E402
from tokenloom.kernels.native.weights import PackedTable, WeightPacker  # noqa: E402
from tokenloom.models.loading import LoadedModel, describe_model, load_model  # noqa: E402
from tokenloom.models.machine_memory import MachineMemory  # noqa: E402
from tokenloom.models.memory_plan import MemoryPlan, packed_weight_bytes  # noqa: E402
from tokenloom.models.weight_sources import roundings  # noqa: E402
from tokenloom.quantization import round_to_nearest  # noqa: E402
from tokenloom.quantization.weights import Int4Matrix  # noqa: E402
from tokenloom.runtime.local import LocalExecutor  # noqa: E402

POOL = native.ThreadPool(2)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(directory: Path, dtype: str = "float32", weights: str = "auto") -> LoadedModel:
    program = describe_model(directory).program
    packer = WeightPacker(program, dtype, POOL, roundings(program, weights))  # type: ignore[arg-type]
    return load_model(directory, dtype=dtype, weights=weights, packer=packer)


def values(weight: Any) -> np.ndarray:
    """What the kernels compute with, in float32."""
    if isinstance(weight, PackedTable):
        return weight.values.astype(np.float32)
    if isinstance(weight, np.ndarray):
        return weight
    out = np.empty(weight.shape, np.float32)
    for n, row in enumerate(out):
        weight.row(n, row)
    return out


def nbytes(model: LoadedModel) -> int:
    held = (w.values if isinstance(w, PackedTable) else w for w in model.weights.values())
    return sum(w.nbytes for w in held)


def logits(model: LoadedModel, kernels: str) -> np.ndarray:
    """Of each row of one sequence of 40 tokens."""
    page_bytes = kv_page_bytes(model.program.kv, "float32", kernels, PAGE_SIZE)
    executor = LocalExecutor(
        model.program,
        model.weights,
        model.rope,
        num_frames=4,
        frame_bytes=-(-page_bytes // 64) * 64,
        pages_per_frame=1,
        kernels=kernels,
    )
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, 40).tolist()
    step(executor, make_batch([Run(tokens, 0, 40, [1, 2, 3])], [Entry(row) for row in range(40)]))
    return executor.backend.logits(np.arange(40, dtype=np.int32))


# --- rounding at load --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_all_backends_start_from_the_same_numbers(
    tmp_path: Path, weights: str, stored: str, tied: bool
) -> None:
    config = TINY | {"tie_word_embeddings": tied, "attention_bias": True}
    directory = write_model(tmp_path, config, llama_tensors(config, stored))
    expected = load_model(directory, weights=weights)
    for dtype in ("float32", "bfloat16"):
        model = load(directory, dtype, weights)
        assert model.weights[EMBEDDING].format == "int8"
        assert model.weights.keys() == expected.weights.keys()
        for name, weight in expected.weights.items():
            assert (values(model.weights[name]) == weight.astype(np.float32)).all(), name


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_an_untied_embedding_is_read_from_int8(tmp_path: Path, weights: str) -> None:
    """The residual stream begins with the rounded rows, so that only rounded activations differ."""
    tensors = llama_tensors(TINY)
    # A row whose rounded values are far from those that it had.
    tensors[EMBEDDING][:, 0] = 20
    tensors[EMBEDDING][:, 1:] = 0.07
    directory = write_model(tmp_path, TINY, tensors)
    expected = logits(load_model(directory, weights=weights), "reference")
    unrounded = logits(load_model(directory), "reference")
    found = logits(load(directory, "float32", weights), "native")
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert np.abs(found - expected).max() < np.abs(found - unrounded).max()


def put(name: str, place: tuple[int, int], value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[name].__setitem__(place, value)


BROKEN = [
    (DOWN + ".weight", np.nan, ("int8", "int4")),
    (DOWN + ".weight", np.inf, ("int8", "int4")),
    (K + ".weight", -np.inf, ("int8", "int4")),
    (V + ".weight", 1e7, ("int4",)),
    (V + ".weight", -3e38, ("int4",)),
    (EMBEDDING, np.nan, ("int8", "int4")),
    (HEAD, np.inf, ("int8", "int4")),
]


@pytest.mark.parametrize(
    ("name", "value", "weights"), [(name, value, w) for name, value, formats in BROKEN for w in formats]
)
def test_what_cannot_be_rounded_is_refused_as_by_the_reference(
    tmp_path: Path, name: str, value: float, weights: str
) -> None:
    tensors = llama_tensors(TINY)
    tensors[name][3, 3] = value
    directory = write_model(tmp_path, TINY, tensors)
    messages = []
    for start in (load_model, load):
        with pytest.raises(ModelError, match=f"{name} with ") as caught:
            start(directory, weights=weights)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    load(directory)


@pytest.mark.parametrize("name", [DOWN + ".weight", K + ".weight", HEAD, EMBEDDING])
def test_what_overflows_bfloat16_is_refused_as_by_the_reference(tmp_path: Path, name: str) -> None:
    tensors = llama_tensors(TINY)
    tensors[name][3, 3] = -3.4e38
    directory = write_model(tmp_path, TINY, tensors)
    messages = []
    for start in (load_model, load):
        with pytest.raises(ModelError, match=rf"{name} with the value 3.4e\+38.*float32") as caught:
            start(directory, dtype="bfloat16")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    load(directory)


def test_what_a_packer_refuses_for_another_reason_names_the_weight(tmp_path: Path) -> None:
    class Narrow:
        def pack(self, spec: Any, sources: Any) -> Any:
            raise ValueError("too deep")

    packed, _, config = make("awq")
    for own, tensors in ((TINY, llama_tensors(TINY)), (config, packed)):
        directory = write_model(tmp_path, own, tensors)
        with pytest.raises(ModelError, match=f"{EMBEDDING}: too deep"):
            load_model(directory, packer=Narrow())


def test_a_weight_that_is_not_finite_ends_a_start(tmp_path: Path) -> None:
    tensors = llama_tensors(CONFIG, "float16")
    tensors[DOWN + ".weight"][0, 0] = np.nan
    directory = write_model(write_tokenizer(tmp_path), CONFIG, tensors)
    with pytest.raises(ModelError, match=rf"{DOWN}\.weight with the value nan"):
        LLM(str(directory), kernels="native", weights="int4", num_pages=64)


# --- AWQ and GPTQ ------------------------------------------------------------------------------------------


def with_twin(method: str, kept: str, folder: Path) -> tuple[Path, Path, Tensors]:
    """Directories of a quantised checkpoint, linears named `kept` left in floats, and of its float twin."""
    packed, plain, config = make(method, lambda name: bool(kept) and kept in name)
    if kept:
        config["quantization_config"]["modules_to_not_convert"] = [kept, "lm_head"]
    return (
        write_model(folder / "packed", config, packed),
        write_model(folder / "plain", CONFIG, plain),
        plain,
    )


@pytest.mark.parametrize("kept", ["", "v_proj", "down_proj"])
@pytest.mark.parametrize("method", METHODS)
def test_quantised_checkpoints_keep_their_numbers(tmp_path: Path, method: str, kept: str) -> None:
    directory, _, plain = with_twin(method, kept, tmp_path)
    model = load(directory)
    for spec in model.program.weights:
        wanted = np.concatenate([plain[name].astype(np.float32) for name in spec.sources])
        assert (values(model.weights[spec.name]) == wanted).all(), spec.name
    stack = f"{Q}.weight+{K}.weight+{V}.weight"
    formats = {stack: "float32" if kept == "v_proj" else "int4", HEAD: "float32"}
    formats[f"{DOWN}.weight"] = "float32" if kept == "down_proj" else "int4"
    for name, wanted_format in formats.items():
        assert model.weights[name].format == wanted_format
        assert model.weights[name].group == (GROUP if wanted_format == "int4" else 0)
    assert model.weights[EMBEDDING].values.dtype == np.float16


@pytest.mark.parametrize("kept", ["", "v_proj", "down_proj"])
@pytest.mark.parametrize("method", METHODS)
def test_logits_are_near_those_of_the_float_twin(tmp_path: Path, method: str, kept: str) -> None:
    directory, twin, _ = with_twin(method, kept, tmp_path)
    expected = logits(load_model(twin), "reference")
    found = logits(load(directory), "native")
    # Each row of activations is rounded to 8 bits before each product.
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("kept", ["", "v_proj"])
@pytest.mark.parametrize("method", METHODS)
def test_quantised_checkpoints_answer(tmp_path: Path, method: str, kept: str) -> None:
    directory, _, _ = with_twin(method, kept, tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=3, ignore_eos=True)
    with LLM(str(write_tokenizer(directory)), kernels="native", num_pages=64) as llm:
        together = [out.outputs for out in llm.generate(["Once", "a b c"], params)]
        alone = [llm.generate([prompt], params)[0].outputs for prompt in ("Once", "a b c")]
        assert "int4" in llm.card.numerics_id
    assert together == alone


def test_a_head_in_4_bits(tmp_path: Path) -> None:
    config = CONFIG | {"vocab_size": 264, "quantization_config": METHODS["gptq"] | {"lm_head": True}}
    packed, _, _ = make("gptq")
    packed = {name: t for name, t in packed.items() if name not in (EMBEDDING, HEAD)}
    packed[EMBEDDING] = np.ones((264, 32), np.float16)
    q, scales, zeros = random_parts(264, 32, GROUP, zero_from=1)
    packed |= {f"lm_head.{part}": array for part, array in pack_gptq(q, scales, zeros).items()}
    model = load(write_model(tmp_path, config, packed))
    assert model.weights[HEAD].format == "int4"
    assert (values(model.weights[HEAD]) == Int4Matrix(q, scales, zeros, GROUP).dequantize()).all()
    assert packed_weight_bytes(model.config, model.program, "float32") == nbytes(model)


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_the_plan_knows_the_bytes_of_weights(
    tmp_path: Path, weights: str, stored: str, dtype: str, tied: bool
) -> None:
    config = TINY | {"tie_word_embeddings": tied, "attention_bias": True, "intermediate_size": 80}
    model = load(write_model(tmp_path, config, llama_tensors(config, stored)), dtype, weights)
    described = describe_model(tmp_path)
    assert packed_weight_bytes(described.config, described.program, dtype, weights) == nbytes(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", ["", "v_proj", "down_proj"])
@pytest.mark.parametrize("method", METHODS)
def test_the_plan_knows_the_bytes_of_quantised_weights(
    tmp_path: Path, method: str, kept: str, dtype: str, tied: bool
) -> None:
    packed, _, config = make(method, lambda name: bool(kept) and kept in name)
    config["quantization_config"]["modules_to_not_convert"] = [kept] if kept else []
    if tied:
        config["tie_word_embeddings"] = True
        del packed[HEAD]
    elif method == "awq":
        config["quantization_config"]["modules_to_not_convert"].append("lm_head")
    model = load(write_model(tmp_path, config, packed), dtype)
    described = describe_model(tmp_path)
    assert packed_weight_bytes(described.config, described.program, dtype) == nbytes(model)


def test_a_table_takes_the_bytes_that_it_has(tmp_path: Path) -> None:
    directory = write_model(tmp_path, TINY, llama_tensors(TINY, "bfloat16"))
    count = TINY["vocab_size"] * TINY["hidden_size"]
    assert load(directory).weights[EMBEDDING].values.nbytes == 2 * count
    for weights in ("int8", "int4"):
        table = load(directory, "bfloat16", weights).weights[EMBEDDING]
        assert table.nbytes == round_to_nearest.int8(np.ones((64, 32), np.float32)).num_bytes + 64


def plan_of(directory: Path, available: int = 1 << 33, **options: Any) -> MemoryPlan:
    described = describe_model(directory)
    options = {"max_batch_tokens": 64, "max_running": 4, "kernels": "native", "num_threads": 2} | options
    machine = MachineMemory(total=available, available=available, source="machine")
    return MemoryPlan.fit(described.config, described.program, machine=machine, **options)


def test_scratch_of_threads_is_planned(tmp_path: Path) -> None:
    config = TINY | {"vocab_size": 100_000, "max_position_embeddings": 8192}
    directory = write_model(tmp_path, config, llama_tensors(config, "bfloat16"))
    two, four = plan_of(directory), plan_of(directory, num_threads=4)
    assert four.workspace_bytes - two.workspace_bytes > 2 * 16 * 100_000
    # Two heads' partial results of the whole context, for one and for three blocks of rows.
    tiles = -(-64 * 2 // 12)
    shared = 2 * tiles * 4 * (32 + 12 * 16) * (8192 // 128)
    assert two.workspace_bytes - plan_of(directory, num_threads=1).workspace_bytes >= shared
    assert four.workspace_bytes - two.workspace_bytes >= 2 * shared


def test_copies_while_building_are_planned(tmp_path: Path) -> None:
    config = TINY | {"vocab_size": 1_000_000, "tie_word_embeddings": False}
    directory = write_model(tmp_path, config, llama_tensors(config, "bfloat16"))
    table = 1_000_000 * 32 * 2
    plan = plan_of(directory)
    assert table < plan.building_bytes < table + (1 << 20)
    # It comes before KV and workspace, in their place.
    later = plan.workspace_bytes + plan.kv_bytes
    assert plan.total_bytes == plan.weight_bytes + plan.rope_bytes + max(later, plan.building_bytes)
    assert plan_of(directory, weights="int8").building_bytes < 1 << 20
    assert plan_of(directory, kernels="reference").building_bytes == 0


def test_a_model_that_cannot_be_built_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path, TINY, llama_tensors(TINY))
    monkeypatch.setattr("tokenloom.models.memory_plan.native_building_bytes", lambda *_: 1 << 30)
    plan = plan_of(directory)
    assert plan.total_bytes == plan.weight_bytes + plan.rope_bytes + (1 << 30)
    with pytest.raises(OutOfMemory, match="needs 1.3 GiB available: free memory, or take a smaller model"):
        plan_of(directory, available=1 << 30)
