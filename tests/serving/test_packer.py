"""The process that prepares adapters: what it gives, how it ends, and what becomes of who asked it then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.api.helpers import wait_until
from tests.serving.peft_adapters import write_adapter
from tokenloom.config import make_config
from tokenloom.errors import EngineDead, ModelError, TokenloomError
from tokenloom.serving.adapter_library import AdapterLibrary
from tokenloom.serving.adapter_packer import PreparedAdapter
from tokenloom.serving.assembly import open_library
from tokenloom.serving.packer_client import PackerClient

SECONDS = 120.0
"""The process gets what others leave; a machine may be busy."""

pytestmark = pytest.mark.usefixtures("importable")


def config_of(model: Path, **options: Any) -> Any:
    return make_config({"model": str(model), "dtype": "float32", "threads": 1, **options}, env={})


@pytest.fixture
def library(tiny_model: Path, tmp_path: Path) -> Iterator[AdapterLibrary]:
    with closing(open_library(config_of(tiny_model, data_dir=str(tmp_path / "data")))) as opened:
        yield opened


@pytest.fixture
def client(library: AdapterLibrary) -> Iterator[PackerClient]:
    with closing(PackerClient(library.packer)) as made:
        yield made


def files(library: AdapterLibrary) -> set[str]:
    """What is kept in the data directory."""
    folder = library.packer.directory
    return {
        path.name
        for part in ("adapters", "images")
        for path in (folder / part).iterdir()
        if path.suffix in (".safetensors", ".image")
    }


def state(process_id: int) -> str:
    """The letter that Linux gives the state of a process; "" where there is none."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def is_gone(process_id: int) -> bool:
    """Whether all of its threads have ended."""
    try:
        return state(process_id) in ("", "Z") and len(os.listdir(f"/proc/{process_id}/task")) == 1
    except FileNotFoundError:
        return True


class Waiting:
    """Somebody who has `directory` prepared: the process is stopped, and has it before it."""

    def __init__(self, client: PackerClient, directory: Path) -> None:
        self.client = client
        self.directory = directory
        self.result: object = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        write_adapter(directory, 1)
        client.prepare(directory)
        assert client.process_id is not None
        self.process_id = client.process_id
        os.kill(self.process_id, signal.SIGSTOP)
        wait_until(lambda: state(self.process_id) == "T", SECONDS)
        self._thread.start()
        wait_until(client._turn.locked, SECONDS)

    def _run(self) -> None:
        try:
            self.result = self.client.prepare(self.directory)
        except BaseException as error:
            self.result = error

    def join(self) -> object:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        return self.result


