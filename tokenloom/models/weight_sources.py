"""What a checkpoint holds for each weight of a program: views of its files, or matrices in 8 or 4 bits.

This is the seam between files and backends. `weight_sources` hands out one weight after the other, in the
forms of `tokenloom.quantization.weights`, and gives the pages of the file back as soon as the next one is asked
for; a backend widens or packs what it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.kernels.program import PAIRED, Embed, Experts, Linear, Program, RopeStore, WeightSpec
from tokenloom.models.checkpoint import Checkpoint
from tokenloom.quantization import round_to_nearest
from tokenloom.quantization.weights import Int4Matrix, Int8Matrix, int4_bytes, int8_bytes, row_blocks

WeightFormat = Literal["auto", "int8", "int4"]
"""auto: as in the checkpoint. int8, int4: rounded when it is loaded."""

WeightSource = NDArray[Any] | Int8Matrix | Int4Matrix

ProgressListener = Callable[[str, int, int], None]
"""Hears (stage, bytes done, bytes in all) as loading goes on."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_KV_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")
_FLOATS = ("float32", "bfloat16", "float16")


class SourcedWeight(NamedTuple):
    """A weight of the program and its sources, which are stacked along axis 0 to its shape.

    A source is an array, mostly a view of the mapped file ([rows, ...] of float32, bfloat16 or float16; for a
    transposed spec already turned; int32 [K] for an order of inputs), or a matrix in 8 or 4 bits. The sources of
    one weight may be of different kinds where a checkpoint leaves some linears as they were. They are valid until
    the next weight is asked for.
    """

    spec: WeightSpec
    sources: tuple[WeightSource, ...]


def weight_sources(
    program: Program,
    checkpoint: Checkpoint,
    weights: str = "auto",
    progress: ProgressListener | None = None,
) -> Iterator[SourcedWeight]:
    """The weights of `program` in its order; optional ones that the checkpoint lacks are left out.

    `weights` "int8" or "int4" rounds linears, head and embedding as `roundings` says. `progress` is called for
    each source once its weight is done with. Raises `ModelError` as `check_weights`, before the first weight
    is read, and for values that cannot be unpacked or rounded; `InvalidParameter` as `resolve_weights`.
    """
    chosen = roundings(program, resolve_weights(weights, checkpoint))
    check_weights(program, checkpoint)
    wanted = [spec for spec in program.weights if _is_present(spec, checkpoint)]
    return _read(wanted, checkpoint, chosen, progress)


class SourceForm(NamedTuple):
    """What a source gives: `dtype` float32, bfloat16, float16, int8, int4 in groups of `group` inputs, or int32."""

    dtype: str
    group: int = 0


def source_forms(program: Program, checkpoint: Checkpoint) -> dict[str, tuple[SourceForm, ...]]:
    """The stored forms of the sources of each weight that `weight_sources` hands out, in the same order; the
    checkpoint fits the program (`check_weights`)."""
    return {
        spec.name: tuple(SourceForm(*checkpoint.source_form(source)) for source in spec.sources)
        for spec in program.weights
        if _is_present(spec, checkpoint)
    }


def _read(
    wanted: list[WeightSpec],
    checkpoint: Checkpoint,
    chosen: Mapping[str, Literal["int8", "int4"]],
    progress: ProgressListener | None,
) -> Iterator[SourcedWeight]:
    total = sum(checkpoint.source_bytes(source) for spec in wanted for source in spec.sources)
    done = 0
    for spec in wanted:
        yield SourcedWeight(spec, tuple(_source(spec, name, checkpoint, chosen) for name in spec.sources))
        for name in spec.sources:
            checkpoint.release_source(name)
            done += checkpoint.source_bytes(name)
            if progress is not None:
                progress("weights", done, total)


def _source(
    spec: WeightSpec, name: str, checkpoint: Checkpoint, chosen: Mapping[str, Literal["int8", "int4"]]
) -> WeightSource:
    found = checkpoint.source(name)
    if isinstance(found, Int8Matrix | Int4Matrix):
        return found
    # Quantised linears are [N, K] in any case: the tools turn what is stored the other way.
    view = found.T if spec.transposed and checkpoint.linear_format(name) is None else found
    rounding = chosen.get(spec.name)
    if rounding == "int8":
        return round_to_nearest.int8(view, name)
    return view if rounding is None else round_to_nearest.int4(view, name=name)


