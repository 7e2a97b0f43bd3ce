"""What the tests of families found, for the table in docs/models.md."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

CELLS: dict[tuple[str, str], bool] = {}
"""(a line of `test_families.FAMILIES`, column) → whether every test of it passed in this run."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report: pytest.TestReport = yield
    marker = item.get_closest_marker("column")
    if marker is not None and report.when == "call":
        params: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
        column = marker.args[0]
        cell = params["name"], column if isinstance(column, str) else column(params["numerics"])
        CELLS[cell] = CELLS.get(cell, True) and report.passed
    return report
