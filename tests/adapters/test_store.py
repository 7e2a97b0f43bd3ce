"""Adapters kept by content, their names, and the watched directory."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import stat
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.adapters.directories import CONFIG, PREFIX, RANK, base, read, tensors, write
from tests.models.hf_fixtures import TINY, llama_tensors, write_model
from tokenloom.adapters import store as store_module
from tokenloom.adapters.adapter import Adapter
from tokenloom.adapters.peft_directory import CONFIG_FILE, WEIGHTS_FILE
from tokenloom.adapters.registry import AdapterRegistry, check_name
from tokenloom.adapters.store import AdapterStore
from tokenloom.adapters.watch import Changes, changes, scan
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.models.loading import describe_model
from tokenloom.models.weight_sources import source_rows

ID, OTHER_ID = "0123456789abcdef" * 2, "f" * 32


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return read(write(tmp_path / "adapter"))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "data" / "adapters")


def reopened(store: AdapterStore, content_id: str) -> Adapter:
    _, program = base()
    return store.open(content_id, program, source_rows=source_rows(program))


def test_what_was_added_is_opened(store: AdapterStore, tmp_path: Path) -> None:
    mixed = {
        name: array.astype((np.float16, ml_dtypes.bfloat16, np.float32)[i % 3])
        for i, (name, array) in enumerate(tensors().items())
    }
    mixed |= {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((RANK, 64), np.float32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": np.ones((32, RANK), np.float16),
    }
    config = {"lora_alpha": 1 / 3, "target_modules": ["q_proj", "up_proj", "embed_tokens"]}
    adapter = read(write(tmp_path / "a", config, mixed))
    path = store.add(adapter)
    assert path.name == f"{adapter.content_id}.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert store.ids() == (adapter.content_id,)
    assert store.num_bytes == path.stat().st_size
    found = reopened(store, adapter.content_id)
    assert found.content_id == adapter.content_id and found.num_bytes == adapter.num_bytes
    assert len(found.blocks) == len(adapter.blocks) == 4
    for mine, theirs in zip(found.blocks, adapter.blocks, strict=True):
        assert (mine.weight, mine.begin, mine.end) == (theirs.weight, theirs.begin, theirs.end)
        assert mine.scale == theirs.scale == 1 / 3 / RANK
        assert mine.a.dtype == theirs.a.dtype and (mine.a == theirs.a).all() and (mine.b == theirs.b).all()
        assert mine.a.flags.aligned and not mine.a.flags.writeable
    assert found.embedding is not None and adapter.embedding is not None
    assert (found.embedding.b == adapter.embedding.b).all()
    assert store.remove(adapter.content_id) and not store.remove(adapter.content_id)
    assert store.ids() == ()
    # Whoever has it open keeps it.
    assert (found.blocks[0].a == adapter.blocks[0].a).all()
    with pytest.raises(ModelError, match="no adapter"):
        reopened(store, adapter.content_id)


def test_the_file_is_one_that_safetensors_reads(store: AdapterStore, adapter: Adapter) -> None:
    found = pytest.importorskip("safetensors.numpy").load_file(store.add(adapter))
    assert found.keys() == tensors().keys()
    assert all((found[name] == array).all() for name, array in tensors().items())


def test_adding_again_changes_nothing(store: AdapterStore, adapter: Adapter) -> None:
    first = store.add(adapter).stat()
    second = store.add(adapter).stat()
    assert (first.st_ino, first.st_mtime_ns) == (second.st_ino, second.st_mtime_ns)


def test_damage_is_noticed_and_mended(store: AdapterStore, adapter: Adapter) -> None:
    path = store.add(adapter)
    whole = path.read_bytes()
    for place in (0, 9, 200, len(whole) // 2, len(whole) - 1):
        for bent in (whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], whole[:place]):
            path.write_bytes(bent)
            with pytest.raises(ModelError):
                reopened(store, adapter.content_id)
            store.add(adapter)
            assert path.read_bytes() == whole
    other = whole.replace(b"2.0", b"4.0", 1)
    assert other != whole
    path.write_bytes(other)
    with pytest.raises(ModelError, match="damaged"):
        reopened(store, adapter.content_id)


@pytest.mark.parametrize("stage", ["fsync", "replace", "_write"])
def test_a_crash_leaves_nothing_visible(
    stage: str, store: AdapterStore, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends without a word while it adds."""

    def die(*_: Any) -> None:
        if stage == "_write":
            (store.directory / ".adding").write_bytes(b"half")
        os._exit(9)

    def add() -> None:
        target = store_module if stage == "_write" else store_module.os
        setattr(target, stage, die)
        store.add(adapter)

    process = multiprocessing.get_context("fork").Process(target=add)
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert store.ids() == ()
    assert (store.directory / ".adding").exists()
    store.add(adapter)
    assert store.ids() == (adapter.content_id,)
    assert not (store.directory / ".adding").exists()
    assert reopened(store, adapter.content_id).content_id == adapter.content_id


