"""`tokenloom quantize` on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.models.hf_fixtures import TINY, llama_tensors, write_model
from tests.serving.helpers import write_tiny_model
from tokenloom.cli.main import app

run = CliRunner().invoke
REFERENCE = ["--kernels", "reference"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_report(model: str, weights: str) -> None:
    result = run(
        app, ["quantize", model, "--weights", weights, "--report", "--tokens", "300", "--json", *REFERENCE]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["weights"] == weights
    assert report["num_tokens"] == 300
    assert report["weight_bytes_quantized"] < report["weight_bytes"] / 2
    assert 0 < report["mean_kl"] <= report["max_kl"] < 1
    assert 0.5 < report["same_argmax"] <= 1
    assert report["perplexity"] == pytest.approx(report["perplexity_quantized"], rel=0.05)
    for text in ("perplexity", "KL divergence", "same likeliest token", "over 300 predicted tokens"):
        assert text in result.stdout


def test_a_text_of_ones_own(model: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One day a dog met a cat.")
    arguments = [
        "quantize",
        model,
        "--weights",
        "int8",
        "--report",
        "--text",
        str(file),
        "--json",
        *REFERENCE,
    ]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    assert 0 < json.loads(result.stdout.splitlines()[-1])["num_tokens"] <= 25


def test_what_is_refused(model: str, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, named in (
        (["--report"], "weights: got 'auto', but it must be int8 or int4"),
        (["--weights", "int8"], "report: got False"),
        (["--weights", "int8", "--report", "--tokens", "0"], "tokens: got 0, but it must be at least 1"),
        (["--weights", "int8", "--report", "--text", str(binary)], "a readable text file"),
        (["--weights", "int8", "--report", "--text", str(tmp_path / "none")], "a readable text file"),
        (["--weights", "int8", "--report", "--text", str(empty)], "a text of at least two tokens"),
    ):
        result = run(app, ["quantize", model, *arguments, *REFERENCE])
        assert result.exit_code == 1, result.output
        assert named in result.stderr


def test_a_checkpoint_that_is_quantised_already(tmp_path: Path) -> None:
    written = {"quant_method": "awq", "bits": 4, "group_size": 32}
    write_model(tmp_path, TINY | {"quantization_config": written}, llama_tensors(TINY))
    result = run(app, ["quantize", str(tmp_path), "--weights", "int4", "--report"])
    assert result.exit_code == 1
    assert "quantised already (awq)" in result.stderr
