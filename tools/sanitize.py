"""Builds the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and runs their tests on them.

    python tools/sanitize.py [pytest arguments]     # make sanitize

Needs cmake, ninja, nanobind and a compiler with the sanitizers' libraries. The installed extension stays as it is.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
MODULE = "tokenloom.kernels.native._native"
TESTS = ["tests/kernels/native", "tests/kernels/test_invariance.py", "tests/kernels/test_hidden_rows.py"]
# Tests of what happens without memory set limits that a sanitizer's own tables exceed.
LEFT_OUT = "not finds_no_memory and not cannot_be_started"


def build() -> Path:
    """The instrumented extension."""
    configure = [
        "cmake",
        "-S",
        str(ROOT / "native"),
        "-B",
        str(BUILD),
        "-DTOKENLOOM_SANITIZE=ON",
        "-G",
        "Ninja",
    ]
    subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True)
    subprocess.run(["cmake", "--build", str(BUILD)], check=True)
    return next(BUILD.glob("_native*.so"))


def preload() -> str:
    """The runtime libraries, which must be in the process before the interpreter."""
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.check_output(["c++", f"-print-file-name={name}"], text=True).strip() for name in names
    ]
    return ":".join(found)


def run_tests(extension: str, arguments: list[str]) -> int:
    """pytest with the instrumented extension in the place of the installed one."""
    import pytest

    loader = importlib.machinery.ExtensionFileLoader(MODULE, extension)
    spec = importlib.util.spec_from_file_location(MODULE, extension, loader=loader)
    if spec is None:
        raise SystemExit(f"{extension} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    loader.exec_module(module)
    return int(pytest.main(["-q", "-k", LEFT_OUT, *(arguments or TESTS)]))


def main() -> None:
    if extension := os.environ.get("TOKENLOOM_SANITIZED"):
        sys.exit(run_tests(extension, sys.argv[1:]))
    os.environ |= {
        "TOKENLOOM_SANITIZED": str(build()),
        "LD_PRELOAD": preload(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    main()
