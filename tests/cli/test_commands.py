"""The small commands."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from tokenloom import __version__
from tokenloom.cli import doctor, machine
from tokenloom.cli.main import app
from tokenloom.kernels.native import extension

run = CliRunner().invoke


def test_version() -> None:
    result = run(app, ["version"])
    assert result.output.startswith(f"tokenloom {__version__} ")


def test_help_lists_the_commands() -> None:
    result = run(app, ["--help"])
    for name in ("serve", "generate", "chat", "bench", "doctor", "version"):
        assert f"  {name} " in result.output


def test_doctor() -> None:
    result = run(app, ["doctor"])
    assert result.exit_code == 0
    words = "avx2 avx512_bf16 neon GB/s cores GiB compiler gpu blas numpy"
    assert [word for word in words.split() if word not in result.output] == []


def test_doctor_as_json() -> None:
    facts = json.loads(run(app, ["doctor", "--json"]).output.splitlines()[-1])
    assert facts["tokenloom"] == __version__
    assert facts["processor"]["cores"] >= 1
    assert set(facts["processor"]["features"]) == set(machine.FEATURES)
    assert facts["bandwidth"]["copy_gb_s"] > 0.1
    assert facts["bandwidth"]["read_gb_s"] > 0.1
    ops = facts["ops"]
    assert ops["kernels"] == ("native" if ops["isas"] else "reference")
    assert ops["isa"] == (ops["isas"][0] if ops["isas"] else None)
    assert ops["reason"]


@pytest.fixture
def quick_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measuring, on a machine with native kernels for two instruction sets."""
    monkeypatch.setattr(machine, "bandwidth", lambda: {"copy_gb_s": 1.0, "read_gb_s": 1.0})
    monkeypatch.setattr(extension, "missing", lambda: None)
    monkeypatch.setattr(doctor, "missing", lambda: None)
    for module in (extension, doctor):
        monkeypatch.setattr(module, "isas", lambda: ["avx512", "avx2"])


def ops_in_use(*arguments: str, env: dict[str, str] | None = None) -> str:
    result = run(app, ["doctor", *arguments], env=env)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split()).partition("ops in use ")[2].partition(" versions")[0]


def test_doctor_says_why_there_are_no_native_ops(quick_doctor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (extension, doctor):
        monkeypatch.setattr(module, "missing", lambda: "no compiler was found")
    assert ops_in_use() == "reference (numpy): no compiler was found"
    asked = ops_in_use("--kernels", "native")
    assert asked == "none: kernels native is not supported: no compiler was found"


def test_doctor_follows_the_options_in_force(quick_doctor: None, tmp_path: Path) -> None:
    best = "native, avx512: the best that this processor has (it can run avx2 too)"
    assert ops_in_use() == best
    reference = {"TOKENLOOM_KERNELS": "reference"}
    assert ops_in_use(env=reference) == "reference (numpy): asked for by name"
    assert ops_in_use("--kernels", "native", env=reference) == best
    chosen = "native, avx2: asked for by name (it can run avx512 too)"
    assert ops_in_use(env={"TOKENLOOM_ISA": "avx2"}) == chosen
    file = tmp_path / "tokenloom.toml"
    file.write_text('isa = "avx2"\n')
    assert ops_in_use("--config", str(file)) == chosen
    assert ops_in_use("--dtype", "float16").startswith("reference (numpy): the native kernels compute in")


def test_doctor_says_what_would_not_start(quick_doctor: None) -> None:
    env = {"TOKENLOOM_KERNELS": "reference", "TOKENLOOM_ISA": "avx2"}
    assert ops_in_use(env=env).startswith("none: isa avx2 is not supported: it is for the native kernels")
    facts = json.loads(run(app, ["doctor", "--json"], env=env).output.splitlines()[-1])
    assert (facts["ops"]["kernels"], facts["ops"]["isas"]) == (None, ["avx512", "avx2"])
    assert ops_in_use("--isa", "neon").startswith("none: isa neon is not supported")
    kv = ops_in_use("--kernels", "reference", "--kv-dtype", "int8")
    assert kv.startswith("none: kv_dtype int8 is not supported")


def test_a_machine_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_fields", lambda path: {})
    assert machine.memory() == {"total_gib": 0.0, "available_gib": 0.0}
    assert not any(machine.processor()["features"].values())


def test_prompts_file_must_have_prompts(tmp_path: Path) -> None:
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n\n")
    result = run(app, ["bench", "throughput", "--prompts", str(empty)])
    assert result.exit_code == 1
    assert "a file with at least one line" in result.stderr


@pytest.mark.parametrize("name", ["num-prompts", "input-tokens", "output-tokens"])
def test_throughput_counts_start_at_one(name: str) -> None:
    result = run(app, ["bench", "throughput", f"--{name}", "0"])
    assert result.exit_code == 1
    assert result.stderr == f"tokenloom: {name.replace('-', '_')}: got 0, but it must be at least 1\n"


# --- chat with a server ------------------------------------------------------------------------------------


class FakeServer(BaseHTTPRequestHandler):
    """Answers every chat with two pieces, or with an error when the message is "fail"."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({**body, "authorization": self.headers.get("Authorization")})
        if body["messages"][-1]["content"] == "fail":
            self._send(400, {"error": {"message": "this went wrong"}})
            return
        events = [{"choices": [{"delta": {"content": text}}]} for text in ("Once ", "upon a time")]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        self._send_bytes(200, "".join(lines).encode())

    def _send(self, status: int, body: dict[str, Any]) -> None:
        self._send_bytes(status, json.dumps(body).encode())

    def _send_bytes(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Silent."""


@pytest.fixture
def fake_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    FakeServer.seen.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_chat_with_a_server(fake_url: str) -> None:
    talk = "Tell a story\nfail\nAnother\n/reset\nNew\n/quit\nnever sent\n"
    args = [
        "chat",
        "--url",
        fake_url + "/v1",
        "--api-key",
        "k",
        "--system",
        "Be brief.",
        "--sampling-seed",
        "5",
    ]
    result = run(app, args, input=talk)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Once upon a time\n") == 3
    assert "this went wrong" in result.stderr
    contents = [[message["content"] for message in body["messages"]] for body in FakeServer.seen]
    assert contents == [
        ["Be brief.", "Tell a story"],
        ["Be brief.", "Tell a story", "Once upon a time", "fail"],
        ["Be brief.", "Tell a story", "Once upon a time", "Another"],
        ["Be brief.", "New"],
    ]
    assert FakeServer.seen[0]["authorization"] == "Bearer k"
    assert FakeServer.seen[0]["seed"] == 5


def test_chat_with_nobody() -> None:
    result = run(app, ["chat", "--url", "http://127.0.0.1:1"], input="hello\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("tokenloom: cannot reach http://127.0.0.1:1: ")
    assert run(app, ["chat", "--url", "ftp://x"]).exit_code == 1
