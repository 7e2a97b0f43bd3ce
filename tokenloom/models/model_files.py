"""A model on this machine: a Hugging Face directory, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tokenloom.errors import ModelError
from tokenloom.gguf.file import GgufFile, find_gguf
from tokenloom.models.checkpoint import Checkpoint
from tokenloom.models.config import ModelConfig
from tokenloom.models.gguf_checkpoint import GgufCheckpoint
from tokenloom.models.gguf_config import read_gguf_config, read_gguf_defaults
from tokenloom.models.hf_config import (
    GenerationDefaults,
    parse_config,
    read_config,
    read_generation_defaults,
)
from tokenloom.models.weight_files import WeightFiles


class Architecture(NamedTuple):
    """What is known of a model without its tensors."""

    config: ModelConfig
    generation: GenerationDefaults


def read_architecture(path: str | Path) -> Architecture:
    """The configuration and the sampling defaults of the model at `path`. Raises `ModelError`."""
    gguf = find_gguf(path)
    if gguf is None:
        return Architecture(read_config(path), read_generation_defaults(path))
    with GgufFile(gguf) as file:
        written = read_gguf_config(file)
        try:
            return Architecture(parse_config(written), read_gguf_defaults(file))
        except ModelError as error:
            # The reader checks what it can by the names of the file; this is what the families refuse.
            raise ModelError(f"{gguf}, read as {error.found}", error.supported) from None


def open_checkpoint(path: str | Path) -> WeightFiles:
    """The tensors of the model at `path`, of which none is read. Raises `ModelError`, and `UnsupportedFeature` for a
    GGUF file without the package that knows its blocks."""
    gguf = find_gguf(path)
    return Checkpoint.open(path) if gguf is None else GgufCheckpoint.open(gguf)