def test_a_full_disk_leaves_the_store_as_it_was(
    store: AdapterStore, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.add(adapter)
    assert os.listdir(store.directory) == [".lock"]


def test_processes_add_and_remove_at_a_time(store: AdapterStore, tmp_path: Path) -> None:
    adapters = [read(write(tmp_path / str(i), arrays=tensors(seed=i))) for i in range(3)]

    def work(number: int) -> None:
        mine = AdapterStore(store.directory)
        for turn in range(15):
            adapter = adapters[(number + turn) % 3]
            mine.add(adapter)
            if turn % 4 == 3:
                mine.remove(adapter.content_id)
        for adapter in adapters:
            mine.add(adapter)

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(i,)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    # The last thing that each process did to an adapter was to add it, but another may have removed it since.
    for adapter in adapters:
        store.add(adapter)
        assert reopened(store, adapter.content_id).content_id == adapter.content_id
    assert sorted(os.listdir(store.directory)) == sorted(
        [".lock", *(f"{i}.safetensors" for i in store.ids())]
    )


def test_limits(tmp_path: Path, adapter: Adapter) -> None:
    size = AdapterStore(tmp_path / "a").add(adapter).stat().st_size
    with pytest.raises(ModelError, match=f"at most {size - 1} bytes"):
        AdapterStore(tmp_path / "b", max_bytes=size - 1).add(adapter)
    store = AdapterStore(tmp_path / "c", max_bytes=size)
    store.add(adapter)
    store.add(adapter)
    other = read(write(tmp_path / "other", arrays=tensors(seed=1)))
    with pytest.raises(ModelError, match=f"{size} bytes beside {size} bytes"):
        store.add(other)
    store.remove(adapter.content_id)
    store.add(other)


def test_other_base_models_are_refused(store: AdapterStore, adapter: Adapter, tmp_path: Path) -> None:
    store.add(adapter)
    config = TINY | {"intermediate_size": 64, "num_hidden_layers": 1}
    program = describe_model(write_model(tmp_path / "other", config, llama_tensors(config))).program
    with pytest.raises(
        ModelError, match=r"layer 1, which.*up_proj.* of shape \[48, 4\] instead of \[64, 4\]|up_proj"
    ) as e:
        store.open(adapter.content_id, program, source_rows=source_rows(program))
    assert "layer 1, which the model does not have" in str(e.value)
    assert "[48, 4] instead of [64, 4]" in str(e.value)


@pytest.mark.parametrize(
    "name", ["", "..", "../../etc/passwd", ID + "\n", ID.upper(), ID[:-1], "a" * 33, None]
)
def test_odd_ids(name: Any, store: AdapterStore) -> None:
    with pytest.raises(InvalidParameter):
        store.remove(name)
    with pytest.raises(InvalidParameter):
        reopened(store, name)


def test_other_files_are_left_alone(store: AdapterStore, adapter: Adapter, tmp_path: Path) -> None:
    (store.directory / "note.txt").write_text("mine")
    (store.directory / "x.safetensors").write_text("mine")
    (store.directory / f"{ID}.safetensors").symlink_to("/etc/hostname")
    store.add(adapter)
    assert set(store.ids()) == {ID, adapter.content_id}
    with pytest.raises(ModelError):
        reopened(store, ID)
    for path in (tmp_path / "adapter" / CONFIG_FILE, "a\0b"):
        with pytest.raises(InvalidParameter):
            AdapterStore(path)


# --- names -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "file"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    registry = AdapterRegistry(None if request.param == "memory" else tmp_path / "adapters.sqlite")
    yield registry
    registry.close()


def test_names(registry: AdapterRegistry) -> None:
    assert registry.get("a") is None and registry.list() == () and not registry.remove("a")
    first = registry.set("a", ID, source="dir", base_model_name="base", now=5.0)
    assert (first.version, first.added, first.source, first.base_model_name) == (1, 5.0, "dir", "base")
    assert registry.get("a") == first
    # The same content from elsewhere is no new version.
    moved = registry.set("a", ID, source="other", now=6.0)
    assert (moved.version, moved.added, moved.source) == (1, 5.0, "other")
    second = registry.set("a", OTHER_ID, now=7.0)
    assert (second.version, second.added, second.content_id) == (2, 7.0, OTHER_ID)
    assert first.content_id == ID
    registry.set("org/b@1", ID)
    assert [entry.name for entry in registry.list()] == ["a", "org/b@1"]
    assert registry.remove("a") and registry.get("a") is None


def test_what_goes_with_a_content_for_drafts(registry: AdapterRegistry) -> None:
    drafts = {"draft": OTHER_ID, "draft2": ID}
    first = registry.set("a", ID, drafts=drafts, now=5.0)
    assert first.drafts == drafts and registry.get("a") == first and registry.list() == (first,)
    # They change no output, so that another one is no new version.
    second = registry.set("a", ID, now=6.0)
    assert (second.version, second.added, second.drafts) == (1, 5.0, {})
    assert registry.get("a") == second
    with pytest.raises(InvalidParameter, match="content_id"):
        registry.set("a", ID, drafts={"draft": "../x"})
    assert registry.get("a") == second


def test_a_registry_from_before_there_were_drafts(tmp_path: Path) -> None:
    path = tmp_path / "adapters.sqlite"
    older = sqlite3.connect(path)
    older.execute(
        "CREATE TABLE adapters (name TEXT PRIMARY KEY NOT NULL, content_id TEXT NOT NULL, version INTEGER NOT NULL, "
        "added REAL NOT NULL, source TEXT, base_model_name TEXT) STRICT, WITHOUT ROWID"
    )
    older.execute("INSERT INTO adapters VALUES ('a', ?, 3, 5.0, 'dir', NULL)", (ID,))
    older.execute("PRAGMA user_version = 1")
    older.commit()
    older.close()
    for _ in range(2):
        registry = AdapterRegistry(path)
        (entry,) = registry.list()
        assert (entry.name, entry.content_id, entry.version, entry.source) == ("a", ID, 3, "dir")
        assert entry.drafts == {}
        registry.close()


@pytest.mark.parametrize("text", ["", "[]", '{"draft": 1}', '{"draft": "../x"}', "{" * 9])
def test_drafts_that_nobody_wrote(text: str, tmp_path: Path) -> None:
    path = tmp_path / "adapters.sqlite"
    registry = AdapterRegistry(path)
    registry.set("a", ID)
    registry.close()
    other = sqlite3.connect(path)
    other.execute("UPDATE adapters SET drafts = ?", (text,))
    other.commit()
    other.close()
    registry = AdapterRegistry(path)
    with pytest.raises(ModelError, match="registry"):
        registry.list()
    registry.close()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a b",
        "/a",
        "a/",
        "a//b",
        "..",
        "a/../b",
        "-a",
        ".a",
        "é",
        "a\n",
        "a\0",
        "\ud800",
        "x" * 129,
        "a'; --",
    ],
)
def test_odd_names(name: str, registry: AdapterRegistry) -> None:
    with pytest.raises(InvalidParameter, match="adapter name"):
        registry.set(name, ID)
    assert registry.get(name) is None and not registry.remove(name)
    with pytest.raises(InvalidParameter):
        check_name(name)


