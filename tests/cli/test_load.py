"""`bench serve` and `bench sweep`: options, errors, and whole runs against a real server."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.bench.load.fake_server import DONE, FakeServer, serving, text, total
from tests.serving_process import ServeProcess
from tests.serving_process import serving as real_server
from tokenloom.cli.main import app


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args])


def last_json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@contextmanager
def fake(server: FakeServer) -> Iterator[FakeServer]:
    """The fake server on a loop of its own, beside the one that the command runs."""
    ready, stop = threading.Event(), threading.Event()

    async def work() -> None:
        async with serving(server):
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(work(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield server
    finally:
        stop.set()
        thread.join(10)


def answer(body: dict[str, Any]) -> list[Any]:
    count = body["max_tokens"]
    return [*(text("w") for _ in range(count)), text("", "length"), total(len(body["prompt"]), count), DONE]


@pytest.fixture(scope="module")
def server() -> Iterator[ServeProcess]:
    with real_server("--log-level", "error") as process:
        yield process


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return str(Path(__file__).parents[2] / "tokenloom" / "embedded" / "target")


def test_random_prompts_on_a_real_server(server: ServeProcess, tmp_path: Path) -> None:
    picture = tmp_path / "run.png"
    result = run(
        *("serve", "--base-url", server.url, "--num-prompts", "20", "--request-rate", "100", "--seed", "3"),
        *("--random-input-len", "40", "--random-output-len", "8", "--random-range-ratio", "0.5"),
        *("--random-prefix-len", "16", "--ignore-eos", "--num-warmups", "2", "--max-concurrency", "4"),
        *("--goodput", "ttft:60000", "e2el:60000", "--metadata", "a=1", "b=2", "--label", "x"),
        *("--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json"),
        *("--plot", str(picture), "--json"),
    )
    found = last_json(result)
    assert (found["completed"], found["failed"], found["model_id"]) == (20, 0, "tokenloom-embedded")
    assert found["requests_with_other_input_tokens"] == 0
    assert found["requests_with_fewer_output_tokens"] == 0
    assert found["total_output_tokens"] == found["requested_output_tokens"]
    assert found["goodput_attainment"] == 1.0
    assert 1 <= found["max_concurrent_requests"] <= 4
    assert 0 < found["median_ttft_ms"] < found["median_e2el_ms"]
    assert (found["a"], found["b"], found["label"]) == ("1", "2", "x")
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["completed"] == 20
    assert len(saved["ttfts"]) == len(saved["itls"]) == 20
    assert sum(saved["output_lens"]) == found["total_output_tokens"]
    assert min(saved["input_lens"]) >= 36
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("form", ["chat", "text"])
def test_texts_have_exactly_the_tokens_asked_for(
    server: ServeProcess, tokenizer: str, form: str, local: bool
) -> None:
    found = last_json(
        run(
            *("serve", "--base-url", server.url + "/v1", "--num-prompts", "8", "--random-input-len", "70"),
            *("--random-output-len", "4", "--random-range-ratio", "0.4", "--ignore-eos", "--json"),
            *(("--backend", "openai-chat") if form == "chat" else ("--prompt-form", "text")),
            *(("--tokenizer", tokenizer) if local else ()),
        )
    )
    assert (found["completed"], found["requests_with_other_input_tokens"]) == (8, 0)
    assert found["total_output_tokens"] == found["requested_output_tokens"]


def test_a_trace_with_shared_prefixes_hits_the_prefix_cache(server: ServeProcess, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 20 * i, "input_length": 3 * 512, "output_length": 64, "hash_ids": [0, 1, 10 + i]}
        for i in range(6)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = last_json(
        run(
            *("serve", "--base-url", server.url, "--trace", str(trace), "--length-scale", "0.125"),
            *("--ignore-eos", "--vocab-size", "500", "--speed", "2", "--json"),
        )
    )
    assert (found["completed"], found["workload"]) == (6, "mooncake")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (6 * 192, 6 * 8)


def test_sessions_of_a_trace(server: ServeProcess, tmp_path: Path) -> None:
    requests = [
        {"t": 0.0, "in": 130, "out": 3, "hash_runs": [[1, 2]], "think_time": 0},
        {"t": 9.0, "in": 200, "out": 3, "hash_runs": [[1, 3]], "think_time": 0.1},
    ]
    row = {"block_size": 64, "hash_id_scope": "local", "requests": requests}
    trace = tmp_path / "t.jsonl"
    trace.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    options = ("--base-url", server.url, "--trace", str(trace), "--ignore-eos", "--json")
    found = last_json(run("serve", *options, "--num-prompts", "3"))
    assert (found["completed"], found["total_input_tokens"]) == (3, 130 + 200 + 130)
    assert found["duration"] >= 0.1


def test_custom_prompts(server: ServeProcess, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "Once upon a time", "output_tokens": 5}\n{"prompt": "A dog", "output_tokens": 2}\n'
    )
    options = ("--dataset-name", "custom", "--dataset-path", str(path), "--custom-output-len", "-1")
    found = last_json(run("serve", "--base-url", server.url, *options, "--ignore-eos", "--json"))
    assert (found["completed"], found["total_output_tokens"]) == (2, 7)


def test_a_sweep_on_a_real_server(server: ServeProcess, tmp_path: Path) -> None:
    picture = tmp_path / "sweep.png"
    result = run(
        *("sweep", "--base-url", server.url, "--vocab-size", "500", "--random-input-len", "16"),
        *("--random-output-len", "2", "--ignore-eos", "--goodput", "e2el:60000", "--start", "50"),
        *(
            "--max-probes",
            "2",
            "--probe-seconds",
            "0.3",
            "--min-requests",
            "10",
            "--plot",
            str(picture),
            "--json",
        ),
    )
    found = last_json(result)
    assert (found["best"], found["failing"], found["converged"]) == (100.0, None, False)
    assert [probe["load"] for probe in found["probes"]] == [50.0, 100.0]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_of_a_traces_speed(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    rows = [f"2023-11-16 18:17:{i:02d}.0000000,20,3" for i in range(20)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    with fake(FakeServer(answer)) as server:
        result = run(
            *(
                "sweep",
                "--base-url",
                server.url,
                "--vocab-size",
                "50",
                "--trace",
                str(trace),
                "--start",
                "40",
            ),
            *("--goodput", "ttft:60000", "--max-probes", "2", "--tolerance", "0.1", "--json"),
        )
    found = last_json(result)
    assert (found["variable"], found["best"]) == ("speed", 80.0)
    prompts = [tuple(body["prompt"]) for body in server.bodies if len(body["prompt"]) == 20]
    assert len(set(prompts)) == len(prompts) >= 40  # no probe finds another one's prompts in a cache


def test_all_requests_fail_and_are_named() -> None:
    with fake(FakeServer(answer, status=500, error='{"error": {"message": "[red]broken[/red]"}}')) as server:
        result = run(
            *("serve", "--base-url", server.url, "--vocab-size", "50", "--num-prompts", "5"),
            *("--ready-check-timeout-sec", "0", "--json"),
        )
    assert result.exit_code == 1
    assert "HTTP 500" in result.stdout
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["errors"]["HTTP 500"]["count"] == 5
    assert "[red]broken" in found["errors"]["HTTP 500"]["example"]
    assert found["median_ttft_ms"] is None


def test_a_server_that_refuses_is_told_at_once() -> None:
    with fake(FakeServer(answer, status=400, error="no such field: ignore_eos")) as server:
        result = run("serve", "--base-url", server.url, "--vocab-size", "50")
    assert result.exit_code == 1
    assert "HTTP 400" in result.stderr
    assert "no such field: ignore_eos" in result.stderr
    assert len(server.bodies) == 1


def test_a_tokenizer_without_words_is_refused() -> None:
    with fake(FakeServer(answer)) as server:
        result = run("serve", "--base-url", server.url)
    assert result.exit_code == 1
    assert "--tokenizer" in result.stderr
    assert not server.bodies


WRONG = [
    (["--goodput", "ttft"], "--goodput"),
    (["--request-rate", "0"], "--request-rate"),
    (["--request-rate", "nan"], "--request-rate"),
    (["--request-rate", "1e-300"], "--request-rate"),
    (["--request-rate", "1", "--burstiness", "1e-300"], "--burstiness"),
    (["--goodput", "ttft:1,tpot"], "--goodput"),
    (["--save-result", "--label", "a/b"], "--label"),
    (["--save-result", "--result-filename", "a/b.json"], "--result-filename"),
    (["--save-result", "--result-filename", ".."], "--result-filename"),
    (["--plot", "."], "--plot"),
    (["--num-prompts", "0"], "--num-prompts"),
    (["--num-prompts", "1000000000"], "--num-prompts"),
    (["--vocab-size", "1000000000000"], "--vocab-size"),
    (["--random-input-len", "1000000000"], "--random-input-len"),
    (["--trace", "x", "--length-scale", "1e9"], "--length-scale"),
    (["--random-range-ratio", "1"], "--random-range-ratio"),
    (["--extra-body", "[1]"], "--extra-body"),
    (["--extra-body", "{"], "--extra-body"),
    (["--header", "X"], "--header"),
    (["--metadata", "X"], "--metadata"),
    (["--metric-percentiles", "101"], "--metric-percentiles"),
    (["--metric-percentiles", "a"], "--metric-percentiles"),
    (["--percentile-metrics", "ttft,xyz"], "--percentile-metrics"),
    (["--base-url", "ftp://x"], "--base-url"),
    (["--dataset-name", "custom"], "--dataset-path"),
    (["--dataset-path", "x"], "--dataset-path"),
    (["--speed", "2"], "--speed"),
    (["--length-scale", "2"], "--length-scale"),
    (["--max-request-tokens", "2"], "--max-request-tokens"),
    (["--burstiness", "2"], "--burstiness"),
    (["--prompt-form", "ids", "--backend", "openai-chat"], "--prompt-form"),
    (["--trace", "nowhere.csv"], "nowhere.csv"),
    (["--save-detailed"], "--save-detailed"),
    (["--save-result", "--result-dir", "nowhere/at/all"], "--result-dir"),
    (["--plot", "nowhere/at/all.png"], "--plot"),
    (["--port", "70000"], "--port"),
    (["--timeout", "inf"], "--timeout"),
    (["--temperature", "-1"], "--temperature"),
]


@pytest.mark.parametrize(("args", "name"), WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_wrong_options_are_refused_before_anything_is_asked(args: list[str], name: str) -> None:
    result = run("serve", *args)
    assert result.exit_code == 1
    assert name in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ([], "--goodput"),
        (["--goodput", "ttft:1", "--request-rate", "5"], "--request-rate"),
        (["--goodput", "ttft:1", "--trace", "x", "--speed", "5"], "--speed"),
        (["--goodput", "ttft:1", "--attainment", "1.5"], "--attainment"),
        (["--goodput", "ttft:1", "--trim", "0.5"], "--trim"),
    ],
)
def test_wrong_options_of_a_sweep(args: list[str], name: str) -> None:
    result = run("sweep", *args)
    assert result.exit_code == 1
    assert name in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_sweep_over_sessions_is_refused(tmp_path: Path) -> None:
    turn = {"t": 0.0, "in": 130, "out": 3, "hash_runs": [[1, 2]], "think_time": 0}
    trace = tmp_path / "t.jsonl"
    trace.write_text(json.dumps({"block_size": 64, "hash_id_scope": "local", "requests": [turn]}))
    result = run("sweep", "--trace", str(trace), "--goodput", "ttft:1")
    assert result.exit_code == 1
    assert "coding-agent" in result.stderr


def test_a_probe_that_num_prompts_cuts_short_is_warned_of() -> None:
    with fake(FakeServer(answer)) as server:
        result = run(
            *(
                "sweep",
                "--base-url",
                server.url,
                "--vocab-size",
                "50",
                "--random-input-len",
                "8",
                "--start",
                "40",
            ),
            *(
                "--random-output-len",
                "2",
                "--goodput",
                "ttft:60000",
                "--max-probes",
                "1",
                "--num-prompts",
                "20",
            ),
        )
    assert result.exit_code == 0
    assert "lasts only 0.5 s" in result.stderr


def test_no_server_is_one_line() -> None:
    result = run(
        "serve", "--port", "9", "--vocab-size", "50", "--model", "m", "--ready-check-timeout-sec", "0.1"
    )
    assert result.exit_code == 1
    assert "connection refused" in result.stderr
    result = run("serve", "--port", "9")
    assert result.exit_code == 1
    assert "cannot reach http://127.0.0.1:9" in result.stderr


@pytest.mark.parametrize(("module", "option"), [("aiohttp", ""), ("matplotlib", "--plot=x.png")])
def test_a_missing_module_names_the_extra(module: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)

    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    result = run("serve", *filter(None, [option]))
    assert result.exit_code == 1
    assert "tokenloom[bench]" in result.stderr
    assert module in result.stderr


def test_an_interrupt_prints_what_there_is(server: ServeProcess) -> None:
    command = [sys.executable, "-c", "from tokenloom.cli.main import main; main()", "bench", "serve"]
    command += ["--base-url", server.url, "--vocab-size", "500", "--random-input-len", "8"]
    command += ["--random-output-len", "2", "--request-rate", "20", "--num-prompts", "2000", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore it, and what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err
    found = json.loads(out.splitlines()[-1])
    assert found["interrupted"] is True
    assert found["completed"] > 0
