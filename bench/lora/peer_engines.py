"""Parts `vllm`, `vllm_base`, `peft`: the same adapters and prompts in other engines, each in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import files
import variants
from cases import shape_of
from files import AdapterFiles
from serving import model_directory

HERE = Path(__file__).resolve().parent


class Missing(RuntimeError):
    """An engine is not installed here."""


def measure_vllm(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """vLLM that takes up to 32 adapters of ranks up to 64: without an adapter, with 32 distinct ones, prefill."""
    return _run_vllm(spec, adapters, lora=True)


def measure_vllm_base(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """vLLM that takes no adapters."""
    return _run_vllm(spec, adapters, lora=False)


def _run_vllm(spec: dict[str, Any], adapters: AdapterFiles, *, lora: bool) -> dict[str, Any]:
    variant = variants.make_variant("vllm", "bf16", model_directory(spec), spec["threads"])
    if variant is None or variant.missing:
        raise Missing(f"vLLM is not installed: {variant.missing if variant else ''}")
    told = _told(spec, adapters) | {"lora": lora, "max_context": 4096}
    env = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")} | variant.env
    return _run("vllm_lora.py", variant.python, told, env)


def measure_peft(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """transformers with peft: no adapter in batches of 32, one request after another each with its adapter, and
    the mixed batch that peft computes adapter by adapter."""
    own = variants.environment("transformers") / "bin" / "python"
    for python in (own, Path(sys.executable)):
        if python.exists() and not _lacks(python, "peft", "transformers"):
            env = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
            return _run("peft_lora.py", python, _told(spec, adapters), env)
    raise Missing("peft is installed neither beside transformers nor beside tokenloom")


def _lacks(python: Path, *modules: str) -> bool:
    check = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {modules!r})))"
    return subprocess.run([str(python), "-c", check], check=False).returncode != 0


def _told(spec: dict[str, Any], adapters: AdapterFiles) -> dict[str, Any]:
    """What the process of a peer is told; its adapters are those of the part `mixes`."""
    kinds = files.mixed(shape_of(spec["quick"]).requests)
    one = files.alike(files.ATTENTION, 16, 1)
    return spec | {
        "model": str(model_directory(spec)),
        "adapters": [str(path) for path in adapters.make([*kinds, *one])],
    }


def _run(script: str, python: Path, told: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    env = env | {"PYTHONPATH": os.pathsep.join([str(HERE), str(variants.HERE)])}
    shown = subprocess.run(
        [str(python), str(HERE / script), json.dumps(told)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if shown.returncode != 0 or not shown.stdout.strip():
        raise RuntimeError(f"{script} ended with {shown.returncode}")
    result: dict[str, Any] = json.loads(shown.stdout.strip().splitlines()[-1])
    return result
