"""From a Hugging Face directory or a GGUF file to a model in memory: configuration, forward pass, weights, RoPE tables.

Names and shapes are checked against the program before the first weight is allocated; then the tensors are
converted one by one, and the pages of each source are given back, so that loading peaks at the weights plus
one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.kernels.program import Program, WeightSpec
from tokenloom.models.config import ModelConfig
from tokenloom.models.hf_config import GenerationDefaults
from tokenloom.models.input_order import order_inputs
from tokenloom.models.model_files import open_checkpoint, read_architecture
from tokenloom.models.registry import build_program
from tokenloom.models.rope import limit_context, rope_tables, table_bytes
from tokenloom.models.weight_files import WeightFiles
from tokenloom.models.weight_sources import (
    ProgressListener,
    SourceForm,
    WeightFormat,
    WeightSource,
    check_weights,
    reading_bytes,
    resolve_weights,
    roundings,
    source_forms,
    weight_sources,
)
from tokenloom.quantization import round_to_nearest
from tokenloom.quantization.weights import Int4Matrix, Int8Matrix, row_blocks

Float32 = NDArray[np.float32]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

_TYPES: Mapping[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What is known of a model before its weights are read, enough for a `MemoryPlan`.

    `stored` are the forms in which the sources of each weight will come out of the files, and `reading_bytes` what
    those of one weight take at most that are no views of them; None and 0 where `config` tells both.
    """

    config: ModelConfig
    program: Program
    generation: GenerationDefaults
    stored: Mapping[str, Sequence[SourceForm]] | None = None
    reading_bytes: int = 0

    @property
    def is_quantized(self) -> bool:
        """Whether some weights are stored in fewer bits and were not asked for as floats."""
        if self.stored is None:
            return self.config.quantization is not None
        return any(form.dtype in ("int8", "int4") for forms in self.stored.values() for form in forms)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in memory.

    `weights` maps the names of `program.weights` to arrays as `load_weights` makes them, or to what the packer
    made. `dtype` is the arithmetic that was asked for ("auto" resolved), `config.dtype` what the checkpoint
    stores. `rope` is cos and sin, float32 [config.max_context, rotary_dim / 2]. `content_id` is that of the
    checkpoint, `weight_format` what was asked for beyond it.
    """

    config: ModelConfig
    program: Program
    weights: dict[str, Any]
    rope: tuple[Float32, Float32]
    content_id: str
    dtype: Literal["float32", "bfloat16", "float16"]
    generation: GenerationDefaults
    weight_format: WeightFormat = "auto"

    @property
    def identity(self) -> str:
        """Names the numbers of the weights: the checkpoint's content, and the format it was rounded to."""
        return self.content_id if self.weight_format == "auto" else f"{self.content_id}:{self.weight_format}"


def describe_model(
    directory: str | Path, *, max_context: int | None = None, weights: str = "auto"
) -> ModelDescription:
    """Read the configuration of `directory` (or of a GGUF file) and the headers of its files, and build its program;
    no weight is read, but for the orders of inputs.

    `max_context` (None or 0: all that the model allows) cuts `config.max_context`. Raises `ModelError`, and
    `InvalidParameter` for a context that the model cannot serve, and for `weights` that do not go with it.
    """
    architecture = read_architecture(directory)
    config = limit_context(architecture.config, max_context)
    with open_checkpoint(directory) as checkpoint:
        # config.json is sometimes wrong about the type; the tensors are the fact.
        config = replace(config, dtype=checkpoint.main_dtype)
        chosen = resolve_weights(weights, checkpoint)
        if chosen == "float" and checkpoint.quantization is not None:
            # What is widened has values of no narrower type.
            config = replace(config, dtype="float32")
        program = order_inputs(build_program(config), checkpoint)
        described = ModelDescription(config=config, program=program, generation=architecture.generation)
        if chosen != "float" and all(checkpoint.blocks(name) is None for name in checkpoint.names):
            return described
        check_weights(program, checkpoint)
        return replace(
            described,
            stored=source_forms(program, checkpoint, chosen),
            reading_bytes=reading_bytes(program, checkpoint, chosen),
        )


class Packer(Protocol):
    """What turns the sources of a weight into the form of a backend."""

    def pack(self, spec: WeightSpec, sources: Sequence[WeightSource]) -> Any: ...


class Cache(Protocol):
    """Packed weights that were kept, by a key."""

    def load(self, key: str, sources: Mapping[str, Sequence[SourceForm]]) -> dict[str, Any] | None: ...

    def save(self, key: str, weights: Mapping[str, Any]) -> None: ...


def load_model(
    directory: str | Path,
    *,
    dtype: str = "auto",
    weights: str = "auto",
    max_context: int | None = None,
    progress: ProgressListener | None = None,
    packer: Packer | None = None,
    cache: Cache | None = None,
) -> LoadedModel:
    """Load the model in `directory`, or in a GGUF file.

    `dtype` "auto" is float32 arithmetic, in which the values of bf16 and fp16 checkpoints are exact.
    "bfloat16" and "float16" round the weights to these formats (to nearest, ties to even). `weights` "int8" and
    "int4" round linears, head and embedding to these formats; "float" widens what is quantised. `progress` as in
    `load_weights`. With a `packer` the weights are what it makes of the sources, formats included, and `cache`
    keeps them for the next start. Raises `ModelError`, `OutOfMemory` (RoPE tables), and `InvalidParameter` for
    `dtype`, `weights` or `max_context`.
    """
    chosen = resolve_dtype(dtype)
    described = describe_model(directory, max_context=max_context, weights=weights)
    # Refuses now what would else fail after the weights have been read.
    table_bytes(described.config, described.config.max_context)
    with open_checkpoint(directory) as checkpoint:
        weight_format = resolve_weights(weights, checkpoint)
        content_id = checkpoint.content_id()
        loaded: dict[str, Any]
        if packer is None:
            loaded = load_weights(described.program, checkpoint, chosen, progress, weights=weight_format)
        else:
            key = f"{content_id}:{checkpoint.files_id()}:{chosen}:{weight_format}"
            formats = (chosen, weight_format)
            loaded = _packed_weights(described.program, checkpoint, packer, formats, cache, key, progress)
    return LoadedModel(
        config=described.config,
        program=described.program,
        weights=loaded,
        rope=rope_tables(described.config),
        content_id=content_id,
        dtype=chosen,
        generation=described.generation,
        weight_format=weight_format,
    )


