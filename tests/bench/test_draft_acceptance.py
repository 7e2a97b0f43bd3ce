"""bench/draft_acceptance.py: it runs, and its figures agree with each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_embedded_pair(repository: Path) -> None:
    command = [sys.executable, "bench/draft_acceptance.py", "--count", "2", "--tokens", "20", "--json"]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found.keys() == {"greedy", "temperature 0.8"}
    for sets in found.values():
        assert sets["all"] == sets["stories"]
        figures = sets["all"]
        assert figures["tokens"] == 40
        assert figures["coverage_1"] == figures["ranks"][0]
        assert figures["coverage_5"] == pytest.approx(sum(figures["ranks"][:5]))
        steps = list(figures["tokens_per_step"].values())
        assert all(1 <= step <= 9 for step in steps)
        # A tree has its chain in it, as long as that is the most probable path; and twelve of its nodes do more.
        assert steps[1] >= steps[0]
    assert found["greedy"]["all"]["coverage_1"] > 0.4
