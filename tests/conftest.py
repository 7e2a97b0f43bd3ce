"""Fixtures and profiles that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public test data: checkpoints, tokenizers, texts, traces."""
    folder = Path(os.environ.get("TOKENLOOM_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no test data: set TOKENLOOM_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """Directory of the embedded target model."""
    folder = ROOT / "tokenloom" / "embedded" / "target"
    if not (folder / "config.json").is_file():
        pytest.skip("no embedded model: tokenloom/embedded/target is not there")
    return folder
