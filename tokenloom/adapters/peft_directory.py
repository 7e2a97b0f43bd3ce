"""Reading a directory that peft wrote: adapter_config.json and adapter_model.safetensors.

The tensors are the fact, and the configuration must agree with them: each module that it names has its two
tensors, each tensor belongs to a module that it names, and the ranks are those that it gives. Everything is
checked on the header of the file, before a number is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenloom.adapters.adapter import (
    Adapter,
    LoraModule,
    lora_key,
    place_modules,
    refuse,
    shape_problems,
)
from tokenloom.adapters.modules import Places
from tokenloom.adapters.peft_config import CONFIG_FILE, LoraConfig, read_lora_config
from tokenloom.adapters.tensor_file import DTYPES, TensorFile
from tokenloom.errors import ModelError
from tokenloom.kernels.program import Program
from tokenloom.models.json_fields import shorten
from tokenloom.models.weight_files import WeightFiles
from tokenloom.quantization.weights import row_blocks

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_PICKLE = "adapter_model.bin"
_LORA_KEY = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
_EMBEDDING_KEY = re.compile(r"(.+)\.lora_embedding_(A|B)(?:\.default)?")
_COPY_KEY = re.compile(r"(.+)\.base_layer\.weight")
_KNOWN_ENDS = {
    ".lora_B.bias": "a trained bias (lora_bias)",
    ".bias": "a trained bias",
    ".lora_magnitude_vector": "a DoRA magnitude",
    ".lora_magnitude_vector.weight": "a DoRA magnitude",
}


_Tensors = dict[str, str]
"""The names of the tensors of one module: "A" and "B", "embedding_A" and "embedding_B" of an embedding, and "copy",
the weight of the base model, which peft saves beside adapters of embedding and head."""


def read_adapter(
    directory: str | Path,
    program: Program,
    *,
    source_rows: Mapping[str, tuple[int, ...]],
    checkpoint: WeightFiles | None = None,
) -> Adapter:
    """The adapter in `directory`, read into memory, checked against the `program` of its base model.

    `source_rows` are those of `tokenloom.models.weight_sources` for the program. `checkpoint` is the base model;
    it is needed for an adapter that contains a copy of a weight, which must equal the checkpoint's. Raises
    `ModelError` that names the field or tensors, for a file that is not sound, does not fit, or asks for what is
    not served.
    """
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise ModelError(f"no directory {directory}", "a directory that peft saved an adapter in")
    config = read_lora_config(_inside(directory, CONFIG_FILE))
    if not os.path.lexists(directory / WEIGHTS_FILE) and os.path.lexists(directory / _PICKLE):
        raise ModelError(
            f"only pickled weights in {directory}: {_PICKLE}",
            f"{WEIGHTS_FILE} (pickle can run code and is never loaded; save with safe_serialization=True)",
        )
    places = Places(program, source_rows)
    with TensorFile(_inside(directory, WEIGHTS_FILE)) as file:
        found, problems = group_tensors(file)
        problems += _disagreements(found, file, config, places)
        if problems:
            refuse(str(directory), problems)
        for module, tensors in found.items():
            if "copy" in tensors:
                _check_copy(file, tensors["copy"], places.by_module[module].source, checkpoint)
        modules = [_read_module(module, found[module], file, config) for module in sorted(found)]
        file.check_unchanged()
    return place_modules(modules, program, source_rows=source_rows, base_model_name=config.base_model_name)


def _inside(directory: Path, name: str) -> Path:
    """The file `name` of `directory`. A link is followed within the directory, and within a Hugging Face cache
    from snapshots/<revision>/, or a directory in it, to blobs/. Raises `ModelError` for any other."""
    real = Path(os.path.realpath(directory))
    path = Path(os.path.realpath(real / name))
    if path.is_relative_to(real):
        return path
    for revision in (real, real.parent):
        if revision.parent.name == "snapshots" and path.parent == revision.parent.parent / "blobs":
            return path
    raise ModelError(
        f"{name}, which links out of {directory}", "files in the directory itself (or in its cache's blobs)"
    )


def group_tensors(file: TensorFile) -> tuple[dict[str, _Tensors], list[str]]:
    """The tensors by module, and what is wrong with their names and types."""
    found: dict[str, _Tensors] = {}
    problems: list[str] = []
    for name in sorted(file.entries):
        short = name.removeprefix(PREFIX)
        lora, embedding = _LORA_KEY.fullmatch(short), _EMBEDDING_KEY.fullmatch(short)
        copy = _COPY_KEY.fullmatch(short)
        if not name.startswith(PREFIX):
            problems.append(f"{shorten(name)} without the prefix {PREFIX}")
            continue
        if lora is not None:
            module, part = lora[1], lora[2]
        elif embedding is not None:
            module, part = embedding[1], f"embedding_{embedding[2]}"
        elif copy is not None:
            module, part = copy[1], "copy"
        else:
            what = next((what for end, what in _KNOWN_ENDS.items() if name.endswith(end)), "unexpected")
            problems.append(f"{shorten(name, 200)}: {what}")
            continue
        parts = found.setdefault(module, {})
        if part in parts:
            problems.append(f"{shorten(name, 200)} beside {shorten(parts[part], 200)}")
        elif file.entries[name].dtype not in DTYPES:
            problems.append(
                f"{shorten(name, 200)} of dtype {file.entries[name].dtype} instead of {', '.join(DTYPES)}"
            )
        parts[part] = name
    return found, problems


def _disagreements(
    found: Mapping[str, _Tensors], file: TensorFile, config: LoraConfig, places: Places
) -> list[str]:
    """What the model, the configuration and the tensors do not agree on."""
    problems: list[str] = []
    for module, tensors in found.items():
        place = places.by_module.get(module)
        if place is None:
            problems.append(f"{shorten(module, 200)}: {places.why_not(module)}")
            continue
        if not config.is_target(module, is_inner_linear=place.kind in ("linear", "router")):
            problems.append(f"{module}, which target_modules does not select")
            continue
        of_embedding = "embedding_" if place.kind == "embedding" else ""
        wanted = [f"{of_embedding}A", f"{of_embedding}B"]
        for part in tensors:
            if part not in (*wanted, "copy"):
                problems.append(f"{tensors[part]} over a module of kind {place.kind}")
        missing = [part for part in wanted if part not in tensors]
        problems += [f"missing {PREFIX}{lora_key(module, part[-1], place)}" for part in missing]
        if not missing:
            a, b = (file.entries[tensors[part]].shape for part in wanted)
            problems += shape_problems(module, a, b, places, config.rank_of(module))
        if "copy" in tensors:
            shape = file.entries[tensors["copy"]].shape
            needed = (place.inputs, place.outputs) if of_embedding else (place.outputs, place.inputs)
            if place.kind not in ("embedding", "head") or shape != needed:
                problems.append(
                    f"{tensors['copy']} of shape {list(shape)}; only embedding and head may have a"
                    " copy of the base model's weight, of the same shape"
                )
    for module, place in places.by_module.items():
        # Newer versions of transformers have no linear where a router is.
        if module in found or place.kind == "router":
            continue
        if config.is_target(module, is_inner_linear=place.kind == "linear"):
            problems.append(f"missing {PREFIX}{lora_key(module, 'A', place)}, which target_modules selects")
    if not found and not problems:
        problems.append("no tensor")
    return problems


def _read_module(module: str, tensors: _Tensors, file: TensorFile, config: LoraConfig) -> LoraModule:
    arrays: list[NDArray[Any]] = []
    for part in sorted(part for part in tensors if part != "copy"):
        name = tensors[part]
        array = file.read(name)
        if not all(bool(np.isfinite(array[rows]).all()) for rows in row_blocks(array.shape)):
            raise ModelError(f"{file.path}: {name} with values that are not finite", "finite numbers")
        arrays.append(array)
    return LoraModule(module, arrays[0], arrays[1], config.scale_of(module))


def _check_copy(file: TensorFile, name: str, source: str, checkpoint: WeightFiles | None) -> None:
    """Raise `ModelError` unless the copy of a weight is that of the base model, rounded to its own type: peft
    would put it in the base model's place."""
    base = checkpoint.source(source) if checkpoint is not None and source in checkpoint else None
    if checkpoint is None or not isinstance(base, np.ndarray):
        raise ModelError(
            f"{name}, which cannot be compared with the base model",
            "a copy of the base model's weight where its checkpoint is at hand (peft leaves it out with"
            " save_embedding_layers=False)",
        )
    copy = file.read(name)
    with np.errstate(over="ignore"):
        same = all(
            np.array_equal(copy[rows], base[rows].astype(copy.dtype)) for rows in row_blocks(copy.shape)
        )
    checkpoint.release_source(source)
    if not same:
        raise ModelError(f"{name} that differs from {source} of the base model", "an unchanged base weight")
