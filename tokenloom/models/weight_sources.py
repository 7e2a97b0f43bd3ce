"""What a checkpoint holds for each weight of a program: views of its files, or matrices in 8 or 4 bits.

This is the seam between files and backends. `weight_sources` hands out one weight after the other, in the
forms of `tokenloom.quantization.weights`, and gives the pages of the file back as soon as the next one is asked
for; a backend widens or packs what it gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.kernels.program import PAIRED, Embed, Experts, Linear, Program, RopeStore, WeightSpec
from tokenloom.models.weight_files import WeightFiles
from tokenloom.quantization import gguf_blocks, round_to_nearest
from tokenloom.quantization.gguf_blocks import BlockMatrix
from tokenloom.quantization.weights import (
    Int4Matrix,
    Int8Matrix,
    int4_bytes,
    int8_bytes,
    num_groups,
    row_blocks,
)

WeightFormat = Literal["auto", "float", "int8", "int4"]
"""auto: as in the checkpoint, or in the nearest of our forms. float: what is quantised is widened to the values
that it has. int8, int4: rounded when it is loaded."""

WeightSource = NDArray[Any] | Int8Matrix | Int4Matrix

ProgressListener = Callable[[str, int, int], None]
"""Hears (stage, bytes done, bytes in all) as loading goes on."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_HEADS = (HEAD, "embed_out.weight")
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_MASKS = (".attention.bias", ".attn.bias")
_MASKED = (".attention.masked_bias", ".attn.masked_bias")
_KV_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")
_FLOATS = ("float32", "bfloat16", "float16")


class SourcedWeight(NamedTuple):
    """A weight of the program and its sources, which are stacked along axis 0 to its shape.

    A source is an array, mostly a view of the mapped file ([rows, ...] of float32, bfloat16 or float16; for a
    transposed spec already turned, a copy part by part for an interleaved one; int32 [K] for an order of inputs), or
    a matrix in 8 or 4 bits. The sources of one weight may be of different kinds where a checkpoint leaves some
    linears as they were. They are valid until the next weight is asked for.
    """

    spec: WeightSpec
    sources: tuple[WeightSource, ...]


def weight_sources(
    program: Program,
    checkpoint: WeightFiles,
    weights: str = "auto",
    progress: ProgressListener | None = None,
    *,
    packs: bool = False,
) -> Iterator[SourcedWeight]:
    """The weights of `program` in its order; optional ones that the checkpoint lacks are left out.

    `weights` "int8" or "int4" rounds linears, head and embedding as `roundings` says; arrays are left alone where
    the caller `packs`, and with it rounds, them itself. Blocks of GGUF become what `block_forms` says. `progress`
    is called for each source once its weight is done with. Raises `ModelError` as `check_weights`, before the
    first weight is read, and for values that cannot be unpacked or rounded; `InvalidParameter` as
    `resolve_weights`.
    """
    chosen = resolve_weights(weights, checkpoint)
    check_weights(program, checkpoint)
    wanted = [spec for spec in program.weights if _is_present(spec, checkpoint)]
    forms = source_forms(program, checkpoint, chosen)
    return _read(wanted, checkpoint, {} if packs else roundings(program, chosen), forms, progress)


class SourceForm(NamedTuple):
    """What a source is before anything is rounded at load: `dtype` float32, bfloat16, float16, int8, int4 in groups
    of `group` inputs, or int32."""

    dtype: str
    group: int = 0


def source_forms(
    program: Program, checkpoint: WeightFiles, weights: WeightFormat = "auto"
) -> dict[str, tuple[SourceForm, ...]]:
    """The forms of the sources of each weight that `weight_sources` hands out where the caller packs them, in the
    same order; the checkpoint fits the program (`check_weights`)."""
    blocks = block_forms(program, checkpoint, weights)
    return {
        spec.name: tuple(_form(source, checkpoint, weights, blocks.get(spec.name)) for source in spec.sources)
        for spec in program.weights
        if _is_present(spec, checkpoint)
    }


