"""A small part of the fuzzing of files, and that it notices what it is there for."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the gguf package knows the values of blocks")

from tokenloom.errors import ModelError
from tools import fuzz_files


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The limits of time as in a batch; the end of the process is left out."""
    before = signal.signal(signal.SIGPROF, fuzz_files._too_slow)
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("target", fuzz_files.TARGETS)
def test_sound_files_are_read(target: str, tmp_path: Path) -> None:
    for number, _ in enumerate(fuzz_files.originals(target)):
        for case in (0, 1, 4):  # tokenizers of GGUF; the native kernels; what is quantised widened
            fuzz_files.write_files(fuzz_files.sound_files(target, number), tmp_path / "case")
            fuzz_files.TARGETS[target][1](tmp_path / "case", case)


@pytest.mark.parametrize("target", fuzz_files.TARGETS)
def test_a_case_follows_from_its_number(target: str) -> None:
    made = [fuzz_files.make_files(target, 3, case) for case in range(20)]
    assert made == [fuzz_files.make_files(target, 3, case) for case in range(20)]
    assert made != [fuzz_files.make_files(target, 4, case) for case in range(20)]


@pytest.mark.slow
def test_bent_files_give_a_clear_error_or_a_model(capfd: pytest.CaptureFixture[str]) -> None:
    failed = fuzz_files.run_all(list(fuzz_files.TARGETS), 2000, seed=0, jobs=2)
    shown = capfd.readouterr().out
    assert failed == 0, shown
    for line in shown.splitlines()[:4]:
        _, refused, _, _, loaded, _, _, _ = line.split()
        assert int(refused) > 100
        assert int(loaded) > 25


def outcome_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read: Any) -> str:
    monkeypatch.setitem(fuzz_files.TARGETS, "config", (fuzz_files.TARGETS["config"][0], read))
    return fuzz_files.run_case("config", 0, 0, tmp_path / "case")


def test_what_is_no_error_for_users_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timer: None
) -> None:
    def refuse(folder: Path, case: int) -> None:
        raise ModelError("this", "that")

    def lengthy(folder: Path, case: int) -> None:
        raise ModelError("this", "that" * 5000)

    def stumble(folder: Path, case: int) -> None:
        raise KeyError("layer")

    def loop(folder: Path, case: int) -> None:
        while True:
            pass

    assert outcome_of(monkeypatch, tmp_path, refuse) == "refused"
    assert outcome_of(monkeypatch, tmp_path, lambda folder, case: None) == "loaded"
    assert "an error of 20" in outcome_of(monkeypatch, tmp_path, lengthy)
    assert outcome_of(monkeypatch, tmp_path, stumble).startswith("KeyError: 'layer' (test_fuzz_files.py:")
    monkeypatch.setattr(fuzz_files, "CASE_SECONDS", 0.05)
    assert outcome_of(monkeypatch, tmp_path, loop).startswith("TooSlow: more than 0.05 s")


def test_a_process_that_dies_is_a_failure_and_the_next_case_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        start, stop = map(int, command[-2:])
        ran.append((start, stop))
        if start == 0:
            return subprocess.CompletedProcess(command, -11, b"0 refused\n1 loaded\n", b"at case 2")
        lines = [f"{case} {'KeyError: x' if case == 4 else 'loaded'}" for case in range(start, stop)]
        return subprocess.CompletedProcess(command, 0, "\n".join(lines).encode(), b"")

    monkeypatch.setattr(subprocess, "run", run)
    counts, failures = fuzz_files.run_isolated("gguf", 0, 0, 6)
    assert ran == [(0, 6), (3, 6)]
    assert counts == {"refused": 1, "loaded": 3, "failed": 2}
    assert [(failure.case, failure.what) for failure in failures] == [
        (2, "died with status -11: at case 2"),
        (4, "KeyError: x"),
    ]
