"""Memory limits of the machine and of the container around the process, from made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenloom.models.machine_memory import UNKNOWN_AVAILABLE, read_machine_memory

GIB = 1 << 30
MEMINFO = f"MemTotal:  {16 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {8 << 20} kB\nHugePages_Total: 0\n"


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def test_this_machine():
    memory = read_machine_memory()
    assert 0 < memory.available <= memory.total


def test_machine(tmp_path: Path):
    memory = read_machine_memory(write(tmp_path, {"proc/meminfo": MEMINFO}))
    assert (memory.total, memory.available, memory.source) == (16 * GIB, 8 * GIB, "machine")


def test_unified_groups_count_up_to_the_root(tmp_path: Path):
    group = "sys/fs/cgroup/a/"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/a/b\n",
        group + "b/memory.max": "max\n",
        group + "b/memory.current": GIB,
        group + "memory.max": 4 * GIB,
        group + "memory.current": 3 * GIB,
        group + "memory.stat": f"anon {GIB}\ninactive_file {GIB}\n",
    }
    memory = read_machine_memory(write(tmp_path, files))
    assert (memory.total, memory.available, memory.source) == (4 * GIB, 2 * GIB, "container")


def test_groups_of_version_1(tmp_path: Path):
    group = "sys/fs/cgroup/memory/"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu:/\n4:memory:/host/path/not/mounted\n0::/\n",
        group + "memory.limit_in_bytes": 2 * GIB,
        group + "memory.usage_in_bytes": GIB,
        group + "memory.stat": "total_inactive_file 1024\n",
    }
    assert read_machine_memory(write(tmp_path, files)).available == GIB + 1024


def test_no_limit_in_version_1(tmp_path: Path):
    group = "sys/fs/cgroup/memory/"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/\n",
        group + "memory.limit_in_bytes": 9223372036854771712,
        group + "memory.usage_in_bytes": GIB,
    }
    assert read_machine_memory(write(tmp_path, files)).source == "machine"


def test_used_beyond_the_limit(tmp_path: Path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": GIB,
        "sys/fs/cgroup/memory.current": 2 * GIB,
    }
    assert read_machine_memory(write(tmp_path, files)).available == 0


@pytest.mark.parametrize("text", ["", "garbage", "MemTotal: x kB\nMemAvailable:\n", "\x00\xff"])
def test_without_readable_numbers(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch):
    root = write(tmp_path, {"proc/meminfo": text, "proc/self/cgroup": text})
    assert "free pages" in read_machine_memory(root).source
    monkeypatch.setattr("os.sysconf", lambda name: -1)
    memory = read_machine_memory(root)
    assert memory.available == UNKNOWN_AVAILABLE
    assert "assumed" in memory.source
