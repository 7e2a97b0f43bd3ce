"""The model families that can be served."""

from __future__ import annotations

from collections.abc import Mapping

from tokenloom.errors import ModelError
from tokenloom.kernels.program import Program
from tokenloom.models.config import ModelConfig
from tokenloom.models.family import Family
from tokenloom.models.gemma import GEMMA2, GEMMA3
from tokenloom.models.gpt2 import GPT2, OPT
from tokenloom.models.gpt_neox import GPT_NEOX
from tokenloom.models.granite import GRANITE
from tokenloom.models.llama import LLAMA
from tokenloom.models.mistral import MISTRAL
from tokenloom.models.mixtral import MIXTRAL
from tokenloom.models.olmo2 import OLMO2
from tokenloom.models.olmoe import OLMOE
from tokenloom.models.phi3 import PHI3
from tokenloom.models.qwen import QWEN2, QWEN3, QWEN3_MOE
from tokenloom.models.stablelm import STABLELM
from tokenloom.models.starcoder2 import STARCODER2

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA2,
        GEMMA3,
        PHI3,
        OLMO2,
        GRANITE,
        STABLELM,
        GPT2,
        OPT,
        GPT_NEOX,
        STARCODER2,
        MIXTRAL,
        QWEN3_MOE,
        OLMOE,
    )
}


def build_program(config: ModelConfig) -> Program:
    """The forward pass of `config.family`. Raises `ModelError` for an unknown family."""
    family = FAMILIES.get(config.family)
    if family is None:
        raise ModelError(f"model family {config.family!r}", ", ".join(sorted(FAMILIES)))
    return family.build(config)
