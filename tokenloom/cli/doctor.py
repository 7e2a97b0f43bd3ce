"""`tokenloom doctor`: what this machine offers and what the engine uses of it."""

from __future__ import annotations

import json
import shutil
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenloom import __version__
from tokenloom.cli import machine
from tokenloom.kernels.native.extension import isas, missing


def ops() -> dict[str, Any]:
    """Which kernels are in use, their instruction sets (the best first), and why there are no native ones."""
    reason = missing()
    if reason is not None:
        return {"kernels": "reference", "isa": None, "isas": [], "reason": reason}
    usable = isas()
    return {"kernels": "native", "isa": usable[0], "isas": usable, "reason": None}


def examine() -> dict[str, Any]:
    """Every fact as plain data. Takes about a second, most of it for the memory bandwidth."""
    return {
        "tokenloom": __version__,
        "processor": machine.processor(),
        "memory": machine.memory(),
        "bandwidth": machine.bandwidth(),
        "compiler": machine.compiler(),
        "gpu": shutil.which("nvidia-smi") is not None,
        "blas": machine.blas(),
        "ops": ops(),
        "versions": machine.versions(),
    }


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory, bandwidth, blas = (facts[name] for name in ("processor", "memory", "bandwidth", "blas"))
    features = "  ".join(f"{name} {'yes' if there else 'no'}" for name, there in cpu["features"].items())
    versions = "  ".join(f"{name} {version}" for name, version in facts["versions"].items())
    threads = f", {blas['threads']} threads" if blas["threads"] else ""
    return [
        ("tokenloom", facts["tokenloom"]),
        ("processor", f"{cpu['model']}, {cpu['cores']} cores"),
        ("features", features),
        ("memory", f"{memory['total_gib']} GiB, {memory['available_gib']} GiB available"),
        ("bandwidth", f"copy {bandwidth['copy_gb_s']} GB/s, read {bandwidth['read_gb_s']} GB/s (measured)"),
        ("compiler", facts["compiler"] or "none found (it is needed to build the native ops)"),
        ("gpu", "nvidia-smi found; the engine does not use it" if facts["gpu"] else "none found"),
        ("blas", f"{blas['name']} {blas['version']}{threads}"),
        ("ops in use", _ops_text(facts["ops"])),
        ("versions", versions),
    ]


def _ops_text(facts: dict[str, Any]) -> str:
    if facts["kernels"] == "reference":
        return f"reference (numpy): {facts['reason']}"
    others = ", ".join(facts["isas"][1:])
    return f"native, {facts['isa']}, the best that this processor has (it can run {others} too)"


def doctor(as_json: bool) -> None:
    """Print the facts as a table, or as one JSON object."""
    facts = examine()
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, value)
    Console().print(table, soft_wrap=False)
