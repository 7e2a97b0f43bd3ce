"""From a Hugging Face directory to a model in memory: configuration, forward pass, weights, RoPE tables.

Names and shapes are checked against the program before the first weight is allocated; then the tensors are
converted one by one, and the pages of each source are given back, so that loading peaks at the weights plus
one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.kernels.program import Linear, Program, RopeStore, WeightSpec
from tokenloom.models.checkpoint import Checkpoint
from tokenloom.models.config import ModelConfig
from tokenloom.models.hf_config import GenerationDefaults, read_config, read_generation_defaults
from tokenloom.models.registry import build_program
from tokenloom.models.rope import limit_context, rope_tables, table_bytes

Float32 = NDArray[np.float32]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

ProgressListener = Callable[[str, int, int], None]
"""Hears (stage, bytes done, bytes in all) as loading goes on."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_BLOCK_ELEMENTS = 1 << 22
"""Numbers converted at a time, which bounds temporaries."""

_TYPES: Mapping[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What is known of a model before its weights are read, enough for a `MemoryPlan`."""

    config: ModelConfig
    program: Program
    generation: GenerationDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in memory.

    `weights` maps the names of `program.weights` to arrays as `load_weights` makes them. `dtype` is the
    arithmetic that was asked for ("auto" resolved), `config.dtype` what the checkpoint stores. `rope` is cos
    and sin, float32 [config.max_context, rotary_dim / 2]. `content_id` is that of the checkpoint.
    """

    config: ModelConfig
    program: Program
    weights: dict[str, NDArray[Any]]
    rope: tuple[Float32, Float32]
    content_id: str
    dtype: Literal["float32", "bfloat16", "float16"]
    generation: GenerationDefaults


def describe_model(directory: str | Path, *, max_context: int | None = None) -> ModelDescription:
    """Read the configuration of `directory` and the headers of its files, and build its program; no weight is
    read.

    `max_context` (None or 0: all that the model allows) cuts `config.max_context`. Raises `ModelError`, and
    `InvalidParameter` for a context that the model cannot serve.
    """
    config = limit_context(read_config(directory), max_context)
    with Checkpoint.open(directory) as checkpoint:
        # config.json is sometimes wrong about the type; the tensors are the fact.
        config = replace(config, dtype=checkpoint.main_dtype)
    return ModelDescription(
        config=config, program=build_program(config), generation=read_generation_defaults(directory)
    )


def load_model(
    directory: str | Path,
    *,
    dtype: str = "auto",
    max_context: int | None = None,
    progress: ProgressListener | None = None,
) -> LoadedModel:
    """Load the model in `directory`.

    `dtype` "auto" is float32 arithmetic, in which the values of bf16 and fp16 checkpoints are exact.
    "bfloat16" and "float16" round the weights to these formats (to nearest, ties to even). `progress` as in
    `load_weights`. Raises `ModelError`, `OutOfMemory` (RoPE tables), and `InvalidParameter` for `dtype` or
    `max_context`.
    """
    chosen = resolve_dtype(dtype)
    described = describe_model(directory, max_context=max_context)
    # Refuses now what would else fail after the weights have been read.
    table_bytes(described.config, described.config.max_context)
    with Checkpoint.open(directory) as checkpoint:
        weights = load_weights(described.program, checkpoint, chosen, progress)
        content_id = checkpoint.content_id()
    return LoadedModel(
        config=described.config,
        program=described.program,
        weights=weights,
        rope=rope_tables(described.config),
        content_id=content_id,
        dtype=chosen,
        generation=described.generation,
    )


def resolve_dtype(dtype: str) -> Literal["float32", "bfloat16", "float16"]:
    """The arithmetic that `dtype` means; "auto" is float32. Raises `InvalidParameter`."""
    if dtype in ("auto", "float32"):
        return "float32"
    if dtype == "bfloat16":
        return "bfloat16"
    if dtype == "float16":
        return "float16"
    raise InvalidParameter("dtype", dtype, "one of " + ", ".join(get_args(DtypeName)))


def load_weights(
    program: Program, checkpoint: Checkpoint, dtype: str = "auto", progress: ProgressListener | None = None
) -> dict[str, NDArray[Any]]:
    """The weights of `program` by name, in their shapes; optional ones may be absent from the checkpoint.

    For float32 ("auto") an array has the type of its sources, or float32 where these differ: the values are
    exact, and a backend widens what it multiplies. For "bfloat16" (`ml_dtypes.bfloat16`) and "float16" they
    are rounded to that type. `progress` is called after each tensor. Raises `ModelError` as `check_weights`,
    and for a value that overflows the type; nothing is allocated before all names and shapes agree.
    """
    chosen = resolve_dtype(dtype)
    check_weights(program, checkpoint)
    wanted = [spec for spec in program.weights if _is_present(spec, checkpoint)]
    total = sum(checkpoint.tensor_bytes(source) for spec in wanted for source in spec.sources)
    weights: dict[str, NDArray[Any]] = {}
    done = 0
    for spec in wanted:
        weights[spec.name] = out = np.empty(spec.shape, _type_of(spec, checkpoint, chosen))
        row = 0
        for source in spec.sources:
            tensor = checkpoint.tensor(source)
            if spec.transposed:
                tensor = tensor.T
            _convert(tensor, out[row : row + tensor.shape[0]], source)
            row += tensor.shape[0]
            checkpoint.release(source)
            done += checkpoint.tensor_bytes(source)
            if progress is not None:
                progress("weights", done, total)
    return weights


def check_weights(program: Program, checkpoint: Checkpoint) -> None:
    """Raise `ModelError` with every tensor that is missing, unexpected or mis-shaped for the program.

    Ignored are the frequencies that old checkpoints store (`rotary_emb.inv_freq`), and an `lm_head.weight`
    that equals the embedding it is tied to (one that differs is refused: it contradicts config.json).
    """
    rows = _source_rows(program)
    problems: list[str] = []
    used: set[str] = set()
    for spec in program.weights:
        used.update(spec.sources)
        if not _is_present(spec, checkpoint):
            continue
        shapes = []
        for i, source in enumerate(spec.sources):
            if source not in checkpoint:
                problems.append(f"missing {source}")
                continue
            shape = checkpoint.shape(source)[::-1] if spec.transposed else checkpoint.shape(source)
            expected = rows.get(spec.name)
            if expected is not None and shape != (expected[i], *spec.shape[1:]):
                problems.append(_misshaped(source, shape, (expected[i], *spec.shape[1:])))
            shapes.append(shape)
        if spec.name not in rows and len(shapes) == len(spec.sources) and not _stack_to(shapes, spec.shape):
            problems.append(f"{spec.name} of shapes {shapes} instead of a stack {list(spec.shape)}")
    for name in checkpoint.names:
        if name in used or name.endswith(_IGNORED_SUFFIX):
            continue
        if name != HEAD:
            problems.append(f"unexpected {name} {list(checkpoint.shape(name))}")
        elif EMBEDDING in checkpoint and not _is_tied_copy(checkpoint):
            problems.append(f"{HEAD} that differs from {EMBEDDING}, though tie_word_embeddings is true")
    if problems:
        shown = "; ".join(problems[:50]) + (f"; and {len(problems) - 50} more" if len(problems) > 50 else "")
        raise ModelError(
            f"weights in {checkpoint.directory} that do not fit config.json: {shown}",
            "all tensors of the model and no others",
        )


def _stack_to(shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    return all(len(shape) == len(wanted) and shape[1:] == wanted[1:] for shape in shapes) and (
        sum(shape[0] for shape in shapes) == wanted[0]
    )


def _misshaped(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return f"{name} of shape {list(found)} instead of {list(wanted)}"


def _is_present(spec: WeightSpec, checkpoint: Checkpoint) -> bool:
    """Whether to load the weight: not if it is optional and the checkpoint has none of its sources."""
    return not spec.optional or any(source in checkpoint for source in spec.sources)


def _source_rows(program: Program) -> dict[str, tuple[int, ...]]:
    """Rows of each source of a weight, where the program tells: a stack of three that feeds RoPE is q, k, v;
    a stack of two under silu_mul is gate and up; one source is the whole. Else only the sum is checked."""
    specs = {spec.name: spec for spec in program.weights}
    result = {spec.name: spec.shape[:1] for spec in program.weights if len(spec.sources) == 1}
    attention = {op.source: op for op in program.ops if isinstance(op, RopeStore)}
    for op in program.ops:
        if not isinstance(op, Linear):
            continue
        for name in (op.weight, op.bias):
            spec = specs.get(name) if name is not None else None
            if spec is None:
                continue
            rope = attention.get(op.out)
            if len(spec.sources) == 3 and rope is not None:
                kv_size = rope.num_kv_heads * rope.head_dim
                result[spec.name] = (rope.num_heads * rope.head_dim, kv_size, kv_size)
            elif len(spec.sources) == 2 and op.epilogue == "silu_mul":
                result[spec.name] = (spec.shape[0] // 2, spec.shape[0] // 2)
    return result


def _is_tied_copy(checkpoint: Checkpoint) -> bool:
    head, embedding = checkpoint.tensor(HEAD), checkpoint.tensor(EMBEDDING)
    if head.shape != embedding.shape or head.ndim != 2:
        return False
    same = all(bool((head[rows] == embedding[rows]).all()) for rows in _row_blocks(head))
    checkpoint.release(HEAD)
    return same


def _row_blocks(tensor: NDArray[Any]) -> Iterator[slice]:
    """Slices of rows that together cover a tensor, each of about `_BLOCK_ELEMENTS` numbers."""
    step = max(1, _BLOCK_ELEMENTS // max(1, tensor[:1].size))
    return (slice(start, start + step) for start in range(0, len(tensor), step))


def _type_of(spec: WeightSpec, checkpoint: Checkpoint, dtype: str) -> np.dtype[Any]:
    if dtype == "float32":
        stored = {checkpoint.dtype(source) for source in spec.sources}
        dtype = stored.pop() if len(stored) == 1 else dtype
    chosen: np.dtype[Any] = np.dtype(_TYPES[dtype])
    return chosen


def _convert(source: NDArray[Any], out: NDArray[Any], name: str) -> None:
    """out = source, rounded to the type of `out` in blocks of rows. Raises `ModelError` for an overflow."""
    if out.dtype in (source.dtype, np.float32):
        out[...] = source
        return
    for rows in _row_blocks(source):
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
