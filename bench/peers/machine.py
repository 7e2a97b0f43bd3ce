"""What the machine did meanwhile: processor time inside and outside a process tree, memory, its description.

Everything is read from /proc, so this works on Linux only.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

TICKS: Final = os.sysconf("SC_CLK_TCK")
GRANULARITY_S: Final = 0.03
"""Processor seconds below which the counters of the kernel tell nothing: three ticks."""


def process_tree(pid: int) -> list[int]:
    """The process and all its living descendants."""
    pids = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                pids += process_tree(int(child))
    except OSError:  # it ended while we looked
        pass
    return list(dict.fromkeys(pids))


def busy_seconds() -> float:
    """Processor seconds that the whole machine has been busy since it started, stolen time included."""
    with open("/proc/stat", encoding="ascii") as lines:
        fields = [int(value) for value in lines.readline().split()[1:9]]
    idle, iowait = fields[3], fields[4]
    return (sum(fields) - idle - iowait) / TICKS


def tree_seconds(pid: int) -> float:
    """Processor seconds of a process tree, those of its ended and awaited children included."""
    ticks = 0
    for member in process_tree(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += sum(int(value) for value in fields[11:15])
    return ticks / TICKS


class OtherLoad:
    """Cores used by everything outside this process's tree since the object was made."""

    def __init__(self) -> None:
        self._busy = busy_seconds()
        self._own = tree_seconds(os.getpid())
        self._started = time.perf_counter()

    def cores(self) -> float:
        """Other processor seconds per second of wall time; what lies below the granularity counts as none."""
        elapsed = time.perf_counter() - self._started
        return cores_of(
            busy_seconds() - self._busy - (tree_seconds(os.getpid()) - self._own), max(elapsed, 1e-9)
        )


def cores_of(other_seconds: float, elapsed: float) -> float:
    """Cores that `other_seconds` of processor time in `elapsed` seconds amount to."""
    return max(0.0, other_seconds - GRANULARITY_S) / elapsed


def wait_until_quiet(limit: float, patience_s: float, window_s: float = 0.5) -> bool:
    """Wait until nothing outside this tree uses more than `limit` cores, `patience_s` at most."""
    deadline = time.monotonic() + patience_s
    while True:
        load = OtherLoad()
        time.sleep(window_s)
        if load.cores() <= limit:
            return True
        if time.monotonic() > deadline:
            return False


def seconds_since_process_start() -> float:
    """How long ago this process was started, interpreter start included."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    return float(Path("/proc/uptime").read_text().split()[0]) - int(fields[19]) / TICKS


class Memory(NamedTuple):
    """Memory of a process tree in MiB. Pages that two processes share count twice."""

    peak_mb: float
    anonymous_mb: float


def tree_memory(pid: int) -> Memory:
    """Sum of the peaks (VmHWM, mapped weights included) and of the anonymous part as it is now."""
    peak = anonymous = 0
    for member in process_tree(pid):
        try:
            lines = Path(f"/proc/{member}/status").read_text().splitlines()
        except OSError:
            continue
        values = {key: value for key, _, value in (line.partition(":") for line in lines)}
        peak += int(values.get("VmHWM", "0").split()[0])
        anonymous += int(values.get("RssAnon", "0").split()[0])
    return Memory(peak / 1024, anonymous / 1024)


def reset_peaks(pid: int) -> None:
    """Start VmHWM of a process tree again from what is resident now, so that each workload has its own."""
    for member in process_tree(pid):
        try:
            Path(f"/proc/{member}/clear_refs").write_text("5")
        except OSError:  # not allowed here: the peak is then that of the process so far
            continue


def describe() -> dict[str, Any]:
    """The machine in a few words, for the results."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if "model name" in line), "")
    flags = next((line.split(":", 1)[1].split() for line in cpuinfo.splitlines() if line[:5] == "flags"), [])
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "instruction_sets": [flag for flag in wanted if flag in flags],
        "memory_gb": round(memory_kb / 2**20, 1),
        "kernel": platform.release(),
    }
