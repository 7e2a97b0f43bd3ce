"""Packed weights on disk: what comes back is what this start would have packed, or nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native kernels were not built")

from tokenloom.errors import InvalidParameter  # noqa: E402
from tokenloom.kernels.native import weight_cache  # noqa: E402
from tokenloom.kernels.native.packed_forms import Sources, WeightForm, form_of  # noqa: E402
from tokenloom.kernels.native.weight_cache import WeightCache  # noqa: E402
from tokenloom.kernels.native.weights import PackedTable  # noqa: E402

PREFIX = 32
NO_SOURCES: Sources = {}


@pytest.fixture
def pool() -> Any:
    return native.ThreadPool(2)


def some_weights(pool: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((70, 48)).astype(np.float32)
    table = rng.standard_normal((11, 6)).astype(ml_dtypes.bfloat16)
    return {
        "linear": native.pack(pool, [matrix], ["float32"], "bfloat16", False, 0),
        "pair": native.pack(pool, [matrix[:32], matrix[32:64]], ["float32"] * 2, "int8", True, 0),
        "table": PackedTable(table),
        "norm": np.arange(5, dtype=np.float32),
    }


def cache_of(directory: Path, pool: Any, weights: Mapping[str, Any] | None = None) -> WeightCache:
    """A cache for a start that would pack `weights`."""
    forms = {name: form_of(w) for name, w in (some_weights(pool) if weights is None else weights).items()}
    return WeightCache(directory, pool, lambda sources: forms)


def kept(directory: Path, pool: Any) -> tuple[WeightCache, Path]:
    cache = cache_of(directory, pool)
    cache.save("a", some_weights(pool))
    return cache, cache.path("a")


def assert_same(found: Mapping[str, Any] | None, weights: Mapping[str, Any]) -> None:
    assert found is not None and list(found) == list(weights)
    for name, weight in weights.items():
        assert form_of(found[name]) == form_of(weight)
        if isinstance(weight, PackedTable):
            assert (found[name].values == weight.values).all()
        elif isinstance(weight, np.ndarray):
            assert (found[name] == weight).all()
        else:
            assert (found[name].data == weight.data).all()
            assert (found[name].scales == weight.scales).all()


def test_round_trip(tmp_path: Path, pool: Any) -> None:
    cache = cache_of(tmp_path / "new" / "deep", pool)
    assert cache.load("a", NO_SOURCES) is None
    weights = some_weights(pool)
    cache.save("a", weights)
    assert_same(cache.load("a", NO_SOURCES), weights)
    assert cache.load("b", NO_SOURCES) is None
    assert [path.suffix for path in (tmp_path / "new" / "deep").iterdir()] == [".packed"]


# --- damage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "length", "half a header", "empty", "zeros"])
def test_damage_is_noticed(tmp_path: Path, pool: Any, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache, path = kept(tmp_path, pool)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[5000] ^= 1
    elif damage == "cut":
        del data[-4097:]
    elif damage == "longer":
        data += bytes(4096)
    elif damage == "length":
        data[8:16] = (1 << 60).to_bytes(8, "little")
    elif damage == "half a header":
        del data[100:]
    elif damage == "empty":
        data.clear()
    else:
        data[:] = bytes(len(data))
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert cache.load("a", NO_SOURCES) is None
    assert "is not used" in caplog.text
    cache.save("a", some_weights(pool))
    assert_same(cache.load("a", NO_SOURCES), some_weights(pool))


def test_every_byte_of_the_header_counts(tmp_path: Path, pool: Any) -> None:
    cache, path = kept(tmp_path, pool)
    data = bytearray(path.read_bytes())
    for position in range(PREFIX + int.from_bytes(data[8:16], "little")):
        data[position] ^= 1
        path.write_bytes(data)
        assert cache.load("a", NO_SOURCES) is None, position
        data[position] ^= 1
    path.write_bytes(data)
    assert cache.load("a", NO_SOURCES) is not None


def reseal(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header and give it the digest that it should have."""
    data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    header = json.loads(data[PREFIX : PREFIX + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    body = data[-(-(PREFIX + length) // 4096) * 4096 :]
    digest = blake2b(text, digest_size=16).digest()
    start = b"tlpacked" + len(text).to_bytes(8, "little") + digest + text
    path.write_bytes(start + bytes(-len(start) % 4096) + body)


def in_form(entry: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["weights"][entry]["form"].update(fields)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another key": lambda header: header.update(key="b"),
    "another name": lambda header: header["weights"][0].update(name="linfar"),
    "another order": lambda header: header["weights"].reverse(),
    "an entry is missing": lambda header: header["weights"].pop(),
    "an entry twice": lambda header: header["weights"].append(header["weights"][3]),
    "another format": in_form(0, format="float32"),
    "an unknown format": in_form(0, format="int2"),
    "not paired": in_form(1, paired=False),
    "paired as a number": in_form(1, paired=1),
    "another kind": in_form(2, kind="vector"),
    "an unknown kind": in_form(2, kind="sparse"),
    "another type and shape": in_form(2, format="float32", shape=[11, 3]),
    "another group": in_form(0, group=64),
    "a shape of one number": in_form(0, shape=[3360]),
    "an endless shape": in_form(3, shape=[float("inf")]),
    "a shape above the memory": in_form(3, shape=[10**14]),
    "a matrix above the memory": in_form(0, shape=[1 << 31, 1 << 31]),
    "a shape above 64 bits": in_form(3, shape=[1 << 70]),
    "a shape of text": in_form(3, shape=["5"]),
    "parts of another size": lambda header: header["weights"][3]["parts"][0].update(num_bytes=24),
    "a negative size": lambda header: header["weights"][3]["parts"][0].update(num_bytes=-4096),
    "sizes far above the file": lambda header: header["weights"][0]["parts"][0].update(num_bytes=1 << 62),
    "a part is missing": lambda header: header["weights"][0]["parts"].pop(),
    "an unknown field": lambda header: header.update(more=[]),
    "a list": lambda header: b"[]",
    "no JSON": lambda header: b"{",
    "no text": lambda header: b'{"key": "\xff"}',
    "nested deeply": lambda header: b'{"key": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested deeply under an unknown name": lambda header: b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested deeply in the weights": lambda header: b'{"key": "a", "weights": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_sound_header_that_does_not_fit(
    tmp_path: Path, pool: Any, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = kept(tmp_path, pool)
    reseal(path, lambda header: None)
    assert cache.load("a", NO_SOURCES) is not None
    reseal(path, HEADERS[name])
    made: list[WeightForm] = []
    assemble = weight_cache.assemble
    monkeypatch.setattr(
        weight_cache, "assemble", lambda form, parts: made.append(form) or assemble(form, parts)
    )
    with caplog.at_level(logging.WARNING):
        assert cache.load("a", NO_SOURCES) is None
    assert caplog.text.count("is not used") == 1
    assert not made or name in ("parts of another size", "a part is missing")


def test_another_program_finds_nothing(tmp_path: Path, pool: Any) -> None:
    kept(tmp_path, pool)
    weights = some_weights(pool)
    for other in (
        {name: weights[name] for name in ("linear", "pair", "table")},
        weights | {"bias": np.zeros(70, np.float32)},
        weights | {"norm": np.zeros(6, np.float32)},
        weights | {"norm": weights["linear"]},
    ):
        assert cache_of(tmp_path, pool, other).load("a", NO_SOURCES) is None


def test_memory_that_runs_out_is_no_end(tmp_path: Path, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = kept(tmp_path, pool)

    def fail(form: WeightForm, parts: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(weight_cache, "assemble", fail)
    assert cache.load("a", NO_SOURCES) is None


# --- files and directories -------------------------------------------------------------------------------


def test_a_fifo_does_not_hang(tmp_path: Path, pool: Any) -> None:
    cache = cache_of(tmp_path, pool)
    os.mkfifo(cache.path("a"))
    assert cache.load("a", NO_SOURCES) is None
    cache.save("a", some_weights(pool))
    assert_same(cache.load("a", NO_SOURCES), some_weights(pool))


def test_a_directory_in_the_place_of_the_file(
    tmp_path: Path, pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of(tmp_path, pool)
    cache.path("a").mkdir()
    with caplog.at_level(logging.WARNING):
        assert cache.load("a", NO_SOURCES) is None
        assert "not a regular file" in caplog.text
        caplog.clear()
        cache.save("a", some_weights(pool))
    assert len(caplog.records) == 1 and "Is a directory" in caplog.text
    assert list(tmp_path.iterdir()) == [cache.path("a")]


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("tokenloom.kernels.native.weight_cache.Path.mkdir", errno.EACCES),
        ("tokenloom.kernels.native.weight_cache.os.scandir", errno.EACCES),
        ("tokenloom.kernels.native.weight_cache.WeightCache._write", errno.ENOSPC),
        ("tokenloom.kernels.native.weight_cache.os.replace", errno.EROFS),
    ],
)
def test_what_cannot_be_kept_is_said_once(
    tmp_path: Path,
    pool: Any,
    target: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = cache_of(tmp_path, pool)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(target, failing(number))
        cache.save("a", some_weights(pool))
    assert len(caplog.records) == 1
    assert (
        os.strerror(number) in caplog.text and "weight_cache" in caplog.text and str(tmp_path) in caplog.text
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path: Path, pool: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache, path = kept(tmp_path, pool)
    path.write_bytes(b"damaged")
    tmp_path.chmod(0o555)
    try:
        with caplog.at_level(logging.WARNING):
            assert cache.load("a", NO_SOURCES) is None
            cache.save("a", some_weights(pool))
    finally:
        tmp_path.chmod(0o755)
    assert caplog.text.count("Permission denied") == 1


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path, pool: Any) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "file/inside", "link", "loop", "x" * 300, "zero\0"):
        with pytest.raises(InvalidParameter, match="weight_cache: .*a directory") as caught:
            cache_of(tmp_path / name, pool)
        assert caught.value.param == "weight_cache" and "\n" not in str(caught.value)
    for name in ("", "new", "new/inside"):
        cache_of(tmp_path / name, pool)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_the_mode_follows_the_umask(tmp_path: Path, pool: Any, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        _, path = kept(tmp_path, pool)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def dead_pid() -> int:
    """The number of a process that has ended and been waited for."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_go(tmp_path: Path, pool: Any) -> None:
    dead = dead_pid()
    gone = [
        f"packed-{dead}-0123abcd.part",
        f"packed-{dead}-ffffffff.part",
        f"packed-{os.getpid()}-00000000.part",
    ]
    others = [
        f"packed-{os.getppid()}-0123abcd.part",
        f"packed-{dead}.part",
        f"packed-0{dead}-0123abcd.part",
        "packed-0-0123abcd.part",
        f"packed-{10**30}-0123abcd.part",
        f"packed-{dead}-0123abcd.part.keep",
        "model.part",
        "0123.packed",
    ]
    for name in gone + others:
        (tmp_path / name).write_text("x")
    locked = f"packed-{dead}-aaaaaaaa.part"
    with open(tmp_path / locked, "xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _, path = kept(tmp_path, pool)
        assert {entry.name for entry in tmp_path.iterdir()} == {*others, locked, path.name}
    kept(tmp_path, pool)
    assert {entry.name for entry in tmp_path.iterdir()} == {*others, path.name}


def test_a_file_that_is_being_written_stays(
    tmp_path: Path, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the numbers of the processes say, which containers count apart."""
    monkeypatch.setattr(weight_cache, "_is_running", lambda pid: False)

    def write(self: WeightCache, file: Any, key: str, weights: Mapping[str, Any]) -> None:
        for pid in (os.getpid(), dead_pid()):
            monkeypatch.setattr(weight_cache.os, "getpid", lambda pid=pid: pid)
            weight_cache._remove_leftovers(tmp_path)
            assert Path(file.name).exists()

    monkeypatch.setattr(WeightCache, "_write", write)
    kept(tmp_path, pool)
    assert [path.suffix for path in tmp_path.iterdir()] == [".packed"]


def write_endlessly(directory: Path) -> None:
    pool = native.ThreadPool(1)

    def write(self: WeightCache, file: Any, key: str, weights: Mapping[str, Any]) -> None:
        file.write(b"x")
        time.sleep(600)

    weight_cache.WeightCache._write = write  # type: ignore[method-assign]
    cache_of(directory, pool).save("a", some_weights(pool))


def test_a_writer_that_is_killed(tmp_path: Path, pool: Any) -> None:
    """While it lives its file stays; once it was killed the next save removes the file."""
    process = multiprocessing.get_context("spawn").Process(target=write_endlessly, args=(tmp_path,))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*.part")) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        (part,) = tmp_path.glob("*.part")
        assert part.name.startswith(f"packed-{process.pid}-")
        _, path = kept(tmp_path, pool)
        assert set(tmp_path.iterdir()) == {part, path}
    finally:
        process.kill()
        process.join()
    kept(tmp_path, pool)
    assert set(tmp_path.iterdir()) == {path}


def test_two_at_once(tmp_path: Path) -> None:
    """Whoever reads while others write finds a whole file."""
    cache, _ = kept(tmp_path, native.ThreadPool(1))
    weights = some_weights(native.ThreadPool(1))

    def write() -> None:
        mine = native.ThreadPool(1)
        for _ in range(30):
            cache_of(tmp_path, mine).save("a", weights)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert_same(cache.load("a", NO_SOURCES), weights)
    for writer in writers:
        writer.join()
    assert [path.suffix for path in tmp_path.iterdir()] == [".packed"]
