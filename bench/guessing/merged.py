"""A LoRA adapter merged into the weights of its base model: engines without adapters then run the same text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers the types that safetensors names)
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

PREFIX = "base_model.model."
PLAIN = {"use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "bias": "none"}
"""Settings under which an update is alpha / r * B @ A."""
EMPTY = ("rank_pattern", "alpha_pattern", "modules_to_save")


def merge_adapter(base: Path, adapter: Path, target: Path) -> None:
    """Write to `target` the checkpoint `base` with weight += alpha / r * B @ A for each module of `adapter`, computed
    in fp32 and rounded once to the type of the weight. Raises ValueError for an adapter of another kind."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    odd = [name for name, value in PLAIN.items() if config.get(name, value) != value]
    odd += [name for name in EMPTY if config.get(name)]
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(
            f"{adapter}: only plain LoRA is merged, not {', '.join(odd) or config.get('peft_type')}"
        )
    weights = load_file(base / "model.safetensors")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors.pop(name), tensors.pop(name.replace(".lora_A.", ".lora_B."))
        weights[f"{module}.weight"] = _merged(
            weights[f"{module}.weight"], a, b, config["lora_alpha"] / config["r"]
        )
    if tensors:
        raise ValueError(f"{adapter}: only lora_A and lora_B are merged, not {sorted(tensors)[0]}")
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def _merged(weight: NDArray[Any], a: NDArray[Any], b: NDArray[Any], scale: float) -> NDArray[Any]:
    """weight [outputs, inputs], a [rank, inputs], b [outputs, rank]."""
    update = b.astype(np.float32) @ a.astype(np.float32) * np.float32(scale)
    merged: NDArray[Any] = (weight.astype(np.float32) + update).astype(weight.dtype)
    return merged
