"""Make what the peers need, under bench/peers/.work: environments, llama.cpp, models and their conversions.

    python bench/peers/install.py [--peers vllm,openvino,llamacpp,transformers] [--models S,M,L]
                                  [--precision bf16,int8,int4]

What is there already is left alone, so it can be started again. A peer that cannot be installed does not keep
the others from it; the steps that failed are listed at the end. Needs Python 3.11, cmake and a C++ compiler.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import variants
from variants import HERE, SUFFIXES, WORK, environment

MODELS = WORK / "models"
LOGS = WORK / "logs"
SOURCES = WORK / "src"
# PyPI's builds of these do not load beside the CPU build of torch, and nothing here needs them.
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"], "ovconvert": ["torchvision"]}
ENVIRONMENTS = {
    "vllm": ["vllm", "transformers"],  # transformers makes the models, for every peer
    "openvino": ["openvino", "ovconvert", "transformers"],
    "llamacpp": ["transformers"],
    "transformers": ["transformers"],
    "transformers_cb": ["transformers"],
}
NO_INT4 = ("S",)
"""Its rows do not divide into groups of 128 weights."""


class Failed(RuntimeError):
    """A step went wrong; its log says why."""


def run(log: str, *command: str | Path, cwd: Path = HERE) -> None:
    """Run a command with its output in a log."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"{log}.log"
    with path.open("a", encoding="utf-8") as output:
        parts = [str(part) for part in command]
        print("$", *parts, file=output, flush=True)
        done = subprocess.run(parts, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        last = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise Failed(f"{log}: " + " | ".join(last))


# --- environments ----------------------------------------------------------------------------------------


def make_environment(name: str, python: str) -> None:
    """A virtual environment with the pinned packages of requirements/NAME.txt."""
    home = environment(name)
    marker = home / ".ok"
    if marker.exists():
        return
    shutil.rmtree(home, ignore_errors=True)
    run(f"env-{name}", python, "-m", "venv", home)
    pip = [home / "bin" / "python", "-m", "pip"]
    run(f"env-{name}", *pip, "install", "-r", HERE / "requirements" / f"{name}.txt")
    if name in UNWANTED:
        run(f"env-{name}", *pip, "uninstall", "-y", *UNWANTED[name])
    marker.touch()


def llama_cpp_source() -> Path:
    """llama.cpp as the sdist of llama-cpp-python brings it: the package registry has no other source of it."""
    found = [path for path in SOURCES.glob("llama_cpp_python-*") if path.is_dir()]
    if not found:
        SOURCES.mkdir(parents=True, exist_ok=True)
        requirement = (HERE / "requirements" / "llamacpp.txt").read_text(encoding="utf-8").strip()
        run(
            "llamacpp-source",
            *(sys.executable, "-m", "pip", "download", "--no-deps"),
            *("--no-binary", "llama-cpp-python", requirement),
            cwd=SOURCES,
        )
        with tarfile.open(next(SOURCES.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(SOURCES, filter="data")
        found = [path for path in SOURCES.glob("llama_cpp_python-*") if path.is_dir()]
    return found[0] / "vendor" / "llama.cpp"


def build_llama_cpp(jobs: int) -> None:
    """llama-server and llama-quantize for this machine's instruction set."""
    build = variants.LLAMA_CPP.parent
    if (build / "bin" / "llama-server").exists() and (build / "bin" / "llama-quantize").exists():
        return
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF"]
    options += ["-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
    run("llamacpp-build", "cmake", "-S", llama_cpp_source(), "-B", build, *options)
    targets = ["--target", "llama-server", "llama-quantize"]
    run("llamacpp-build", "cmake", "--build", build, f"-j{jobs}", *targets)


# --- models ----------------------------------------------------------------------------------------------


def make_model(name: str) -> None:
    """The random-weight checkpoint that all conversions start from."""
    if not (MODELS / name / "tokenizer.json").exists():
        python = environment("transformers") / "bin" / "python"
        run("models", python, HERE / "make_models.py", "--out", MODELS, "--only", name)


def converted(engine: str, model: str, precision: str) -> Path | None:
    """The file or directory that a peer needs, or None if it needs none of its own or has no such precision."""
    suffix = SUFFIXES[engine].get(precision, "")
    return MODELS / (model + suffix) if suffix else None


def convert(engine: str, model: str, precision: str) -> None:
    """Make what `engine` needs for a model at a precision; it appears under its name only when complete."""
    target = converted(engine, model, precision)
    if target is None or target.exists() or (precision == "int4" and model in NO_INT4):
        return
    part = target.with_name("part-" + target.name)
    if part.is_dir():
        shutil.rmtree(part)
    part.unlink(missing_ok=True)
    {"vllm": _quantize_vllm, "openvino": _convert_openvino, "llamacpp": _convert_gguf}[engine](
        model, precision, part
    )
    part.rename(target)


def _quantize_vllm(model: str, precision: str, part: Path) -> None:
    kind = {"int8": "w8a8", "int4": "w4a16"}[precision]
    python = environment("vllm") / "bin" / "python"
    run(f"convert-vllm-{model}-{kind}", python, HERE / "quantize_vllm.py", MODELS / model, part, kind)


def _convert_openvino(model: str, precision: str, part: Path) -> None:
    weights = {"bf16": "fp16"}.get(precision, precision)
    program = environment("ovconvert") / "bin" / "optimum-cli"
    options = ["--task", "text-generation-with-past", "--weight-format", weights]
    log = f"convert-openvino-{model}-{weights}"
    run(log, program, "export", "openvino", "--model", MODELS / model, *options, part)


def _convert_gguf(model: str, precision: str, part: Path) -> None:
    log = f"convert-gguf-{model}-{precision}"
    if precision == "bf16":
        python = environment("transformers") / "bin" / "python"
        script = [HERE / "convert_gguf.py", llama_cpp_source(), MODELS / model]
        run(log, python, *script, "--outtype", "bf16", "--outfile", part)
        return
    convert("llamacpp", model, "bf16")
    kind = {"int8": "q8_0", "int4": "q4_0"}[precision]
    program = variants.LLAMA_CPP / "llama-quantize"
    run(log, program, MODELS / f"{model}{SUFFIXES['llamacpp']['bf16']}", part, kind, str(os.cpu_count() or 1))


# --- all of it -------------------------------------------------------------------------------------------


def steps(args: argparse.Namespace) -> list[tuple[str, Callable[[], None]]]:
    """Every step, with its name, in an order in which each finds what it needs."""
    peers = args.peers.split(",")
    names = dict.fromkeys(name for peer in peers for name in ENVIRONMENTS[peer])
    found: list[tuple[str, Callable[[], None]]] = [
        (f"environment {name}", lambda name=name: make_environment(name, args.python)) for name in names
    ]
    if "llamacpp" in peers:
        found.append(("llama.cpp", lambda: build_llama_cpp(args.jobs)))
    for model in args.models.split(","):
        found.append((f"model {model}", lambda model=model: make_model(model)))
        for peer in peers:
            for precision in args.precision.split(","):
                if converted(peer, model, precision) is not None:
                    found.append(
                        (
                            f"{model} {precision} for {peer}",
                            lambda peer=peer, model=model, precision=precision: convert(
                                peer, model, precision
                            ),
                        )
                    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=",".join(variants.PEERS))
    parser.add_argument("--models", default="S,M")
    parser.add_argument("--precision", default=",".join(variants.PRECISIONS))
    parser.add_argument("--python", default=sys.executable, help="a Python 3.11 for the environments")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of the compiler")
    args = parser.parse_args()
    failures = []
    for name, step in steps(args):
        started = time.monotonic()
        try:
            step()
        except (Failed, OSError) as error:
            failures.append(f"{name}: {error}")
            print(f"FAILED  {name}: {error}", flush=True)
        else:
            print(f"ok      {name} ({time.monotonic() - started:.0f} s)", flush=True)
    if "vllm" in args.peers and ctypes.util.find_library("tcmalloc_minimal") is None:
        print("note    vLLM is 10 to 30 % slower without tcmalloc: install Debian's libtcmalloc-minimal4")
    if failures:
        sys.exit(f"{len(failures)} steps failed; the logs are in {LOGS}")


if __name__ == "__main__":
    main()