def resolve_weights(weights: str, checkpoint: Checkpoint) -> WeightFormat:
    """`weights`, checked. Raises `InvalidParameter` for an unknown format, and for int8 and int4 where
    linears of the checkpoint are in such a form already."""
    quantization = checkpoint.quantization
    if quantization is not None and quantization.is_final and weights in ("int8", "int4"):
        raise InvalidParameter(
            "weights",
            weights,
            f"auto: the checkpoint is quantised already ({quantization.method})",
        )
    if weights == "auto":
        return "auto"
    if weights == "int8":
        return "int8"
    if weights == "int4":
        return "int4"
    raise InvalidParameter("weights", weights, "one of " + ", ".join(get_args(WeightFormat)))


def roundings(program: Program, weights: WeightFormat) -> dict[str, Literal["int8", "int4"]]:
    """The format of each weight that is rounded, by name: linears get the chosen one; embedding and head, on
    whose rows every token depends directly, get int8 in both. What chooses experts stays as it is: a choice
    is no matter of degree."""
    if weights == "auto":
        return {}
    routers = program.routers()
    result = {name: weights for name, _ in program.products() if name not in routers}
    outer = {op.weight for op in program.ops if isinstance(op, Embed)} | {program.head.weight}
    return result | dict.fromkeys(outer, "int8")


def stored_bytes(program: Program, checkpoint: Checkpoint, weights: WeightFormat = "auto") -> int:
    """Bytes of the numbers of all weights in their format: as in the checkpoint, or rounded."""
    chosen = roundings(program, weights)
    total = 0
    for spec in program.weights:
        rounding = chosen.get(spec.name)
        if rounding is None:
            total += sum(map(checkpoint.source_bytes, spec.sources))
        elif rounding == "int8":
            total += int8_bytes(spec.shape)
        else:
            total += int4_bytes(spec.shape, round_to_nearest.DEFAULT_GROUP)
    return total


# --- does the checkpoint fit the program? ----------------------------------------------------------------


def check_weights(program: Program, checkpoint: Checkpoint) -> None:
    """Raise `ModelError` with every tensor that is missing, unexpected, mis-shaped or of the wrong kind.

    Ignored are the frequencies that old checkpoints store (`rotary_emb.inv_freq`), an `lm_head.weight` that
    equals the embedding it is tied to (one that differs is refused: it contradicts config.json), biases of
    zeros that some GPTQ tools add to every linear, and the scales with which others would round K and V.
    """
    problems: list[str] = []
    used: set[str] = set()
    rows = _source_rows(program)
    quantizable = {name for name, _ in program.products()} - program.routers()
    quantizable -= {op.weight for op in program.ops if isinstance(op, Embed)}
    for spec in program.weights:
        used.update(spec.sources)
        for source in spec.sources:
            used.update(checkpoint.source_tensors(source))
        if _is_present(spec, checkpoint):
            problems += _spec_problems(spec, checkpoint, rows.get(spec.name), spec.name in quantizable)
    if not problems:
        problems += _expert_problems(program, checkpoint)
    for name in checkpoint.names:
        if name in used or name.endswith(_IGNORED_SUFFIX) or _is_empty_bias(name, checkpoint):
            continue
        if checkpoint.quantization is not None and name.endswith(_KV_SCALES):
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


def _spec_problems(
    spec: WeightSpec, checkpoint: Checkpoint, rows: tuple[int, ...] | None, quantizable: bool
) -> list[str]:
    problems: list[str] = []
    shapes: list[tuple[int, ...]] = []
    for i, source in enumerate(spec.sources):
        found = [] if spec.integers else _kind_problems(source, checkpoint, quantizable)
        if found:
            problems += found
            continue
        if spec.input_order is None and checkpoint.input_order(source) is not None:
            problems.append(
                f"{source} with reordered inputs (desc_act), which no other op than a linear offers"
            )
        shape = checkpoint.source_shape(source)
        if spec.transposed and checkpoint.linear_format(source) is None:
            shape = shape[::-1]
        if rows is not None and shape != (rows[i], *spec.shape[1:]):
            problems.append(f"{source} of shape {list(shape)} instead of {[rows[i], *spec.shape[1:]]}")
        shapes.append(shape)
    if rows is None and len(shapes) == len(spec.sources) and not _stack_to(shapes, spec.shape):
        problems.append(f"{spec.name} of shapes {shapes} instead of a stack {list(spec.shape)}")
    return problems


