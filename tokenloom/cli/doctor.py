"""`tokenloom doctor`: what this machine offers and what the engine uses of it under the options in force."""

from __future__ import annotations

import json
import shutil
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenloom import __version__
from tokenloom.cli import machine
from tokenloom.config import Config, make_config
from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.native.extension import isas, missing
from tokenloom.serving.assembly import choose_ops


def ops(config: Config) -> dict[str, Any]:
    """What would compute under `config`, and why.

    `kernels` is None where a model would not even be loaded with these options; `isas` are all that the
    native kernels have here, the best first.
    """
    usable = isas() if missing() is None else []
    try:
        chosen = choose_ops(config)
    except UnsupportedFeature as error:
        return {"kernels": None, "isa": None, "isas": usable, "reason": str(error)}
    return {
        "kernels": chosen.kernels,
        "isa": chosen.isa or None,
        "isas": usable,
        "reason": chosen.reason,
    }


def examine(config: Config | None = None) -> dict[str, Any]:
    """Every fact as plain data; `config` None is that of the environment. Takes about a second, most of it
    for the memory bandwidth."""
    return {
        "tokenloom": __version__,
        "processor": machine.processor(),
        "memory": machine.memory(),
        "bandwidth": machine.bandwidth(),
        "compiler": machine.compiler(),
        "gpu": shutil.which("nvidia-smi") is not None,
        "blas": machine.blas(),
        "ops": ops(make_config() if config is None else config),
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
    if facts["kernels"] is None:
        return f"none: {facts['reason']}"
    if facts["kernels"] == "reference":
        return f"reference (numpy): {facts['reason']}"
    others = ", ".join(isa for isa in facts["isas"] if isa != facts["isa"])
    return f"native, {facts['isa']}: {facts['reason']}" + (f" (it can run {others} too)" if others else "")


def doctor(config: Config, as_json: bool) -> None:
    """Print the facts as a table, or as one JSON object."""
    facts = examine(config)
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, value)
    Console().print(table, soft_wrap=False)
