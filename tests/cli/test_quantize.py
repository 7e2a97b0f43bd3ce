"""`tokenloom quantize` on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.models.hf_fixtures import TINY, llama_tensors, write_model
from tests.serving.helpers import write_tiny_model
from tokenloom.cli import quantize
from tokenloom.cli.local import load
from tokenloom.cli.main import app
from tokenloom.config import Config
from tokenloom.kernels.native import extension
from tokenloom.runtime.local import LocalExecutor
from tokenloom.serving.assembly import EngineParts

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


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[LocalExecutor]:
    """The executors that the command builds: the model as it is, then with rounded weights."""
    executors: list[LocalExecutor] = []

    def record(config: Config) -> EngineParts:
        parts = load(config)
        assert isinstance(parts.engine.executor, LocalExecutor)
        executors.append(parts.engine.executor)
        return parts

    monkeypatch.setattr(quantize, "load", record)
    return executors


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
@pytest.mark.parametrize(
    ("arguments", "env", "dtype", "kv_dtype"),
    [
        ([], {}, "bfloat16", "bfloat16"),
        (["--dtype", "float32"], {}, "float32", "float32"),
        ([], {"TOKENLOOM_KV_DTYPE": "int8", "TOKENLOOM_KV_MEMORY_MB": "64"}, "bfloat16", "int8"),
    ],
)
def test_both_models_compute_in_the_same_formats(
    model: str,
    loaded: list[LocalExecutor],
    arguments: list[str],
    env: dict[str, str],
    dtype: str,
    kv_dtype: str,
) -> None:
    # The model is in float32: alone it would compute in float32, with rounded weights in bfloat16.
    command = ["quantize", model, "--weights", "int8", "--report", "--tokens", "20", "--json", *arguments]
    result = run(app, [*command, "--kernels", "native"], env=env)
    assert result.exit_code == 0, result.output
    original, rounded = (executor.numerics_id for executor in loaded)
    assert original == f"native-1-{dtype}-{dtype}-{kv_dtype}"
    assert rounded == f"native-1-{dtype}-int8-{kv_dtype}"
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["kernels"], report["dtype"], report["kv_dtype"]) == ("native", dtype, kv_dtype)
    assert f"both with dtype {dtype} and kv_dtype {kv_dtype}, native kernels" in result.stdout


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
        (["--weights", "int8", "--report", "--isa", "avx2"], "isa avx2 is not supported"),
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