def _form(
    source: str, checkpoint: WeightFiles, weights: WeightFormat, blocks: SourceForm | None
) -> SourceForm:
    if blocks is not None and checkpoint.blocks(source) is not None:
        return blocks
    if weights == "float" and checkpoint.linear_format(source) is not None:
        return SourceForm("float32")
    return SourceForm(*checkpoint.source_form(source))


def block_forms(
    program: Program, checkpoint: WeightFiles, weights: WeightFormat = "auto"
) -> dict[str, SourceForm]:
    """What the sources in blocks of each weight become, for the weights that have any.

    4 bits stay 4 bits where all sources of a linear have them, and all else that is multiplied or looked up
    becomes int8, an embedding always. What is stacked with plain sources, added or multiplied elsewhere, or chooses
    experts, is widened, as is everything for "float".
    """
    rounded = roundings(program, weights)
    tables = {op.weight for op in program.ops if isinstance(op, Embed)}
    matrices = ({name for name, _ in program.products()} | tables) - program.routers()
    forms: dict[str, SourceForm] = {}
    for spec in program.weights:
        found = [checkpoint.blocks(source) for source in spec.sources]
        blocks = [matrix for matrix in found if matrix is not None]
        if not blocks:
            continue
        if weights == "float" or spec.name not in matrices or len(blocks) < len(found):
            forms[spec.name] = SourceForm("float32")
        elif spec.name in tables or rounded.get(spec.name) == "int8":
            forms[spec.name] = SourceForm("int8")
        elif all(matrix.has_four_bits for matrix in blocks):
            forms[spec.name] = SourceForm("int4", gguf_blocks.GROUP)
        elif rounded.get(spec.name) == "int4":
            forms[spec.name] = SourceForm("int4", round_to_nearest.DEFAULT_GROUP)
        else:
            forms[spec.name] = SourceForm("int8")
    return forms


def _read(
    wanted: list[WeightSpec],
    checkpoint: WeightFiles,
    chosen: Mapping[str, Literal["int8", "int4"]],
    forms: Mapping[str, tuple[SourceForm, ...]],
    progress: ProgressListener | None,
) -> Iterator[SourcedWeight]:
    total = sum(checkpoint.source_bytes(source) for spec in wanted for source in spec.sources)
    done = 0
    for spec in wanted:
        yield SourcedWeight(
            spec,
            tuple(
                _source(spec, name, checkpoint, chosen, form)
                for name, form in zip(spec.sources, forms[spec.name], strict=True)
            ),
        )
        for name in spec.sources:
            checkpoint.release_source(name)
            done += checkpoint.source_bytes(name)
            if progress is not None:
                progress("weights", done, total)


def _source(
    spec: WeightSpec,
    name: str,
    checkpoint: WeightFiles,
    chosen: Mapping[str, Literal["int8", "int4"]],
    form: SourceForm,
) -> WeightSource:
    found = checkpoint.source(name)
    # Quantised linears and blocks are [N, K] in any case: the tools turn what is stored the other way.
    if isinstance(found, BlockMatrix) and not spec.interleaved and form.dtype in ("int8", "int4"):
        return found.int8() if form.dtype == "int8" else found.int4(form.group)
    if isinstance(found, Int8Matrix | Int4Matrix) and form.dtype in ("int8", "int4"):
        return found.take(part_by_part(spec)) if spec.interleaved else found
    if isinstance(found, BlockMatrix | Int8Matrix | Int4Matrix):
        view = found.dequantize()
    else:
        view = found.T if spec.transposed and not _is_quantized(name, checkpoint) else found
    if spec.interleaved:
        view = np.take(view, part_by_part(spec), axis=0)
    rounding = chosen.get(spec.name)
    if rounding == "int8":
        return round_to_nearest.int8(view, name)
    return view if rounding is None else round_to_nearest.int4(view, name=name)


