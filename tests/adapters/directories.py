"""Adapter directories written by hand over the tiny model of tests/models/hf_fixtures.py, so that tests can bend
them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.hf_fixtures import TINY, llama_tensors, safetensors_bytes, write_model
from tokenloom.adapters.adapter import Adapter
from tokenloom.adapters.peft_directory import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from tokenloom.kernels.program import Program
from tokenloom.models.checkpoint import Checkpoint
from tokenloom.models.loading import describe_model
from tokenloom.models.weight_sources import source_rows

PREFIX = "base_model.model."
LAYER = "model.layers.0."
Q, UP = f"{PREFIX}{LAYER}self_attn.q_proj", f"{PREFIX}{LAYER}mlp.up_proj"
RANK = 4

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "some/base",
    "bias": "none",
    "init_lora_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "r": RANK,
    "target_modules": ["q_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
    "use_rslora": False,
}


def tensors(dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """q_proj and up_proj of both layers."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for layer in range(TINY["num_hidden_layers"]):
        for module, outputs in (("self_attn.q_proj", 32), ("mlp.up_proj", 48)):
            name = f"{PREFIX}model.layers.{layer}.{module}"
            found[f"{name}.lora_A.weight"] = rng.standard_normal((RANK, 32)).astype(dtype)
            found[f"{name}.lora_B.weight"] = rng.standard_normal((outputs, RANK)).astype(dtype)
    return found


def write(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """An adapter; `config` changes fields of `CONFIG`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(CONFIG | dict(config or {})))
    (directory / WEIGHTS_FILE).write_bytes(safetensors_bytes(tensors() if arrays is None else arrays))
    return directory


@functools.cache
def base() -> tuple[Path, Program]:
    """The tiny model and its program."""
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    directory = write_model(Path(folder.name), TINY, llama_tensors(TINY))
    return directory, describe_model(directory).program


_kept: list[Any] = []


def read(directory: Path) -> Adapter:
    model, program = base()
    with Checkpoint.open(model) as checkpoint:
        return read_adapter(directory, program, source_rows=source_rows(program), checkpoint=checkpoint)
