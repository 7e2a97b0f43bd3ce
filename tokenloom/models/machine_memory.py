"""How much memory this process may still take: the machine's, or that of the container around it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNKNOWN_AVAILABLE = 2 << 30
"""Assumed where nothing can be read; small enough for any machine that serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineMemory:
    """Bytes of memory: `total`, and `available` without swapping. `source` says whose limit counted."""

    total: int
    available: int
    source: str


def read_machine_memory(root: Path = Path("/")) -> MachineMemory:
    """The smallest of /proc/meminfo and the limits of all control groups (v2 or v1) around this process.

    `root` is where /proc and /sys are found. Never raises: without any of them the system's page counts are
    taken, and without those `UNKNOWN_AVAILABLE`, said in `source`.
    """
    found = list(_group_limits(root))
    meminfo = _read_table(root / "proc/meminfo")
    if "MemAvailable" in meminfo and "MemTotal" in meminfo:
        total, available = meminfo["MemTotal"] << 10, meminfo["MemAvailable"] << 10
        found.insert(0, MachineMemory(total=total, available=available, source="machine"))
    if found:
        smallest = min(found, key=lambda memory: memory.available)
        total = min(memory.total for memory in found)
        return MachineMemory(total=total, available=smallest.available, source=smallest.source)
    try:
        page, pages, free = (os.sysconf(f"SC_{name}") for name in ("PAGE_SIZE", "PHYS_PAGES", "AVPHYS_PAGES"))
    except (ValueError, OSError):
        page = pages = free = -1
    if min(page, pages, free) <= 0:
        source = "assumed: this system does not say"
        return MachineMemory(total=UNKNOWN_AVAILABLE, available=UNKNOWN_AVAILABLE, source=source)
    return MachineMemory(total=pages * page, available=free * page, source="machine, free pages only")


def _group_limits(root: Path) -> Iterator[MachineMemory]:
    """One entry for each control group with a memory limit, from the process's own up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # Inside a container the path is often the host's, which is not mounted here; the mount's root then is
        # the container's own group. Groups that do not exist are passed over.
        for depth in range(len(parts), -1, -1):
            group = mount.joinpath(*parts[:depth])
            limit, used = _read_number(group / names[0]), _read_number(group / names[1])
            if limit is None or used is None or limit >= 1 << 60:  # v1 writes "no limit" as a huge number
                continue
            # Cached file pages count as used, yet are dropped when memory is asked for.
            cached = _read_table(group / "memory.stat").get(names[2], 0)
            available = max(limit - max(used - cached, 0), 0)
            yield MachineMemory(total=limit, available=available, source="container")


def _read_number(path: Path) -> int | None:
    """The number in `path`, or None where the file is absent or holds a word ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_table(path: Path) -> dict[str, int]:
    """Lines of "name: number unit" or "name number" as a dict; empty where the file is absent."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    words = (line.replace(":", " ").split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in words if len(pair) >= 2 and pair[1].isdigit()}
