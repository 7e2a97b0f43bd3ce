"""A W8A8 or W4A16 checkpoint for vLLM (compressed-tensors), by rounding to nearest, without calibration.

    python quantize_vllm.py SOURCE TARGET w8a8|w4a16

Run in the environment of vLLM. Random weights have nothing to calibrate on; speed does not depend on it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 128


def int8_channels(weight: torch.Tensor, base: str) -> dict[str, torch.Tensor]:
    """Symmetric int8 with one scale for each output channel."""
    values = weight.float()
    scale = values.abs().amax(1, keepdim=True) / 127
    return {
        f"{base}.weight": torch.clamp((values / scale).round(), -128, 127).to(torch.int8),
        f"{base}.weight_scale": scale.bfloat16(),
    }


def int4_groups(weight: torch.Tensor, base: str) -> dict[str, torch.Tensor]:
    """Symmetric int4 with one scale for each 128 weights of a channel, packed as vLLM reads it."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    scale = groups.abs().amax(2, keepdim=True) / 7.5
    rounded = torch.clamp((groups / scale).round(), -8, 7).to(torch.int8).view(rows, columns)
    return {
        f"{base}.weight_packed": pack_to_int32(rounded, 4),
        f"{base}.weight_scale": scale.squeeze(2).bfloat16(),
        f"{base}.weight_shape": torch.tensor([rows, columns]),
    }


def quantization_config(kind: str) -> dict[str, Any]:
    """The section of config.json that tells vLLM what the tensors are."""
    weights: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False, "observer": "minmax"}
    activations: dict[str, Any] | None = None
    if kind == "w8a8":
        weights |= {"num_bits": 8, "strategy": "channel"}
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    else:
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "w8a8" else "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def main() -> None:
    source, target, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if kind not in ("w8a8", "w4a16"):
        raise SystemExit(f"unknown kind {kind}")
    target.mkdir(parents=True, exist_ok=True)
    quantize = int8_channels if kind == "w8a8" else int4_groups
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("proj.weight"):
            tensors |= quantize(weight, name.removesuffix(".weight"))
        else:
            tensors[name] = weight
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(kind)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, target)


if __name__ == "__main__":
    main()
