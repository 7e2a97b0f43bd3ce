"""`tokenloom serve` as a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from tests.serving.helpers import write_tokenizer
from tests.serving_process import ServeProcess, is_alive, serving
from tokenloom.cli.serve import base_url, curl_line, listen
from tokenloom.errors import InvalidParameter


def ask(server: ServeProcess) -> httpx.Response:
    """Send what the printed curl line sends."""
    words = shlex.split(server.curl)
    body = json.loads(words[words.index("-d") + 1])
    return httpx.post(words[1], json=body, timeout=60)


def assert_gone(pids: list[int]) -> None:
    end = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_alive(pid)]


def test_from_start_to_interrupt(embedded_model: Path) -> None:
    with serving("--max-running", "8") as server:
        assert any("max_running=8" in line for line in server.lines)
        assert httpx.get(f"{server.url}/health").status_code == 200
        answer = ask(server)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"][0]["message"]["content"]) > 20
        pids = [server.process.pid, *server.children()]
        assert len(pids) >= 2
        start = time.monotonic()
        assert server.stop(signal.SIGINT) == 0
        assert time.monotonic() - start < 10
    assert_gone(pids)
    assert "Traceback" not in server.rest()


def test_sigterm_while_an_answer_streams(embedded_model: Path) -> None:
    with serving() as server:
        pids = server.children()
        body = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert server.stop(signal.SIGTERM) == 0
    events = [line for line in rest if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]" or "error" in json.loads(events[-1][6:])
    assert_gone(pids)
    assert "Traceback" not in server.rest()


def test_a_key_is_needed_and_not_printed(embedded_model: Path) -> None:
    with serving("--api-key", "s3cret") as server:
        assert "$TOKENLOOM_API_KEY" in server.curl
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer s3cret"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    assert "s3cret" not in server.rest()


def test_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BloomForCausalLM"], "model_type": "bloom"}')
    server = ServeProcess(str(tmp_path))
    output = server.rest()
    assert server.process.returncode == 1
    last = output.splitlines()[-1]
    assert last.startswith("tokenloom: ")
    assert "BloomForCausalLM" in last
    assert "LlamaForCausalLM" in last
    assert "Traceback" not in output


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidParameter, match="Address already in use") as caught:
            listen("127.0.0.1", port)
    assert (caught.value.param, caught.value.value) == ("port", port)


def test_a_host_that_is_not_here() -> None:
    with pytest.raises(InvalidParameter) as caught:
        listen("no-such-host.invalid", 0)
    assert caught.value.param == "host"


def test_base_url_is_one_that_a_client_can_use() -> None:
    with listen("0.0.0.0", 0) as listener:
        assert base_url(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_the_curl_line_survives_a_shell() -> None:
    line = curl_line("http://127.0.0.1:1", "it's a model", has_key=True)
    words = shlex.split(line)
    assert json.loads(words[-1])["model"] == "it's a model"
    assert "Authorization: Bearer $TOKENLOOM_API_KEY" in words
    assert os.linesep not in line
