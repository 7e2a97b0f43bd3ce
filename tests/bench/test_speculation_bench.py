"""bench/speculation.py runs anywhere in its quick mode, and says what it must."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenloom.kernels.native import extension


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(repository / "bench" / "speculation.py"), *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.skipif(bool(extension.missing()), reason="the numpy reference would take minutes")
def test_the_quick_mode_measures_every_part_that_runs_a_model(repository: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.jsonl"
    parts = "equal,replay,batch16,pace,ragged,story,copy"
    shown = run(repository, "--quick", "--json", "--parts", parts, "--tokens", str(tokens))
    assert shown.returncode == 0, shown.stderr
    found: dict[str, Any] = json.loads(shown.stdout.splitlines()[-1])
    assert found["outputs_equal"] is True
    assert all(case["equal"] and case["drafted"] > 0 for case in found["parts"]["equal"]["cases"].values())
    assert sum(case["accepted"] for case in found["parts"]["equal"]["cases"].values()) > 100
    for key in (
        "speedup_replay07_batch1",
        "adaptive_over_best_fixed_low",
        "speedup_story_batch1",
        "speedup_copy_batch1",
    ):
        assert found[key] > 0, key
    # What is counted and not timed is the same on every machine.
    assert found["tree_over_chain"] >= 1.15
    assert found["parts"]["replay"]["curve"]["chain7_0.7"]["tokens_per_step"] > 2
    batch16 = found["parts"]["batch16"]
    assert batch16["ratio_batch16"] > 0 and batch16["ratio_batch16_switched_off"] > 0
    assert found["ratio_batch16_low"] < batch16["ratio_batch16"]
    # Asking for what is dropped took four milliseconds here.
    assert batch16["switched_off_us"] < 1500
    (pace,) = found["parts"]["pace"]["cases"].values()
    assert pace["best_fixed"] in (0, 2) and pace["ratios"] == [pace["ratio"]]
    ragged = found["parts"]["ragged"]["models"]["embedded"]["cases"]
    for name, case in ragged.items():
        assert (case["realign_ms"] > 0) == name.endswith("tree")
        assert (case["padded_ms"] > 0) == (case["grouped"] < 1) == name.startswith("batch4")
    lines = [json.loads(line) for line in tokens.read_text().splitlines()]
    assert len(lines) == 20 and all(line["tokens"] and line["logprobs"] for line in lines)


def test_every_figure_has_its_part_and_the_simulation_gives_those_of_slo(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("bench", "bench/peers"):
        monkeypatch.syspath_prepend(str(repository / folder))
    bench = importlib.import_module("speculation")
    assert set(bench.KEYS.values()) == {*bench.PARTS, "peers"}
    monkeypatch.setattr(bench.slo_simulation, "QUICK_COUNT", 20)
    monkeypatch.setattr(bench.slo_simulation, "QUICK_SEEDS", (1,))
    monkeypatch.setattr(bench.slo_simulation.Study, "find_load", lambda study: 8.0)
    found = bench.PARTS["slo"]({"quick": True})
    for key, part in bench.KEYS.items():
        if part == "slo":
            assert isinstance(found[key], float), key
    assert len(found["systems"]) == 5


def test_unknown_parts_are_refused_by_name(repository: Path) -> None:
    shown = run(repository, "--parts", "replay,nothing")
    assert shown.returncode == 2
    assert "nothing" in shown.stderr


@pytest.mark.slow
@pytest.mark.skipif(bool(extension.missing()), reason="the numpy reference would take minutes")
def test_stories_of_another_pair(repository: Path, shared_data: Path) -> None:
    """A model without a chat template, with itself as its draft: every guess is right."""
    model = str(shared_data / "models" / "hf" / "stories3M")
    shown = run(
        repository, "--quick", "--json", "--parts", "story", "--target", model, "--draft", f"{model},{model}"
    )
    assert shown.returncode == 0, shown.stderr
    found: dict[str, Any] = json.loads(shown.stdout.splitlines()[-1])
    assert found["setting"]["target"] == model
    figures = found["parts"]["story"]["medians"]["turns"]
    assert figures["plain_tokens_per_step"] == 1
    assert figures["chain_tokens_per_step"] > 4
    assert figures["tree_tokens_per_step"] > 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--target", "some"), "one was given without the other"),
        (("--draft", "some"), "one was given without the other"),
        (("--target", "some", "--draft", "other", "--parts", "copy"), "only the part story"),
    ],
)
def test_half_a_pair_is_refused_by_name(repository: Path, arguments: tuple[str, ...], named: str) -> None:
    shown = run(repository, *arguments)
    assert shown.returncode == 2
    assert "--target" in shown.stderr and named in shown.stderr


def test_a_bound_of_no_rounds_is_refused(repository: Path) -> None:
    shown = run(repository, "--parts", "pace", "--pairs", "0")
    assert shown.returncode == 2
    assert "--pairs must be above 0" in shown.stderr