def test_odd_fields(registry: AdapterRegistry) -> None:
    for fields in ({"content_id": "a"}, {"source": "\udc80"}, {"base_model_name": "\ud800"}):
        with pytest.raises(InvalidParameter):
            registry.set("a", **({"content_id": ID} | fields))
    assert registry.list() == ()


def test_names_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "adapters.sqlite"
    first = AdapterRegistry(path)
    entry = first.set("a", ID)
    # No close: what was set is on the disk.
    second = AdapterRegistry(path)
    assert second.get("a") == entry
    second.set("a", OTHER_ID)
    seen = first.get("a")
    assert seen is not None and seen.version == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first.close()
    second.close()
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_replacing_a_name_from_threads_and_processes(tmp_path: Path) -> None:
    path = tmp_path / "adapters.sqlite"

    def work(number: int) -> None:
        mine = AdapterRegistry(path)
        threads = [
            threading.Thread(
                target=lambda t=t: [mine.set("a", f"{number}{t}{i}".zfill(32)) for i in range(10)]
            )
            for t in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        mine.close()

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(i,)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    registry = AdapterRegistry(path)
    entry = registry.get("a")
    assert entry is not None and entry.version == 60
    registry.close()


def test_files_that_are_no_registry(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be taken for one" * 100)
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    for path in (tmp_path / "text", tmp_path / "newer", tmp_path / "none" / "a", tmp_path, "a\0b"):
        with pytest.raises(ModelError):
            AdapterRegistry(path)


# --- the watched directory -------------------------------------------------------------------------------


def test_scans(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / ".hidden")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / CONFIG_FILE).write_text("{}")
    found = scan(tmp_path)
    assert set(found) == {"a", "half"}
    assert found["half"].weights is None
    assert found["a"].weights is not None
    assert found["a"].weights.size == (tmp_path / "a" / WEIGHTS_FILE).stat().st_size
    assert scan(tmp_path, ["draft"])["a"] != scan(tmp_path)["a"]
    before = scan(tmp_path, ["draft"])
    assert before == scan(tmp_path, ["draft"])
    write(tmp_path / "a" / "draft")
    after = scan(tmp_path, ["draft"])
    assert after["a"] != before["a"] and after["half"] == before["half"]
    assert scan(tmp_path) == found, "nobody asked for it"
    with pytest.raises(ModelError):
        scan(tmp_path / "none")
    with pytest.raises(ModelError):
        scan("a\0b")


def test_what_comes_changes_and_goes(tmp_path: Path) -> None:
    known: dict[str, Any] = {}
    before = scan(tmp_path)

    def look() -> Changes:
        nonlocal before
        now = scan(tmp_path)
        found = changes(before, now, known)
        before = now
        known.update({name: now[name] for name in found.read})
        for name in found.forget:
            del known[name]
        return found

    nothing = Changes((), ())
    write(tmp_path / "a")
    assert look() == nothing
    assert look() == Changes(("a",), ())
    assert look() == nothing
    # Half a file is read once it stands still, and again when the rest has come.
    whole = (tmp_path / "a" / WEIGHTS_FILE).read_bytes()
    write(tmp_path / "b", CONFIG)
    (tmp_path / "b" / WEIGHTS_FILE).write_bytes(whole[:100])
    assert look() == nothing
    (tmp_path / "b" / WEIGHTS_FILE).write_bytes(whole[:200])
    assert look() == nothing
    assert look() == Changes(("b",), ())
    assert look() == nothing
    (tmp_path / "b" / WEIGHTS_FILE).write_bytes(whole)
    assert look() == nothing
    assert look() == Changes(("b",), ())
    # Only the configuration, of the same size.
    text = (tmp_path / "a" / CONFIG_FILE).read_text()
    (tmp_path / "a" / CONFIG_FILE).write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 9'))
    os.utime(tmp_path / "a" / CONFIG_FILE, ns=(1, 1))
    assert look() == nothing
    assert look() == Changes(("a",), ())
    # Another file of the same size and time, as archives without times give it.
    text = (tmp_path / "a" / CONFIG_FILE).read_text()
    (tmp_path / "new").write_text(text.replace('"lora_alpha": 9', '"lora_alpha": 7'))
    os.utime(tmp_path / "new", ns=(1, 1))
    (tmp_path / "new").rename(tmp_path / "a" / CONFIG_FILE)
    assert look() == nothing
    assert look() == Changes(("a",), ())
    # Replaced between two looks; then gone.
    (tmp_path / "a").rename(tmp_path / ".old")
    assert look() == nothing
    (tmp_path / ".old").rename(tmp_path / "a")
    assert look() == nothing
    assert look() == nothing
    shutil.rmtree(tmp_path / "a")
    assert look() == nothing
    assert look() == Changes((), ("a",))
    assert look() == nothing
    assert set(known) == {"b"}
