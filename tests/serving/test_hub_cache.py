"""Models by name in the cache of the Hugging Face hub, in the layout that its own package writes and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.hf_fixtures import llama_tensors, write_model
from tests.models.quantized_fixtures import CONFIG
from tests.serving.helpers import write_tokenizer
from tokenloom import LLM, SamplingParams
from tokenloom.config import hub_cache
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.gguf.file import find_gguf
from tokenloom.serving.hub_cache import cached_snapshot, is_model_name
from tokenloom.serving.model_directory import model_directory, model_name

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


def store(
    cache: Path, name: str, files: dict[str, bytes], commit: str = COMMIT, ref: str | None = "main"
) -> Path:
    """A snapshot as `hf download` leaves it: files are links to blobs."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for i, (file, data) in enumerate(files.items()):
        blob = folder / "blobs" / f"{commit[:8]}{i}"
        blob.write_bytes(data)
        (snapshot / file).symlink_to(Path("../../blobs") / blob.name)
    if ref is not None:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    directory = write_model(write_tokenizer(tmp_path / "made"), CONFIG, llama_tensors(CONFIG, "float16"))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants", reason="the package that keeps the cache")
    home = Path.home()
    assert hub_cache({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert hub_cache({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}) == Path("/b/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub_cache({"HF_HOME": "~/x"}) == home / "x" / "hub"
    assert hub_cache({"HF_HOME": "", "HF_HUB_CACHE": ""}) == home / ".cache" / "huggingface" / "hub"
    assert hub_cache() == Path(constants.HF_HUB_CACHE)


def test_the_package_finds_the_same(cache: Path, files: dict[str, bytes]) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the package that keeps the cache")
    store(cache, "some-org/Tiny.Model-1", files)
    store(cache, "some-org/Tiny.Model-1", files, OTHER, "refs/pr/3")
    for revision in ("main", "refs/pr/3", OTHER):
        wanted = hub.snapshot_download(
            "some-org/Tiny.Model-1", revision=revision, cache_dir=cache, local_files_only=True
        )
        assert model_directory("some-org/Tiny.Model-1", revision) == Path(wanted)
        assert model_directory(f"some-org/Tiny.Model-1@{revision}") == Path(wanted)
    assert model_directory("some-org/Tiny.Model-1") == cached_snapshot("some-org/Tiny.Model-1", "main", cache)


@pytest.mark.parametrize("model", ["some-org/tiny", f"some-org/tiny@{COMMIT}"])
def test_llm_of_a_name(cache: Path, files: dict[str, bytes], model: str) -> None:
    store(cache, "some-org/tiny", files)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with LLM(model, kernels="reference", num_pages=64) as llm:
        assert llm.card.name == "some-org/tiny"
        assert len(llm.generate("Once", params)[0].outputs[0].token_ids) == 4
    with LLM("some-org/tiny", revision=COMMIT, kernels="reference", num_pages=64) as llm:
        assert llm.card.name == "some-org/tiny"


def test_names() -> None:
    for name in (
        "gpt2",
        "Qwen/Qwen3-0.6B",
        "a/b",
        "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16",
        "a_b/c_",
    ):
        assert is_model_name(name)
        assert model_name(name, "") == model_name(f"{name}@v1", "") == name
        assert model_name(name, "served") == "served"
    for name in (
        "", "/a", "a/", "a/b/c", "../a", "a/..", "..", ".", "./a", "a/.b", "a--b/c", "a/b..c", "a b/c", "a/b\n", "a\0b",
        "~/a", "a\\b", "é/a", "-a/b", "a/" + "b" * 97, "x" * 500,
    ):  # fmt: skip
        assert not is_model_name(name)


def test_a_directory_goes_first(cache: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    store(cache, "org/model", files)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert model_directory("org/model") == Path("org/model")
    assert model_name("org/model", "") == "model"
    with pytest.raises(InvalidParameter, match="revision: got 'v1'.*left out: the model is a directory"):
        model_directory("org/model", "v1")
    with pytest.raises(InvalidParameter, match="revision"):
        model_directory("", "v1")


def refused(model: str, revision: str = "") -> str:
    with pytest.raises(ModelError) as caught:
        model_directory(model, revision)
    return str(caught.value)


def test_what_is_not_there(cache: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    message = refused("org/absent")
    assert str(cache) in message and "`hf download org/absent`" in message
    assert "no directory at '/no/such/place'" in refused("/no/such/place")
    for model in ("../models--a--b", "a/../b", "org/model@", "org/model/deeper", "a\0b"):
        assert "no directory at" in refused(model)
    store(cache, "org/model", files, ref="v1.0")
    message = refused("org/model")
    assert "without the revision 'main'" in message and "v1.0" in message
    assert "`hf download org/model --revision v2`" in refused("org/model", "v2")
    assert f"no directory {cache}" in refused("org/model", OTHER)
    with pytest.raises(InvalidParameter, match="revision: got 'v2'.*says 'v1.0'"):
        model_directory("org/model@v1.0", "v2")
    assert model_directory("org/model@v1.0", "v1.0").name == COMMIT


@pytest.mark.parametrize(
    "revision", ["../../x", "..", "a/../b", "/etc/passwd", "a//b", "a\0b", "a b", ".", "x" * 300]
)
def test_revisions_that_would_leave_the_cache(cache: Path, files: dict[str, bytes], revision: str) -> None:
    store(cache, "org/model", files)
    assert "revision" in refused("org/model", revision)
    with pytest.raises(ModelError):
        model_directory(f"org/model@{revision}")


@pytest.mark.parametrize("text", ["../../../other", "", "main", COMMIT[:39], COMMIT + "0", "\xff" * 40])
def test_refs_that_name_no_commit(cache: Path, files: dict[str, bytes], text: str) -> None:
    snapshot = store(cache, "org/model", files)
    (snapshot.parent.parent / "refs" / "main").write_text(text)
    assert "the 40 hexadecimal digits of a commit" in refused("org/model")


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
def test_downloads_that_were_not_finished(cache: Path, files: dict[str, bytes], lacking: str) -> None:
    snapshot = store(cache, "org/model", {name: data for name, data in files.items() if name != lacking})
    message = refused("org/model")
    assert (
        f"{snapshot} without {lacking}: it is incomplete" in message and "`hf download org/model`" in message
    )
    (snapshot.parent.parent / "blobs" / "abc.incomplete").touch()
    assert f"without {lacking}: its download was not finished" in refused("org/model")


def test_links_to_nothing(cache: Path, files: dict[str, bytes]) -> None:
    snapshot = store(cache, "org/model", files)
    (snapshot / "tokenizer.json").resolve().unlink()
    assert f"{snapshot} without tokenizer.json: it is incomplete" in refused("org/model")


def test_shards_that_are_missing(cache: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    made = write_model(tmp_path / "shards", CONFIG, llama_tensors(CONFIG, "float16"), 3)
    parts = {path.name: path.read_bytes() for path in made.iterdir()}
    shards = sorted(name for name in parts if name.startswith("model-"))
    parts |= {name: data for name, data in files.items() if name.startswith("tokenizer")}
    snapshot = store(
        cache, "org/model", {name: data for name, data in parts.items() if name not in shards[1:]}
    )
    assert f"{snapshot} without {shards[1]}, {shards[2]}: it is incomplete" in refused("org/model")
    store(cache, "org/whole", parts)
    assert model_directory("org/whole").is_dir()
    index: Any = json.loads(parts["model.safetensors.index.json"])
    index["weight_map"] = {f"t{i}": f"s{i}.safetensors" for i in range(1000)}
    parts["model.safetensors.index.json"] = json.dumps(index).encode()
    store(cache, "org/many", parts)
    message = refused("org/many")
    assert "980 more" in message and len(message) < 2000
    parts["model.safetensors.index.json"] = b'{"weight_map": 3}'
    store(cache, "org/odd", parts)
    assert model_directory("org/odd").is_dir()  # the loader says what is wrong with it


def test_a_gguf_file(cache: Path) -> None:
    snapshot = store(cache, "org/files", {"model.gguf": b"GGUF", "README.md": b""})
    assert model_directory("org/files") == snapshot
    assert model_name("org/files", "") == "org/files"
    assert find_gguf(snapshot) == snapshot / "model.gguf"
    several = store(cache, "org/several", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    assert model_directory("org/several") == several
    with pytest.raises(ModelError, match=r"2 .gguf files.*'a.gguf', 'b.gguf'"):
        LLM("org/several")
    (cache / "models--org--files" / "blobs").rename(cache / "elsewhere")
    with pytest.raises(ModelError, match="incomplete"):
        model_directory("org/files")


def test_a_gguf_file_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "Some Model.GGUF"
    file.write_bytes(b"GGUF")
    assert (model_directory(str(file)), model_name(str(file), "")) == (file, "Some Model")
    with pytest.raises(InvalidParameter, match="left out: the model is a file"):
        model_directory(str(file), "main")
    other = tmp_path / "model.bin"
    other.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"a file at .*or a \.gguf file"):
        model_directory(str(other))


def test_nothing_is_fetched(cache: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def connect(*args: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    refused("org/absent")
    store(cache, "org/model", files)
    assert np.array_equal(sorted(p.name for p in model_directory("org/model").iterdir()), sorted(files))
