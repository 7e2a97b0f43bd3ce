"""Which interpreter, model file, environment and options each engine gets at each precision."""

from __future__ import annotations

import ctypes.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
WORK: Final = HERE / ".work"
"""Environments, sources and models that install.py makes; ignored by git."""
LLAMA_CPP: Final = WORK / "src" / "build" / "bin"
"""Programs of llama.cpp."""
OURS: Final = "tokenloom"
PEERS: Final = ("vllm", "openvino", "llamacpp", "transformers")
MORE_PEERS: Final = ("transformers_1", "transformers_cb")
PRECISIONS: Final = ("bf16", "int8", "int4")

# File name of the model in .work/models for each precision, after the model's own name.
SUFFIXES: Final[dict[str, dict[str, str]]] = {
    "vllm": {"bf16": "", "int8": "-w8a8", "int4": "-w4a16"},
    "openvino": {"bf16": "-ov-fp16", "int8": "-ov-int8", "int4": "-ov-int4"},
    "llamacpp": {"bf16": "-bf16.gguf", "int8": "-q8_0.gguf", "int4": "-q4_0.gguf"},
    "transformers": {"bf16": ""},
    "transformers_1": {"bf16": ""},
    "transformers_cb": {"bf16": ""},
}
VLLM_CACHE_GB: Final = 3


@dataclass(frozen=True)
class Variant:
    """One engine at one precision, ready to be started."""

    engine: str
    precision: str
    backend: str
    python: Path
    model: Path
    env: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> str:
        """What keeps it from running; empty if nothing does."""
        wanted = [self.python, self.model]
        wanted += [Path(self.options["server"])] if "server" in self.options else []
        return ", ".join(path.name for path in wanted if not path.exists())


def find_model(model: str) -> Path:
    """The checkpoint of a model given by its name (S, M, L) or its directory."""
    path = WORK / "models" / model
    return path if path.exists() else Path(model).resolve()


def make_variant(
    engine: str, precision: str, model: Path, threads: int, options: dict[str, Any] | None = None
) -> Variant | None:
    """The variant of an engine, or None where the engine has no such precision.

    `options` is handed to tokenloom; the peers run as variants.py and their backends say.
    """
    if engine == OURS:
        return Variant(engine, precision, OURS, Path(sys.executable), model, _env(threads), options or {})
    suffix = SUFFIXES[engine].get(precision)
    if suffix is None:
        return None
    converted = model.with_name(model.name + suffix)
    backend, env, peer_options = engine, _env(threads), {}
    if engine == "vllm":
        env |= _vllm_env(threads)
        del env["OMP_NUM_THREADS"]  # vLLM binds its threads itself, and warns that this slows it down
    elif engine == "llamacpp":
        peer_options["server"] = str(LLAMA_CPP / "llama-server")
    elif engine == "transformers_cb":
        backend, peer_options["mode"] = "transformers", "cb"
    elif engine == "transformers_1":
        backend, peer_options["batch"] = "transformers", 1
    # llama.cpp brings no Python of its own: the client that talks to its server runs in ours.
    python = Path(sys.executable) if engine == "llamacpp" else environment(backend) / "bin" / "python"
    return Variant(engine, precision, backend, python, converted, env, peer_options)


def environment(name: str) -> Path:
    """Where install.py puts the environment of an engine."""
    return WORK / "envs" / name


def _env(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _vllm_env(threads: int) -> dict[str, str]:
    """The set-up that vLLM's own guide recommends: tcmalloc, Intel's OpenMP, bound threads."""
    openmp = environment("vllm") / "lib" / "libiomp5.so"
    preload = [ctypes.util.find_library("tcmalloc_minimal"), str(openmp) if openmp.exists() else None]
    return {
        "LD_PRELOAD": ":".join(library for library in preload if library),
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GB),
        "VLLM_CPU_OMP_THREADS_BIND": "0" if threads == 1 else f"0-{threads - 1}",
        "VLLM_CACHE_ROOT": str(WORK / "cache" / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "cache" / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PATH": f"{environment('vllm') / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
    }