def part_by_part(spec: WeightSpec) -> NDArray[np.intp]:
    """[rows]: the row of the source that each row of an interleaved weight is. A row is an output, so scales and
    zeros of a quantised one move with it."""
    groups = np.arange(spec.shape[0]).reshape(-1, sum(spec.interleaved))
    parts = np.split(groups, np.cumsum(spec.interleaved)[:-1], axis=1)
    return np.concatenate([part.ravel() for part in parts])


def resolve_weights(weights: str, checkpoint: WeightFiles) -> WeightFormat:
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
    if weights == "float":
        return "float"
    if weights == "int8":
        return "int8"
    if weights == "int4":
        return "int4"
    raise InvalidParameter("weights", weights, "one of " + ", ".join(get_args(WeightFormat)))


def roundings(program: Program, weights: WeightFormat) -> dict[str, Literal["int8", "int4"]]:
    """The format of each weight that is rounded, by name: linears get the chosen one; embedding and head, on
    whose rows every token depends directly, get int8 in both. What chooses experts stays as it is: a choice
    is no matter of degree."""
    if weights in ("auto", "float"):
        return {}
    linear: Literal["int8", "int4"] = "int8" if weights == "int8" else "int4"
    routers = program.routers()
    result = {name: linear for name, _ in program.products() if name not in routers}
    outer = {op.weight for op in program.ops if isinstance(op, Embed)} | {program.head.weight}
    return result | dict.fromkeys(outer, "int8")


def stored_bytes(program: Program, checkpoint: WeightFiles, weights: WeightFormat = "auto") -> int:
    """Bytes of the numbers of all weights in their format: as in the checkpoint, rounded, widened, or what blocks
    become."""
    chosen = roundings(program, weights)
    blocks = block_forms(program, checkpoint, weights)
    total = 0
    for spec in program.weights:
        rounding: str | None = chosen.get(spec.name)
        group = round_to_nearest.DEFAULT_GROUP
        form = blocks.get(spec.name)
        if form is not None and form.dtype != "float32":
            rounding, group = form
        elif rounding is None and (
            form is not None or (weights == "float" and _has_linears(spec, checkpoint))
        ):
            rounding = "float32"
        if rounding == "float32":
            total += 4 * math.prod(spec.shape)
        elif rounding is None:
            total += sum(map(checkpoint.source_bytes, spec.sources))
        elif rounding == "int8":
            total += int8_bytes(spec.shape)
        else:
            total += int4_bytes(spec.shape, group)
    return total


def _has_linears(spec: WeightSpec, checkpoint: WeightFiles) -> bool:
    return any(checkpoint.linear_format(source) is not None for source in spec.sources)


def reading_bytes(program: Program, checkpoint: WeightFiles, weights: WeightFormat) -> int:
    """Bytes that the sources of one weight take at most which are no views of the files: quantised matrices with a
    byte a number, widened ones, and arrays that a packer copies since they are stored the other way."""
    forms = source_forms(program, checkpoint, weights)
    return max(
        sum(
            _reading_bytes(checkpoint, source, form)
            for source, form in zip(spec.sources, forms[spec.name], strict=True)
        )
        for spec in program.weights
        if spec.name in forms
    )


def _reading_bytes(checkpoint: WeightFiles, source: str, form: SourceForm) -> int:
    shape = checkpoint.source_shape(source)
    size = math.prod(shape)
    if form.dtype == "int8":
        return int8_bytes(shape)
    if form.dtype == "int4":
        return size + 3 * shape[0] * num_groups(shape[1], form.group)
    if checkpoint.blocks(source) is not None:
        return 4 * size
    if checkpoint.linear_format(source) is not None:
        # Widened from a byte a number, with a scale for some of them.
        return 5 * size + 3 * size // gguf_blocks.GROUP + 4 * shape[0]
    return checkpoint.source_bytes(source)


def _is_quantized(source: str, checkpoint: WeightFiles) -> bool:
    return checkpoint.linear_format(source) is not None or checkpoint.blocks(source) is not None


# --- does the checkpoint fit the program? ----------------------------------------------------------------


