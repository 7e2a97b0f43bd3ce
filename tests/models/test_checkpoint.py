"""Mapped checkpoints: every layout and type, and files that lie."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.hf_fixtures import NUMPY_TYPES, TINY, llama_tensors, safetensors_bytes, write_model
from tokenloom.errors import ModelError
from tokenloom.models import checkpoint as module
from tokenloom.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint


def file_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_all(directory: Path) -> dict[str, np.ndarray]:
    with Checkpoint.open(directory) as opened:
        tensors = {name: opened.tensor(name).copy() for name in opened.names}
        opened.content_id()
        return tensors


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_views_equal_what_was_written(tmp_path: Path, dtype: str, num_shards: int):
    tensors = llama_tensors(TINY, dtype)
    write_model(tmp_path, TINY, tensors, num_shards)
    with Checkpoint.open(tmp_path) as opened:
        assert opened.names == tuple(sorted(tensors))
        assert opened.num_bytes == sum(t.nbytes for t in tensors.values())
        for name, tensor in tensors.items():
            view = opened.tensor(name)
            assert name in opened
            assert opened.dtype(name) == dtype
            assert view.dtype == tensor.dtype
            assert opened.shape(name) == view.shape == tensor.shape
            assert not view.flags.writeable
            assert view.tobytes() == tensor.tobytes()
            opened.release(name)
            assert view.tobytes() == tensor.tobytes()


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_equals_the_safetensors_package(tmp_path: Path, dtype: str):
    torch_files = pytest.importorskip("safetensors.torch")
    import torch

    torch_type = getattr(torch, dtype)
    tensors = {"a": torch.randn(3, 5).to(torch_type), "b.c": torch.randn(7).to(torch_type)}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    torch_files.save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    read = read_all(tmp_path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].shape == tuple(tensor.shape)
        assert (read[name].astype(np.float32) == tensor.float().numpy()).all()


def test_views_outlive_the_checkpoint(tmp_path: Path):
    tensors = llama_tensors(TINY)
    write_model(tmp_path, TINY, tensors)
    with Checkpoint.open(tmp_path) as opened:
        view = opened.tensor("model.norm.weight")
    assert (view == tensors["model.norm.weight"]).all()


def test_unknown_tensor(tmp_path: Path):
    write_model(tmp_path, TINY, llama_tensors(TINY))
    with Checkpoint.open(tmp_path) as opened, pytest.raises(ModelError, match="no tensor 'x'"):
        opened.tensor("x")


def test_content_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = llama_tensors(TINY)
    directories = {
        "single": write_model(tmp_path / "single", TINY, tensors),
        "sharded": write_model(tmp_path / "sharded", TINY, tensors, 4),
        "config": write_model(tmp_path / "config", TINY | {"rope_theta": 5e5}, tensors),
    }
    changed = {name: tensor.copy() for name, tensor in tensors.items()}
    changed["model.layers.1.mlp.up_proj.weight"][7, 7] += 1
    directories["changed"] = write_model(tmp_path / "changed", TINY, changed)
    renamed = {name.replace("layers.0", "layers.7"): tensor for name, tensor in tensors.items()}
    directories["renamed"] = write_model(tmp_path / "renamed", TINY, renamed)

    def ids() -> dict[str, str]:
        result = {}
        for name, directory in directories.items():
            with Checkpoint.open(directory) as opened:
                result[name] = opened.content_id()
                assert result[name] == opened.content_id()
        return result

    full = ids()
    assert full["single"] == full["sharded"]
    assert len(set(full.values())) == 4
    monkeypatch.setattr(module, "FULL_HASH_BYTES", 0)
    assert len(set(ids().values())) == 4
    assert ids()["single"] != full["single"]
    monkeypatch.setattr(module, "SAMPLE_BYTES", 64)
    sampled = ids()
    assert sampled["single"] == sampled["changed"] == sampled["sharded"]
    assert len({sampled["single"], sampled["config"], sampled["renamed"]}) == 3


def test_links_are_followed(tmp_path: Path):
    """The layout of the Hugging Face cache: snapshots/<commit>/file -> ../../blobs/<hash>."""
    tensors = llama_tensors(TINY)
    write_model(tmp_path / "plain", TINY, tensors, 2)
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        file.rename(tmp_path / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert read_all(snapshot).keys() == tensors.keys()


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "a\\b.safetensors",
        "x\0.safetensors",
        "model.bin",
        "",
        None,
        3,
        ["a"],
        "a" * 300 + ".safetensors",
    ],
)
def test_index_names_only_files_beside_it(tmp_path: Path, name: Any):
    directory = write_model(tmp_path / "model", TINY)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(llama_tensors(TINY)))
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="bare names"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, [], {"weight_map": None}])
def test_index_without_a_map(tmp_path: Path, index: Any):
    write_model(tmp_path, TINY)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="index"):
        Checkpoint.open(tmp_path)


def test_missing_shards_are_all_listed(tmp_path: Path):
    write_model(tmp_path, TINY, llama_tensors(TINY), 4)
    for i in (2, 4):
        (tmp_path / f"model-0000{i}-of-00004.safetensors").unlink()
    with pytest.raises(ModelError, match="2 of 4 shards missing.*model-00002-of-00004.*model-00004-of-00004"):
        Checkpoint.open(tmp_path)


def test_index_that_does_not_fit_its_shards(tmp_path: Path):
    write_model(tmp_path, TINY, llama_tensors(TINY), 2)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="'ghost' is not in model-00001"):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path):
    write_model(tmp_path, TINY)
    for i in (1, 2):
        values = {"own" + str(i): np.zeros(1, np.float32), "both": np.full(1, i, np.float32)}
        (tmp_path / f"{i}.safetensors").write_bytes(safetensors_bytes(values))
    listed = {"own1": "1.safetensors", "own2": "2.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ModelError, match="'both' in two shards"):
        Checkpoint.open(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": listed | {"both": "1.safetensors"}}))
    assert read_all(tmp_path)["both"] == 1


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str):
    write_model(tmp_path, TINY)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=f"only pickled weights.*{name}.*never loaded"):
        Checkpoint.open(tmp_path)


def test_no_weights_at_all(tmp_path: Path):
    write_model(tmp_path, TINY)
    with pytest.raises(ModelError, match="without weights"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ModelError, match="no directory"):
        Checkpoint.open(tmp_path / "absent")


def test_fifo_does_not_hang(tmp_path: Path):
    write_model(tmp_path, TINY)
    os.mkfifo(tmp_path / SINGLE_FILE)
    with pytest.raises(ModelError, match="not a regular file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("cut", [1, 8, 100, 20_000, 0.5])
def test_truncated_file(tmp_path: Path, cut: float):
    data = safetensors_bytes(llama_tensors(TINY))
    write_model(tmp_path, TINY)
    (tmp_path / SINGLE_FILE).write_bytes(data[: int(cut * len(data)) if cut < 1 else len(data) - int(cut)])
    with pytest.raises(ModelError, match="cut short"):
        Checkpoint.open(tmp_path)


HOSTILE = {
    "empty": b"",
    "short": b"\0\0\0",
    "no header": bytes(8),
    "length beyond the limit": file_bytes(b"{}", length=(1 << 63)),
    "length beyond the file": file_bytes(b"{}", length=50_000_000),
    "not JSON": file_bytes(b"hello"),
    "not UTF-8": file_bytes(b"\xff\xff"),
    "a list": file_bytes([]),
    "nested": file_bytes(b"[" * 200_000),
    "key twice": file_bytes(b'{"a": 1, "a": 1}'),
    "no object": file_bytes({"a": 1}),
    "no fields": file_bytes({"a": {}}),
    "F64": file_bytes({"a": entry(dtype="F64", shape=[1])}, bytes(8)),
    "U16": file_bytes({"a": entry(dtype="U16", shape=[4])}, bytes(8)),
    "F8_E8M0": file_bytes({"a": entry(dtype="F8_E8M0", shape=[8])}, bytes(8)),
    "dtype list": file_bytes({"a": entry(dtype=["F32"])}, bytes(8)),
    "negative size": file_bytes({"a": entry(shape=[-2])}, bytes(8)),
    "bool size": file_bytes({"a": entry(shape=[True, 2])}, bytes(8)),
    "float size": file_bytes({"a": entry(shape=[2.0])}, bytes(8)),
    "shape no list": file_bytes({"a": entry(shape=2)}, bytes(8)),
    "too many sizes": file_bytes({"a": entry(shape=[1] * 9 + [2])}, bytes(8)),
    "huge shape": file_bytes({"a": entry(shape=[1 << 40] * 8)}, bytes(8)),
    "shape against bytes": file_bytes({"a": entry(shape=[3])}, bytes(8)),
    "offsets reversed": file_bytes({"a": entry(8, 0)}, bytes(8)),
    "offsets negative": file_bytes({"a": entry(-8, 0)}, bytes(8)),
    "offsets beyond the file": file_bytes({"a": entry(0, 8)}, bytes(4)),
    "offsets far beyond the file": file_bytes({"a": entry(1 << 39, (1 << 39) + 8)}, bytes(8)),
    "three offsets": file_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
    "overlap": file_bytes({"a": entry(), "b": entry(4, 12)}, bytes(12)),
    "same place": file_bytes({"a": entry(), "b": entry()}, bytes(8)),
    "gap": file_bytes({"a": entry(), "b": entry(16, 24)}, bytes(24)),
    "gap at the start": file_bytes({"a": entry(8, 16)}, bytes(16)),
    "trailing bytes": file_bytes({"a": entry()}, bytes(9)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str):
    write_model(tmp_path, TINY)
    (tmp_path / SINGLE_FILE).write_bytes(HOSTILE[name])
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_unaligned_tensors_are_read(tmp_path: Path):
    header = json.dumps({"a": entry(0, 6, "F16", [3]), "b": entry(6, 14)}).encode()
    header += b" " * ((1 - len(header)) % 8)
    data = np.array([1, 2, 3], np.float16).tobytes() + np.array([4, 5], np.float32).tobytes()
    (tmp_path / SINGLE_FILE).write_bytes(file_bytes(header, data))
    read = read_all(tmp_path)
    assert read["a"].tolist() == [1, 2, 3]
    assert read["b"].tolist() == [4, 5]


junk = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
numbers = st.integers(-2, 20) | st.sampled_from([1 << 31, 1 << 40, 1 << 63, 1 << 200])
tensor_headers = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F64"]) | junk,
        "shape": st.lists(numbers, max_size=3) | junk,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | junk,
    },
)


def open_bytes(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name, SINGLE_FILE).write_bytes(data)
        with contextlib.suppress(ModelError):
            read_all(Path(name))


@settings(max_examples=200)
@given(st.dictionaries(st.text(max_size=3), tensor_headers | junk, max_size=3), st.binary(max_size=24))
def test_any_header_is_read_or_refused(header: dict[str, Any], data: bytes):
    open_bytes(file_bytes(header, data))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4), st.integers(0, 600))
def test_flipped_bytes_are_read_or_refused(flips: list[tuple[int, int]], length: int):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    data = bytearray(safetensors_bytes(tensors))
    for position, value in flips:
        data[position % len(data)] = value
    open_bytes(bytes(data[:length]) if length < 300 else bytes(data))
