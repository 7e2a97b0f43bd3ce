"""`tokenloom bench roofline` on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.serving.helpers import write_tiny_model
from tokenloom.bench import roofline
from tokenloom.cli import roofline as command
from tokenloom.cli.main import app
from tokenloom.kernels.native import extension

run = CliRunner().invoke


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SWEEP_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "_PEAK_ITERATIONS", 1000)
    model = write_tiny_model(tmp_path / "tiny")
    result = run(app, ["bench", "roofline", str(model), "--threads", "2", "--isa", "portable", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["threads"] == 2
    assert report["bandwidth"] > 0
    assert report["peaks"].keys() == {"float32", "bfloat16", "int8"}
    # The model has 256 tokens of context, too few for the prompt.
    assert [step["case"] for step in report["steps"]] == ["decode 1", "decode 8", "decode 32"]
    for step in report["steps"]:
        assert f"{step['case']}: {step['seconds'] * 1e3:.3f} ms" in result.stdout
        assert step["seconds"] == pytest.approx(sum(op["seconds"] for op in step["ops"]))
        for op in step["ops"]:
            assert op["op"] in result.stdout


def test_what_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(command, "measure_limits", never)
    monkeypatch.setattr(extension, "missing", lambda: None)
    monkeypatch.setattr(extension, "isas", lambda: ["avx2", "portable"])
    for arguments, named in (
        (["--isa", "neon"], "isa neon is not supported: this build on this processor has avx2, portable"),
        (["--threads", "5000"], "threads: got 5000, but it must be 0 to 256"),
        (["--kernels", "reference"], "a roofline is not supported: it measures the native kernels"),
    ):
        result = run(app, ["bench", "roofline", *arguments])
        assert result.exit_code == 1
        assert result.stderr.startswith(f"tokenloom: {named}")
        assert result.stderr.count("\n") == 1