def check_weights(program: Program, checkpoint: WeightFiles) -> None:
    """Raise `ModelError` with every tensor that is missing, unexpected, mis-shaped or of the wrong kind.

    Ignored are the frequencies and causal masks that old checkpoints store (`rotary_emb.inv_freq`,
    `attention.bias` [1, 1, n, n], `attention.masked_bias`), a head that equals the embedding it is tied to (one
    that differs is refused: it contradicts config.json), biases of zeros that some GPTQ tools add to every linear,
    and the scales with which others would round K and V.
    """
    problems: list[str] = []
    used: set[str] = set()
    rows = source_rows(program)
    embedding = next((op.weight for op in program.ops if isinstance(op, Embed)), EMBEDDING)
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
        if _is_mask(name, checkpoint.shape(name)):
            continue
        if checkpoint.quantization is not None and name.endswith(_KV_SCALES):
            continue
        if name not in _HEADS or program.head.weight != embedding:
            problems.append(f"unexpected {name} {list(checkpoint.shape(name))}")
        elif embedding in checkpoint and not _is_tied_copy(checkpoint, name, embedding):
            problems.append(f"{name} that differs from {embedding}, though tie_word_embeddings is true")
    if problems:
        shown = "; ".join(problems[:50]) + (f"; and {len(problems) - 50} more" if len(problems) > 50 else "")
        raise ModelError(
            f"weights in {checkpoint.directory} that do not fit the configuration: {shown}",
            "all tensors of the model and no others",
        )


def _spec_problems(
    spec: WeightSpec, checkpoint: WeightFiles, rows: tuple[int, ...] | None, quantizable: bool
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
        if spec.transposed and not _is_quantized(source, checkpoint):
            shape = shape[::-1]
        if rows is not None and shape != (rows[i], *spec.shape[1:]):
            problems.append(f"{source} of shape {list(shape)} instead of {[rows[i], *spec.shape[1:]]}")
        shapes.append(shape)
    if rows is None and len(shapes) == len(spec.sources) and not _stack_to(shapes, spec.shape):
        problems.append(f"{spec.name} of shapes {shapes} instead of a stack {list(spec.shape)}")
    return problems


def _kind_problems(source: str, checkpoint: WeightFiles, quantizable: bool) -> list[str]:
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


def _expert_problems(program: Program, checkpoint: WeightFiles) -> list[str]:
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


def _is_present(spec: WeightSpec, checkpoint: WeightFiles) -> bool:
    """Whether to load the weight: not if it is optional and the checkpoint has none of its sources."""
    return not spec.optional or any(checkpoint.source_tensors(source) for source in spec.sources)


def source_rows(program: Program) -> dict[str, tuple[int, ...]]:
    """Rows of each source of a weight by the weight's name, where the program tells: a stack of three that feeds
    RoPE is q, k, v; a stack of two under silu_mul is gate and up; one source is the whole. A weight whose split is
    not known is left out."""
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


def _is_empty_bias(name: str, checkpoint: WeightFiles) -> bool:
    """Whether the tensor is a bias of zeros of a quantised linear."""
    module = name.removesuffix(".bias")
    if module == name or checkpoint.linear_format(f"{module}.weight") is None:
        return False
    return not checkpoint.tensor(name).any()


def _is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a causal mask [1, 1, n, n], or the number that stood for minus infinity."""
    if name.endswith(_MASKED):
        return shape in ((), (1,))
    return name.endswith(_MASKS) and len(shape) == 4 and shape == (1, 1, shape[2], shape[2])


def _is_tied_copy(checkpoint: WeightFiles, head_name: str, embedding_name: str) -> bool:
    head, embedding = checkpoint.source(head_name), checkpoint.source(embedding_name)
    if not isinstance(head, np.ndarray) or not isinstance(embedding, np.ndarray):
        return False
    if head.shape != embedding.shape or head.ndim != 2:
        return False
    same = all(bool((head[rows] == embedding[rows]).all()) for rows in row_blocks(head.shape))
    checkpoint.release(head_name)
    return same
