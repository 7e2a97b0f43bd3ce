"""The model families that can be served: which function builds the forward pass of which."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokenloom.errors import ModelError
from tokenloom.kernels.program import Program
from tokenloom.models import llama
from tokenloom.models.config import ModelConfig

Builder = Callable[[ModelConfig], Program]

BUILDERS: Mapping[str, Builder] = {"llama": llama.build}


def build_program(config: ModelConfig) -> Program:
    """The forward pass of `config.family`. Raises `ModelError` for an unknown family."""
    builder = BUILDERS.get(config.family)
    if builder is None:
        raise ModelError(f"model family {config.family!r}", ", ".join(sorted(BUILDERS)))
    return builder(config)
