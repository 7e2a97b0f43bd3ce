"""Commands that run a model in this process, on the simulated executor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.serving.helpers import simulated_parts, write_tokenizer
from tokenloom.cli import local, throughput
from tokenloom.cli.chat import take_turn
from tokenloom.cli.local import LocalModel
from tokenloom.cli.main import app
from tokenloom.config import Config
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import ContextLengthExceeded, InvalidParameter
from tokenloom.kernels.native import extension
from tokenloom.serving.assembly import EngineParts

run = CliRunner().invoke
PARAMS = SamplingParams(max_tokens=30, temperature=1.0, seed=3)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[EngineParts]:
    """Every engine that a command builds."""
    directory = write_tokenizer(tmp_path / "model")
    engines: list[EngineParts] = []

    def build(config: Config, listener: Any) -> EngineParts:
        engines.append(simulated_parts(directory))
        return engines[-1]

    monkeypatch.setattr(local, "build_engine", build)
    return engines


def test_generate_prints_what_the_tokens_say(built: list[EngineParts]) -> None:
    arguments = ["generate", "Once", "--max-tokens", "30", "--temperature", "1", "--sampling-seed", "3"]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    model = LocalModel(Config())
    assert result.stdout_bytes.decode() == "".join(model.complete("Once", PARAMS)) + "\n"
    assert not built[0].engine.has_work
    assert built[0].engine.executor.closed  # type: ignore[attr-defined]


def test_generate_reads_standard_input(built: list[EngineParts]) -> None:
    given = run(app, ["generate", "Once", "--sampling-seed", "3"])
    read = run(app, ["generate", "-", "--sampling-seed", "3"], input="Once")
    assert given.exit_code == 0
    assert read.stdout == given.stdout


def test_generate_as_chat_uses_the_template(built: list[EngineParts]) -> None:
    result = run(app, ["generate", "--chat", "Hi", "--sampling-seed", "3", "--max-tokens", "30"])
    model = LocalModel(Config())
    greedy = SamplingParams(max_tokens=30, temperature=0.0, seed=3)
    text = "<user>Hi\n<assistant>"
    assert result.stdout_bytes.decode() == "".join(model.complete(text, greedy)) + "\n"


def test_a_prompt_that_does_not_fit(built: list[EngineParts]) -> None:
    result = run(app, ["generate", "x" * 600])
    assert result.exit_code == 1
    assert result.stderr.startswith("tokenloom: This model's maximum context length is 512 tokens")
    with pytest.raises(ContextLengthExceeded):
        list(LocalModel(Config()).complete("x" * 600, PARAMS))


def test_bad_sampling_parameters_are_one_line(built: list[EngineParts]) -> None:
    result = run(app, ["generate", "x", "--temperature", "-1"])
    assert result.exit_code == 1
    assert result.stderr == "tokenloom: temperature: got -1.0, but it must be a number from 0 to 100\n"
    assert not built


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--kernels", "native", "--dtype", "float16"], "dtype float16 is not supported"),
        (["--isa", "neon"], "isa neon is not supported: this build on this processor has avx2, portable"),
        (["--kernels", "reference", "--isa", "avx2"], "isa avx2 is not supported"),
        (["--threads", "2000"], "threads: got 2000, but it must be 0 to 256"),
    ],
)
def test_options_that_cannot_be_had_are_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], named: str
) -> None:
    monkeypatch.setattr(extension, "missing", lambda: None)
    monkeypatch.setattr(extension, "isas", lambda: ["avx2", "portable"])
    result = run(app, ["generate", "Once", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"tokenloom: {named}")
    assert result.stderr.count("\n") == 1


def test_a_closed_stream_cancels_the_request(built: list[EngineParts]) -> None:
    model = LocalModel(Config())
    pieces = model.complete("Once", PARAMS)
    next(pieces)
    assert built[0].engine.has_work
    pieces.close()  # type: ignore[attr-defined]
    assert not built[0].engine.has_work
    built[0].engine.check()


def test_chat_remembers_until_reset(built: list[EngineParts]) -> None:
    arguments = ["chat", "--max-tokens", "5", "--sampling-seed", "3", "--temperature", "1"]
    result = run(app, arguments, input="a\na\n/reset\na\n")
    assert result.exit_code == 0, result.output
    model = LocalModel(Config())
    params = SamplingParams(max_tokens=5, temperature=1.0, seed=3)
    messages: list[dict[str, str]] = [{"role": "user", "content": "a"}]
    first = "".join(model.answer(messages, params))
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "a"}]
    second = "".join(model.answer(messages, params))
    assert result.stdout.startswith(f"{first}\n{second}\n{first}\n")


def test_ctrl_c_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted:
        closed = False

        def answer(self, messages: list[dict[str, str]], params: SamplingParams) -> Iterator[str]:
            try:
                yield "Once"
                raise KeyboardInterrupt
            finally:
                self.closed = True

    talker = Interrupted()
    messages = [{"role": "user", "content": "Tell"}]
    take_turn(talker, messages, PARAMS)
    assert talker.closed
    assert messages[-1] == {"role": "assistant", "content": "Once"}
    assert capsys.readouterr().out == "Once ...\n"


def test_throughput_of_random_prompts(built: list[EngineParts]) -> None:
    arguments = ["bench", "throughput", "--num-prompts", "6", "--input-tokens", "20", "--output-tokens", "7"]
    result = run(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["num_requests"], report["prompt_tokens"], report["output_tokens"]) == (6, 120, 42)
    assert report["model"] == "simulated"
    assert "requests per second" in result.stdout
    assert built[0].engine.executor.closed  # type: ignore[attr-defined]


def test_throughput_of_given_prompts(built: list[EngineParts], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("abc\n\ndefgh\n")
    arguments = ["bench", "throughput", "--prompts", str(file), "--output-tokens", "4", "--json"]
    report = json.loads(run(app, arguments).stdout.splitlines()[-1])
    assert (report["num_requests"], report["prompt_tokens"], report["output_tokens"]) == (2, 8, 8)


def test_prompts_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary", tmp_path, tmp_path / "none"):
        with pytest.raises(InvalidParameter, match="a readable text file"):
            throughput.read_prompts(path)