def _kind_problems(source: str, checkpoint: Checkpoint, quantizable: bool) -> list[str]:
    """What is wrong with a source before its shape can be compared: missing, of the wrong type, or quantised
    against what config.json says."""
    quantization, stored = checkpoint.quantization, checkpoint.linear_format(source)
    module = source.removesuffix(".weight")
    named = quantization is None or quantization.format_of(module) is not None
    if quantization is None or stored is None:
        if source not in checkpoint:
            mains = [name for name in (f"{module}.qweight", f"{module}.weight_packed") if name in checkpoint]
            packed = mains and quantization is None
            return [
                f"missing {source}"
                + (f" ({mains[0]} needs a quantization_config in config.json)" if packed else "")
            ]
        form, _ = checkpoint.source_form(source)
        if form not in _FLOATS:
            return [f"{source} of dtype {form} instead of {', '.join(_FLOATS)}"]
        if quantization is not None and quantizable and named and not quantization.by_type:
            return [f"{source} that is not quantised, though quantization_config does not except it"]
        return []
    parts = checkpoint.source_tensors(source)
    missing = [f"missing {name}" for name in parts if name not in checkpoint]
    if missing:
        return missing
    main = f"{module}.{stored.main}"
    if source in checkpoint and source != main:
        return [f"{source} beside {main}"]
    if not quantizable:
        return [f"{main} that is quantised, which only linears may be"]
    if not named and not quantization.by_type:
        return [f"{main}, though quantization_config leaves {module} as it was"]
    for name in parts:
        wanted = stored.dtypes(name.rpartition(".")[2])
        if wanted and checkpoint.dtype(name) not in wanted:
            return [f"{name} of dtype {checkpoint.dtype(name)} instead of {', '.join(wanted)}"]
    try:
        checkpoint.source_shape(source)
    except ModelError as error:
        return [f"{error.found} instead of {error.supported}"]
    return []


def _expert_problems(program: Program, checkpoint: Checkpoint) -> list[str]:
    """One product runs over the experts of a layer: they are all in 8 bits, in the same 4 bits, or in floats."""
    sources = {spec.name: spec.sources for spec in program.weights}

    def form(weight: str) -> tuple[str, int]:
        forms = {checkpoint.source_form(source) for source in sources[weight]}
        # What is not alike within a stack is unpacked to floats, as it is packed.
        alone = forms.pop() if len(forms) == 1 else ("float", 0)
        return ("float", 0) if alone[0] in _FLOATS else alone

    problems: list[str] = []
    for op in program.ops:
        for names in (op.gate_up, op.down) if isinstance(op, Experts) else ():
            first = form(names[0])
            other = next((name for name in names if form(name) != first), None)
            if other is not None:
                problems.append(
                    f"{sources[other][0]} stored as {form(other)[0]} and {sources[names[0]][0]} as {first[0]}: "
                    "the experts of a layer must be alike"
                )
    return problems


def _stack_to(shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    return all(len(shape) == len(wanted) and shape[1:] == wanted[1:] for shape in shapes) and (
        sum(shape[0] for shape in shapes) == wanted[0]
    )


def _is_present(spec: WeightSpec, checkpoint: Checkpoint) -> bool:
    """Whether to load the weight: not if it is optional and the checkpoint has none of its sources."""
    return not spec.optional or any(checkpoint.source_tensors(source) for source in spec.sources)


def _source_rows(program: Program) -> dict[str, tuple[int, ...]]:
    """Rows of each source of a weight, where the program tells: a stack of three that feeds RoPE is q, k, v;
    a stack of two under silu_mul is gate and up; one source is the whole. Else only the sum is checked."""
    specs = {spec.name: spec for spec in program.weights}
    result = {spec.name: spec.shape[:1] for spec in program.weights if len(spec.sources) == 1}
    attention = {op.source: op for op in program.ops if isinstance(op, RopeStore)}
    for expert in (name for op in program.ops if isinstance(op, Experts) for name in op.gate_up):
        if len(specs[expert].sources) == 2:
            result[expert] = (specs[expert].shape[0] // 2, specs[expert].shape[0] // 2)
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
            elif len(spec.sources) == 2 and op.epilogue in PAIRED:
                result[spec.name] = (spec.shape[0] // 2, spec.shape[0] // 2)
    return result


def _is_empty_bias(name: str, checkpoint: Checkpoint) -> bool:
    """Whether the tensor is a bias of zeros of a quantised linear."""
    module = name.removesuffix(".bias")
    if module == name or checkpoint.linear_format(f"{module}.weight") is None:
        return False
    return not checkpoint.tensor(name).any()


def _is_tied_copy(checkpoint: Checkpoint) -> bool:
    head, embedding = checkpoint.source(HEAD), checkpoint.source(EMBEDDING)
    if not isinstance(head, np.ndarray) or not isinstance(embedding, np.ndarray):
        return False
    if head.shape != embedding.shape or head.ndim != 2:
        return False
    same = all(bool((head[rows] == embedding[rows]).all()) for rows in row_blocks(head.shape))
    checkpoint.release(HEAD)
    return same
