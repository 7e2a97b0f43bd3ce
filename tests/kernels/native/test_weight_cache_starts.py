"""Starts on a directory of packed weights: what is packed, what is read, and what an edit changes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native kernels were not built")

from tests.kernels.native.test_weight_cache import assert_same  # noqa: E402
from tests.models.hf_fixtures import TINY, llama_tensors, safetensors_bytes, write_model  # noqa: E402
from tests.quantization.packers import pack_gptq, random_parts  # noqa: E402
from tests.serving.helpers import write_tiny_model  # noqa: E402
from tokenloom import LLM, SamplingParams  # noqa: E402
from tokenloom.errors import InvalidParameter  # noqa: E402
from tokenloom.kernels.native.packed_forms import Sources, WeightForm, expected_forms, form_of  # noqa: E402
from tokenloom.kernels.native.weight_cache import WeightCache  # noqa: E402
from tokenloom.kernels.native.weights import WeightPacker  # noqa: E402
from tokenloom.models.checkpoint import Checkpoint  # noqa: E402
from tokenloom.models.loading import LoadedModel, describe_model, load_model  # noqa: E402
from tokenloom.models.weight_sources import roundings, source_forms  # noqa: E402


class Start:
    """One start on `model`, whose packed weights are kept in `directory`."""

    def __init__(
        self, model: Path, directory: Path, dtype: str = "float32", weights: str = "auto", pool: Any = None
    ) -> None:
        pool = pool or native.ThreadPool(1)
        program = describe_model(model, weights=weights).program
        chosen = roundings(program, weights)  # type: ignore[arg-type]
        self.expected: dict[str, WeightForm] = {}

        def expect(sources: Sources) -> dict[str, WeightForm]:
            self.expected = expected_forms(program, dtype, chosen, sources)
            return self.expected

        packer = WeightPacker(program, dtype, pool, chosen)
        self.num_packed = 0

        class Counting:
            def pack(_, spec: Any, sources: Any) -> Any:
                self.num_packed += 1
                return packer.pack(spec, sources)

        self.model: LoadedModel = load_model(
            model, dtype=dtype, weights=weights, packer=Counting(), cache=WeightCache(directory, pool, expect)
        )


DEEP = TINY | {"hidden_size": 64, "intermediate_size": 64}


def write_some_model(directory: Path, stored: str) -> Path:
    """`stored` is a type, "mixed", "tied", "biased", "gptq", or "half gptq", where k stays as it was."""
    if stored.endswith("gptq"):
        quantized: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
        skipped = "k_proj" if stored == "half gptq" else "none"
        quantized["modules_to_not_convert"] = [skipped]
        tensors = llama_tensors(DEEP, "float16")
        for name in [name for name in tensors if name.endswith("_proj.weight") and skipped not in name]:
            q, scales, zeros = random_parts(*tensors.pop(name).shape, 32, zero_from=1)
            parts = pack_gptq(q, scales, zeros)
            tensors |= {name.replace(".weight", f".{part}"): array for part, array in parts.items()}
        return write_model(directory, DEEP | {"quantization_config": quantized}, tensors)
    if stored == "mixed":
        wide, narrow = llama_tensors(DEEP), llama_tensors(DEEP, "bfloat16")
        return write_model(
            directory, DEEP, {name: (wide if i % 3 else narrow)[name] for i, name in enumerate(wide)}
        )
    if stored in ("tied", "biased"):
        config = DEEP | ({"tie_word_embeddings": True} if stored == "tied" else {"attention_bias": True})
        return write_model(directory, config, llama_tensors(config, "bfloat16"))
    return write_model(directory, DEEP, llama_tensors(DEEP, stored))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize(
    "stored", ["float32", "bfloat16", "float16", "mixed", "tied", "biased", "gptq", "half gptq"]
)
def test_the_second_start_packs_nothing(tmp_path: Path, stored: str, weights: str, dtype: str) -> None:
    if stored.endswith("gptq") and weights != "auto":
        pytest.skip("quantised already")
    model = write_some_model(tmp_path / "model", stored)
    first = Start(model, tmp_path / "cache", dtype, weights)
    assert first.num_packed == len(first.model.weights)
    assert list(first.expected.items()) == [(name, form_of(w)) for name, w in first.model.weights.items()]
    second = Start(model, tmp_path / "cache", dtype, weights)
    assert second.num_packed == 0
    assert_same(second.model.weights, first.model.weights)


def test_a_start_replaces_a_damaged_file(tmp_path: Path) -> None:
    model = write_some_model(tmp_path / "model", "float32")
    first = Start(model, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert Start(model, tmp_path / "cache").num_packed == len(first.model.weights)
    assert Start(model, tmp_path / "cache").num_packed == 0


def test_a_bias_that_was_dropped_is_missed(tmp_path: Path) -> None:
    """The forward pass would run without it, so nothing later would tell."""
    model = write_some_model(tmp_path / "model", "biased")
    first = Start(model, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    with Checkpoint.open(model) as checkpoint:
        key = f"{first.model.content_id}:{checkpoint.files_id()}:float32:auto"
    cache = WeightCache(tmp_path / "cache", native.ThreadPool(1), lambda sources: {})
    assert cache.path(key) == path
    without = {name: weight for name, weight in first.model.weights.items() if "bias" not in name}
    assert len(without) < len(first.model.weights)
    cache.save(key, without)
    assert Start(model, tmp_path / "cache").num_packed == len(first.model.weights)


def test_a_table_of_two_sources_is_widened(tmp_path: Path) -> None:
    program = describe_model(write_some_model(tmp_path, "float16")).program
    (spec,) = (spec for spec in program.weights if "embed" in spec.name)
    halves = np.split(np.zeros(spec.shape, np.float16), 2)
    packer = WeightPacker(program, "float32", native.ThreadPool(1), {})
    forms = expected_forms(program, "float32", {}, {spec.name: [("float16", 0)] * 2})
    assert forms == {spec.name: form_of(packer.pack(spec, halves))}


def test_an_optional_weight_that_the_checkpoint_lacks_is_not_expected(tmp_path: Path) -> None:
    program = describe_model(write_some_model(tmp_path, "biased")).program
    specs = tuple(replace(spec, optional="bias" in spec.name) for spec in program.weights)
    program = replace(program, weights=specs)
    tensors = {name: array for name, array in llama_tensors(DEEP).items() if "bias" not in name}
    with Checkpoint.open(write_model(tmp_path, DEEP, tensors)) as checkpoint:
        forms = expected_forms(program, "float32", {}, source_forms(program, checkpoint))
    assert list(forms) == [spec.name for spec in specs if not spec.optional]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_an_edit_that_the_samples_miss_is_seen(
    tmp_path: Path, num_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenloom.models.checkpoint.FULL_HASH_BYTES", 0)
    monkeypatch.setattr("tokenloom.models.checkpoint.SAMPLE_BYTES", 64)
    tensors = llama_tensors(DEEP)
    model = write_model(tmp_path / "model", DEEP, tensors, num_shards)
    first = Start(model, tmp_path / "cache")
    name = "model.embed_tokens.weight"
    (path,) = (path for path in model.glob("*.safetensors") if name.encode() in path.read_bytes())
    before = path.stat()
    data = path.read_bytes()
    place = data.index(tensors[name][10].tobytes())
    with path.open("r+b") as file:
        file.seek(place)
        file.write(np.full(4, 7, np.float32).tobytes())
    assert path.stat().st_size == before.st_size
    if path.stat().st_mtime_ns == before.st_mtime_ns:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    second = Start(model, tmp_path / "cache")
    assert second.model.content_id == first.model.content_id
    assert second.num_packed == len(first.model.weights)
    assert (second.model.weights[name].values[10, :4] == 7).all()


def test_the_key_has_size_and_time_of_every_file(tmp_path: Path) -> None:
    tensors = llama_tensors(TINY)
    model = write_model(tmp_path / "model", TINY, tensors, num_shards=3)

    def files_id() -> str:
        with Checkpoint.open(model) as checkpoint:
            return checkpoint.files_id()

    before = seen = files_id()
    assert files_id() == before
    for path in sorted(model.glob("*.safetensors")):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert files_id() not in (before, seen)
        seen = files_id()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files_id() == before
    status = path.stat()
    header = safetensors_bytes({name: tensors[name] for name in list(tensors)[2::3]})
    length = int.from_bytes(header[:8], "little")
    path.write_bytes(
        (length + 8).to_bytes(8, "little") + header[8 : 8 + length] + b" " * 8 + header[8 + length :]
    )
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files_id() != before


def test_an_engine_with_a_cache(tmp_path: Path) -> None:
    model, cache = write_tiny_model(tmp_path / "model"), tmp_path / "cache"

    def tokens(directory: Path | None) -> Any:
        options = {"kernels": "native", "num_pages": 64, "weight_cache": str(directory or "")}
        with LLM(str(model), **options) as llm:
            params = SamplingParams(max_tokens=8, temperature=0.0)
            return llm.generate(["lorem ipsum"], params)[0].outputs[0].token_ids

    wanted = tokens(None)
    assert tokens(cache) == wanted
    (path,) = cache.iterdir()
    before = path.stat()
    assert tokens(cache) == wanted
    assert path.stat().st_ino == before.st_ino
    with pytest.raises(InvalidParameter, match="weight_cache: got .*; there is a file"):
        tokens(path)
