"""Random adapters in the format that PEFT saves, the same ones in every run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP: Final = ("gate_proj", "up_proj", "down_proj")
ALL: Final = (*ATTENTION, *MLP)
QUERY_VALUE: Final = ("q_proj", "v_proj")
RANKS: Final = (8, 16, 32, 64)
MEAN_RANK: Final = sum(RANKS) // len(RANKS)
"""30: as many ranks in a step of 32 rows as the mix has."""

_SCALE: Final = 2.0
_DEVIATION: Final = 0.02
_ITEM_BYTES: Final = 2
_NUMBERS: Final = 1 << 24


class AdapterKind(NamedTuple):
    """Which linears an adapter updates, its rank, and which of the random ones it is."""

    targets: tuple[str, ...]
    rank: int
    seed: int

    @property
    def name(self) -> str:
        return f"{'-'.join(part[0] for part in self.targets)}-r{self.rank}-s{self.seed}"


def mixed(count: int, first: int = 0) -> list[AdapterKind]:
    """`count` adapters of q, k, v and o, of the ranks 8, 16, 32 and 64 in turn."""
    return [AdapterKind(ATTENTION, RANKS[seed % len(RANKS)], seed) for seed in range(first, first + count)]


def alike(targets: tuple[str, ...], rank: int, count: int, first: int = 0) -> list[AdapterKind]:
    """`count` adapters of the same shape."""
    return [AdapterKind(targets, rank, seed) for seed in range(first, first + count)]


@dataclass(frozen=True, slots=True)
class Shapes:
    """What adapters over a Llama-like checkpoint look like: layers, and (inputs, outputs) of each linear."""

    layers: int
    linears: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, model: Path) -> Shapes:
        """Those of the checkpoint in `model`. Raises KeyError for a configuration that is not Llama's."""
        config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
        query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
        sizes = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
        sizes += [(hidden, inner), (hidden, inner), (inner, hidden)]
        return cls(config["num_hidden_layers"], dict(zip(ALL, sizes, strict=True)))

    def num_bytes(self, kind: AdapterKind) -> int:
        """Bytes of A and B in bfloat16: what a step must read of the adapter at least."""
        inputs_and_outputs = sum(sum(self.linears[target]) for target in kind.targets)
        return self.layers * kind.rank * inputs_and_outputs * _ITEM_BYTES


class AdapterFiles:
    """Directories of random adapters over the model in `model`, made in `folder` where they are not there yet."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.shapes = Shapes.of(model)
        self._folder = folder
        self._numbers: NDArray[Any] | None = None

    def make(self, kinds: Sequence[AdapterKind]) -> list[Path]:
        """The directory of each."""
        return [self._make(kind) for kind in kinds]

    def remove(self, kind: AdapterKind) -> None:
        """Remove the directory of one, which is not needed any more."""
        shutil.rmtree(self._folder / kind.name)

    def _make(self, kind: AdapterKind) -> Path:
        directory = self._folder / kind.name
        if (directory / "adapter_config.json").exists():
            return directory
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        rng = np.random.default_rng([kind.seed, kind.rank, len(kind.targets)])
        for layer in range(self.shapes.layers):
            for target in kind.targets:
                inputs, outputs = self.shapes.linears[target]
                block = "mlp" if target in MLP else "self_attn"
                module = f"base_model.model.model.layers.{layer}.{block}.{target}"
                tensors[f"{module}.lora_A.weight"] = self._draw(rng, kind.rank, inputs)
                tensors[f"{module}.lora_B.weight"] = self._draw(rng, outputs, kind.rank)
        save_file(tensors, directory / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "",
            "r": kind.rank,
            "lora_alpha": _SCALE * kind.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(kind.targets),
        }
        # The last file: a directory without it is made again.
        (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        return directory

    def _draw(self, rng: np.random.Generator, *shape: int) -> NDArray[Any]:
        """A run of normal numbers from a place that `rng` chooses: drawing all anew would take minutes."""
        if self._numbers is None:
            drawn = np.random.default_rng(0).standard_normal(_NUMBERS, np.float32)
            self._numbers = (_DEVIATION * drawn).astype(ml_dtypes.bfloat16)
        size = int(np.prod(shape))
        start = int(rng.integers(_NUMBERS - size))
        return np.ascontiguousarray(self._numbers[start : start + size].reshape(shape))