def test_it_gives_what_the_library_gives(
    library: AdapterLibrary, client: PackerClient, tmp_path: Path, tiny_model: Path
) -> None:
    """The same answer and the same bytes, whoever packs."""
    own = tmp_path / "own"
    with closing(open_library(config_of(tiny_model, data_dir=str(own)))) as other:
        for seed in range(3):
            path = write_adapter(tmp_path / f"a{seed}", seed, rank=2 + seed)
            config = json.loads((path / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = f"org/base-{seed}"
            (path / "adapter_config.json").write_text(json.dumps(config))
            found, base = client.prepare(path)
            expected, expected_base = other.packer.prepare(path)
            assert base == expected_base == f"org/base-{seed}"
            assert found.image.parent == library.packer.directory / "images"
            assert found == PreparedAdapter(
                expected.content_id, expected.rank, expected.num_bytes, expected.num_pages, found.image
            )
            assert found.image.read_bytes() == expected.image.read_bytes()
            assert library.packer.restore(found.content_id) == found


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no idle priority")
def test_its_priority(client: PackerClient, tmp_path: Path) -> None:
    """Every thread of it is idle, and none of ours."""
    assert client.process_id is None, "nobody has asked it yet"
    client.prepare(write_adapter(tmp_path / "x", 1))
    assert client.process_id is not None
    threads = [int(name) for name in os.listdir(f"/proc/{client.process_id}/task")]
    assert len(threads) >= 2
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_IDLE}
    assert os.sched_getscheduler(0) != os.SCHED_IDLE
    assert os.getpgid(client.process_id) != os.getpgid(0)
    # Linux shares processors out between sessions before it looks at priorities.
    assert os.getsid(client.process_id) == os.getsid(0)


def test_where_there_is_no_idle_priority(
    client: PackerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    client.prepare(write_adapter(tmp_path / "x", 1))
    assert client.process_id is not None
    assert os.getpriority(os.PRIO_PROCESS, client.process_id) == 19


def test_killed_in_the_middle(library: AdapterLibrary, client: PackerClient, tmp_path: Path) -> None:
    """Who asked gets one clear error, nothing has changed, and the next one gets another process."""
    waiting = Waiting(client, tmp_path / "x")
    write_adapter(tmp_path / "x", 2)
    before = files(library)
    os.kill(waiting.process_id, signal.SIGKILL)
    error = waiting.join()
    assert type(error) is TokenloomError
    assert "killed by SIGKILL" in str(error)
    assert str(tmp_path / "x") in str(error)
    assert files(library) == before
    found, _ = client.prepare(tmp_path / "x")
    assert found == library.packer.prepare(tmp_path / "x")[0]
    assert client.process_id != waiting.process_id
    assert is_gone(waiting.process_id)


def test_killed_while_nobody_asks(client: PackerClient, tmp_path: Path) -> None:
    first = client.prepare(write_adapter(tmp_path / "x", 1))
    before = client.process_id
    assert before is not None
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: is_gone(before))
    assert client.prepare(tmp_path / "x") == first
    assert client.process_id not in (None, before)


def test_it_ends_when_it_is_idle(library: AdapterLibrary, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "x", 1)
    with closing(PackerClient(library.packer, idle_seconds=0.2)) as client:
        first = client.prepare(path)
        before = client.process_id
        assert before is not None
        wait_until(lambda: client.process_id is None)
        assert state(before) == "", "no zombie is left"
        assert client.prepare(path) == first
        assert client.process_id != before
        # A busy one is not idle, however long it takes.
        wait_until(lambda: client.process_id is None)
        waiting = Waiting(client, path)
        time.sleep(0.5)
        assert client.process_id == waiting.process_id
        os.kill(waiting.process_id, signal.SIGCONT)
        assert waiting.join() == first


def test_close_ends_it_and_who_waits(client: PackerClient, tmp_path: Path) -> None:
    waiting = Waiting(client, tmp_path / "x")
    client.close()
    assert isinstance(waiting.join(), EngineDead)
    assert state(waiting.process_id) == ""
    with pytest.raises(EngineDead):
        client.prepare(tmp_path / "x")
    assert client.process_id is None


def test_errors_have_their_fields(library: AdapterLibrary, client: PackerClient, tmp_path: Path) -> None:
    """Each as the library itself raises it."""
    damaged = write_adapter(tmp_path / "damaged", 1)
    (damaged / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    dora = write_adapter(tmp_path / "dora", 1)
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    directories: list[str | Path] = [
        damaged,
        dora,
        tmp_path,
        tmp_path / "nowhere",
        damaged / "adapter_config.json",
        "",
        "\0",
        "a\nb",
        "x" * 300_000,
        "\ud800 is in no file name",
    ]
    for directory in directories:
        with pytest.raises(ModelError) as expected:
            library.packer.prepare(directory)
        with pytest.raises(ModelError) as found:
            client.prepare(directory)
        assert type(found.value) is type(expected.value)
        assert (found.value.found, found.value.supported) == (
            expected.value.found,
            expected.value.supported,
        )
    assert files(library) == set()
    process_id = client.process_id
    client.prepare(write_adapter(tmp_path / "sound", 1))
    assert client.process_id == process_id, "an error ends nothing"


@pytest.mark.parametrize("name", ["größe 東京 🌳", "a\nb", '"quoted" \\', "-", os.fsdecode(b"\xff\xfe")])
def test_names_of_directories(
    library: AdapterLibrary, client: PackerClient, tmp_path: Path, name: str
) -> None:
    try:
        path = write_adapter(tmp_path / name, 1)
    except OSError:
        pytest.skip("the file system takes no such name")
    assert client.prepare(path) == library.packer.prepare(path)


def test_a_data_directory_that_is_full(library: AdapterLibrary, client: PackerClient, tmp_path: Path) -> None:
    """An error of the disk is one of the data directory, in both places."""
    path = write_adapter(tmp_path / "x", 1)
    store = library.packer.directory / "adapters"
    client.prepare(path)
    for kept in store.iterdir():
        kept.unlink()
    store.rmdir()
    store.write_bytes(b"")
    with pytest.raises(ModelError, match="a data directory with room"):
        client.prepare(path)


def test_a_model_that_has_changed(
    tiny_model: Path, library: AdapterLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine computes with was read at the start: nothing is packed for another model."""
    monkeypatch.setattr(library.packer, "layout", "float32-65536-0123456789ab")
    with closing(PackerClient(library.packer)) as client:
        for _ in range(2):
            with pytest.raises(ModelError, match="other layers in"):
                client.prepare(write_adapter(tmp_path / "x", 1))
    assert files(library) == set()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("import sys; sys.stdin.readline(); print('hello', flush=True); sys.stdin.read()", "SIGKILL"),
        ("print('{\"type\": \"packed\"', end='')", "ended with exit code 0"),
    ],
)
def test_a_process_that_is_none(library: AdapterLibrary, tmp_path: Path, program: str, words: str) -> None:
    with closing(PackerClient(library.packer, command=(sys.executable, "-c", program))) as client:
        with pytest.raises(TokenloomError, match=words):
            client.prepare(tmp_path)
        assert client.process_id is None
    client = PackerClient(library.packer, command=("/nowhere/python",))
    with closing(client), pytest.raises(TokenloomError, match="cannot be started"):
        client.prepare(tmp_path)


def test_what_it_prints_is_no_answer(library: AdapterLibrary, tmp_path: Path) -> None:
    """Standard output is the log's, whatever prints there."""
    program = "import os, tokenloom.serving.packer_process as p\nmake = p._make\n"
    program += (
        "def loud(start):\n    print('noise', flush=True); os.system('echo noise')\n    return make(start)\n"
    )
    program += "p._make = loud\np.main()"
    path = write_adapter(tmp_path / "x", 1)
    with closing(PackerClient(library.packer, command=(sys.executable, "-c", program))) as client:
        assert client.prepare(path) == library.packer.prepare(path)


PARENT = """
import sys, threading, time
from contextlib import closing
from pathlib import Path
from tokenloom.config import make_config
from tokenloom.serving.assembly import open_library
from tokenloom.serving.packer_client import PackerClient

model, adapter = sys.argv[1:]
client = PackerClient(open_library(make_config({"model": model, "dtype": "float32"}, env={})).packer)
client.prepare(adapter)
print(client.process_id, flush=True)
for line in sys.stdin:
    client.prepare(adapter)
    print("prepared", flush=True)
"""


def test_no_orphan_after_a_killed_parent(tiny_model: Path, tmp_path: Path) -> None:
    """It outlives neither a killed parent, nor one that is killed while it packs for it; Ctrl-C is not for it."""
    path = write_adapter(tmp_path / "x", 1)
    for is_busy in (False, True):
        parent = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PARENT), str(tiny_model), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            text=True,
        )
        assert parent.stdin is not None and parent.stdout is not None
        with parent:
            child = int(parent.stdout.readline())
            assert not is_gone(child)
            if is_busy:
                os.kill(child, signal.SIGSTOP)
                wait_until(lambda: state(child) == "T", SECONDS)  # noqa: B023 (called at once)
                parent.stdin.write("go\n")
                parent.stdin.flush()
            parent.kill()
            parent.wait()
            if is_busy:
                os.kill(child, signal.SIGCONT)
            wait_until(lambda: is_gone(child), SECONDS)  # noqa: B023