def _packed_weights(
    program: Program,
    checkpoint: WeightFiles,
    packer: Packer,
    formats: tuple[str, WeightFormat],
    cache: Cache | None,
    key: str,
    progress: ProgressListener | None,
) -> dict[str, Any]:
    if cache is not None:
        check_weights(program, checkpoint)
        kept = cache.load(key, source_forms(program, checkpoint, formats[1]))
        if kept is not None:
            return kept
    loaded: dict[str, Any] = {}
    dtype, weight_format = formats
    rounded = roundings(program, weight_format)
    for spec, sources in weight_sources(program, checkpoint, weight_format, progress, packs=True):
        try:
            loaded[spec.name] = packer.pack(spec, sources)
        except ValueError as error:
            _refuse(spec, sources, rounded.get(spec.name, dtype), error)
        # Not two weights at a time.
        del sources
    if cache is not None:
        cache.save(key, loaded)
    return loaded


def _refuse(spec: WeightSpec, sources: Sequence[WeightSource], target: str, error: ValueError) -> NoReturn:
    """Say which tensor a packer could not turn into `target`, as `load_weights` would: the rules are the
    same, and a packer on many threads knows only that some number breaks them."""
    for source, name in zip(sources, spec.sources, strict=True):
        if isinstance(source, Int8Matrix | Int4Matrix):
            continue
        if target == "int8":
            round_to_nearest.int8(source, name)
        elif target == "int4":
            round_to_nearest.int4(source, name=name)
        else:
            _convert(source, np.empty(source.shape, _TYPES[target]), name)
    raise ModelError(f"{spec.name}: {error}", "weights that the kernels can pack") from None


def resolve_dtype(dtype: str, *, narrow: bool = False) -> Literal["float32", "bfloat16", "float16"]:
    """The arithmetic that `dtype` means; "auto" is bfloat16 where `narrow` says that it costs nothing, else
    float32. Raises `InvalidParameter`."""
    if dtype == "auto":
        return "bfloat16" if narrow else "float32"
    if dtype == "float32":
        return "float32"
    if dtype == "bfloat16":
        return "bfloat16"
    if dtype == "float16":
        return "float16"
    raise InvalidParameter("dtype", dtype, "one of " + ", ".join(get_args(DtypeName)))


def load_weights(
    program: Program,
    checkpoint: WeightFiles,
    dtype: str = "auto",
    progress: ProgressListener | None = None,
    *,
    weights: str = "auto",
) -> dict[str, NDArray[Any]]:
    """The weights of `program` by name, in their shapes; optional ones may be absent from the checkpoint.

    For float32 ("auto") an array has the type of its sources, or float32 where these differ: the values are
    exact, and a backend widens what it multiplies. For "bfloat16" (`ml_dtypes.bfloat16`) and "float16" they
    are rounded to that type. A weight with a source in 8 or 4 bits, from the checkpoint or by `weights`, is
    float32 for any `dtype`: the values of its format. Orders of inputs are int32. `progress` is called for each
    source. Raises `ModelError` and `InvalidParameter` as `weight_sources`, and `ModelError` for a value that
    overflows the type; nothing is allocated before all names and shapes agree.
    """
    chosen = resolve_dtype(dtype)
    loaded: dict[str, NDArray[Any]] = {}
    for spec, sources in weight_sources(program, checkpoint, weights, progress):
        loaded[spec.name] = out = np.empty(spec.shape, _type_of(sources, chosen))
        row = 0
        for source, name in zip(sources, spec.sources, strict=True):
            part = out[row : row + source.shape[0]]
            if isinstance(source, Int8Matrix | Int4Matrix):
                source.dequantize(part)
            else:
                _convert(source, part, name)
            row += len(part)
        # Not two weights in 8 or 4 bits at a time.
        del source, sources
    return loaded


def _type_of(sources: tuple[WeightSource, ...], dtype: str) -> np.dtype[Any]:
    stored = {
        "quantized" if isinstance(source, Int8Matrix | Int4Matrix) else source.dtype.name
        for source in sources
    }
    if stored == {"int32"}:
        return np.dtype(np.int32)
    if "quantized" in stored:
        dtype = "float32"
    elif dtype == "float32" and len(stored) == 1:
        dtype = stored.pop()
    chosen: np.dtype[Any] = np.dtype(_TYPES[dtype])
    return chosen


def _convert(source: NDArray[Any], out: NDArray[Any], name: str) -> None:
    """out = source, rounded to the type of `out` in blocks of rows. Raises `ModelError` for an overflow."""
    if out.dtype in (source.dtype, np.float32):
        out[...] = source
        return
    for rows in row_blocks(source.shape):
        block = source[rows]
        with np.errstate(over="ignore"):
            narrow = block.astype(out.dtype)
        if not np.isfinite(narrow).all() and np.isfinite(block).all():
            largest = float(np.abs(block.astype(np.float32)).max())
            raise ModelError(
                f"{name} with the value {largest:g}",
                f"values that fit {out.dtype.name}; load it with dtype float32",
            )
        out[rows] = narrow
