"""bench/adapters.py runs anywhere in its quick mode, and its bookkeeping keeps what counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KEYS = {
    "outputs_equal",
    "zipf1000_over_base",
    "distinct_over_identical",
    "all7_over_bound",
    "load_step_p99_ratio",
    "prefill_adapter_over_base",
}
SLOW_PARTS = {"mixes", "all7", "prefill", "loading", "register", "zipf", "many"}


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(repository / "bench" / "adapters.py"), *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_the_quick_mode_measures_every_part(repository: Path, embedded_model: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.jsonl"
    shown = run(
        repository, "--quick", "--json", "--results", str(tmp_path / "results"), "--tokens", str(tokens)
    )
    assert shown.returncode == 0, shown.stderr
    found: dict[str, Any] = json.loads(shown.stdout.splitlines()[-1])
    assert found["errors"] == {}
    assert set(found["parts"]) == SLOW_PARTS | {"equal"}
    assert found["outputs_equal"] is True
    for key in KEYS - {"outputs_equal", "all7_over_bound"}:
        assert found[key] > 0, key
    bound = found["all7_over_bound"]
    assert bound is None or bound > 0
    many = found["parts"]["many"]
    assert many["answered"] == many["adapters"] == 48
    assert many["distinct_outputs"] > 1
    lines = [json.loads(line) for line in tokens.read_text().splitlines()]
    assert len(lines) == found["parts"]["equal"]["requests"] == 40
    assert all(line["batch"] == line["alone"] and line["batch"]["logprobs"] for line in lines)
    # Adapters are compared with what they do, not with nothing.
    prompts: dict[str, set[str]] = {}
    for line in lines:
        prompts.setdefault(str(line["adapter"]), set()).add(str(line["batch"]["tokens"]))
    assert len(prompts) == 17


def test_what_cannot_be_measured_is_refused_by_name(repository: Path, tmp_path: Path) -> None:
    for arguments, wanted in {
        ("--model", str(tmp_path)): "there is no checkpoint",
        (): "--model is needed",
        ("--quick", "--parts", "speed"): "'speed' is not one of",
        ("--quick", "--peers", "tgi"): "'tgi' is not one of",
        ("--quick", "--rounds", "0"): "--rounds must be above 0",
        ("--quick", "--threads", "0"): "--threads must be above 0",
    }.items():
        shown = run(repository, *arguments)
        assert shown.returncode == 2
        assert wanted in shown.stderr


def test_finished_parts_are_kept_and_disturbed_ones_measured_again(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository / "bench"))
    import adapters

    setting = {"model": "M", "rounds": 3}
    path = tmp_path / "results" / "parts.jsonl"
    results = adapters.Results(path, setting)
    results.add("equal", {"outputs_equal": True})
    results.add("mixes", {"distinct_over_identical": 0.9, "disturbed": ["base in round 2"]})
    results.add("zipf", {"error": "the process of zipf ended with 1"})
    with path.open("a") as lines:
        lines.write('{"part": "all7", "set')
    again = adapters.Results(path, setting)
    assert [part for part in ("equal", "mixes", "zipf", "all7") if again.is_done(part)] == ["equal"]
    assert not adapters.Results(path, setting | {"rounds": 4}).parts
    monkeypatch.setattr(adapters, "source_hash", lambda: "another state")
    assert not adapters.Results(path, setting).parts
    summary = adapters.summarise(again.parts, setting)
    assert summary["outputs_equal"] is True
    assert summary["zipf1000_over_base"] is None
    assert summary["disturbed"] == {"mixes": ["base in round 2"]}
    assert summary["errors"] == {"zipf": "the process of zipf ended with 1"}


def test_ratios_are_of_the_same_round_and_of_undisturbed_ones(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository / "bench" / "peers"))
    monkeypatch.syspath_prepend(str(repository / "bench" / "lora"))
    import rounds

    rates = {"a": (10.0, 40.0, 999.0), "b": (20.0, 50.0, 1.0)}
    entries = [
        {
            "case": case,
            "round": number + 1,
            "figures": {"rate": rate},
            "quiet": number < 2 or case == "a",
            "rejected": 0,
        }
        for number in range(3)
        for case, rate in ((case, rates[case][number]) for case in rates)
    ]
    found = rounds.Rounds(entries)
    assert found.ratio("a", "b", "rate") == (0.5 + 0.8) / 2
    assert found.median("b", "rate") == 35.0
    assert found.median("a", "rate") == 40.0
    assert found.disturbed() == ["b in round 3"]
    only = rounds.Rounds([entry | {"quiet": False} for entry in entries])
    assert only.median("b", "rate") == 20.0


def test_a_disturbed_measurement_is_repeated(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "bench" / "peers"))
    monkeypatch.syspath_prepend(str(repository / "bench" / "lora"))
    import rounds

    others = iter([1.0, 0.0, 0.5, 0.5, 0.5])
    seeds: list[str] = []

    class Load:
        def cores(self) -> float:
            return next(others)

    monkeypatch.setattr(rounds.machine, "OtherLoad", Load)
    monkeypatch.setattr(rounds.machine, "wait_until_quiet", lambda *_: True)
    referee = rounds.Referee(rounds=2, max_other=0.1, attempts=3, patience_s=0.0)

    def case(seed: str) -> dict[str, float]:
        seeds.append(seed)
        return {"rate": float(len(seeds))}

    found = referee.measure({"a": case})
    assert seeds == ["a/1/0", "a/1/1", "a/2/0", "a/2/1", "a/2/2"]
    assert [(entry["quiet"], entry["rejected"]) for entry in found.entries] == [(True, 1), (False, 3)]
    assert found.median("a", "rate") == 2.0
    assert found.summary()["rejected"] == 4
