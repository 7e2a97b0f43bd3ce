"""The table of families in docs/models.md says what the tests of this run found.

    TOKENLOOM_WRITE_DOCS=1 python -m pytest tests/models

writes it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.models import test_families as families
from tests.models.conftest import CELLS
from tokenloom.models import registry

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: made by tests/models/test_table.py -->\n", "<!-- end of families -->\n"
COLUMNS = {
    "fp32": "= transformers in fp32",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int4",
    "int8 KV": "int8 KV",
    "cache": "prefix cache",
    "outputs": "scores, embeddings",
    "adapters": "adapters",
    "speculation": "speculation",
}


def table() -> str:
    """One row a family; a mark where all its lines passed, and there are any."""
    lines = [
        "| family | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for family in registry.FAMILIES.values():
        names = [
            name
            for name, (kind, _) in families.FAMILIES.items()
            if families.architecture(kind) == family.architecture
        ]
        marks = ["yes" if names and all(CELLS.get((name, c)) for name in names) else "no" for c in COLUMNS]
        lines.append(f"| `{family.architecture}` | " + " | ".join(marks) + " |")
    return "\n".join(lines) + "\n"


def test_the_docs_have_the_table_of_this_run() -> None:
    missing = [
        (name, column) for name in families.FAMILIES for column in COLUMNS if (name, column) not in CELLS
    ]
    if missing:
        pytest.skip(f"not all tests of families ran: {missing[0]} and {len(missing) - 1} more are missing")
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    if os.environ.get("TOKENLOOM_WRITE_DOCS"):
        PAGE.write_text(before + BEGIN + table() + END + after)
        return
    assert old == table(), "TOKENLOOM_WRITE_DOCS=1 python -m pytest tests/models"
