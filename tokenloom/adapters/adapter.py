"""A low-rank adapter over the program of its base model (LoRA, Hu et al. 2022).

```
module of transformers   a [rank, inputs], b [outputs, rank]    y += scale * ((x @ a.T) @ b.T)
block of the program     the same over the columns [begin, end) of one product, which may stack several modules
```
An adapter is identified by its content: equal modules have equal ids, whatever the files were called.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tokenloom.adapters.modules import Place, Places
from tokenloom.adapters.peft_config import MAX_RANK
from tokenloom.errors import ModelError
from tokenloom.kernels.program import Program
from tokenloom.models.json_fields import shorten
from tokenloom.models.weight_sources import part_by_part

MAX_PROBLEMS = 50
"""Problems that one error lists."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """One module as it is stored: `name` in transformers, a [rank, inputs] and b [outputs, rank], each float32,
    bfloat16 (ml_dtypes) or float16 (of an embedding: a [rank, vocab], b [width, rank]); `scale` multiplies."""

    name: str
    a: NDArray[Any]
    b: NDArray[Any]
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class AdapterBlock:
    """An update of the output columns [begin, end) of the product with `weight`, a weight of the program.

    y[:, begin:end] += scale * ((x @ a.T) @ b.T), with a [rank, inputs] and b [end - begin, rank] as stored. A
    block over `program.head.weight` changes the head only, also where the embedding shares its weight.
    """

    weight: str
    begin: int
    end: int
    a: NDArray[Any]
    b: NDArray[Any]
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingBlock:
    """x += scale * b @ a[:, token] for each embedded token, with a [rank, vocab] and b [width, rank] as stored.

    `scale` contains the factor of the program's `Embed`, so x is what that op wrote.
    """

    a: NDArray[Any]
    b: NDArray[Any]
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter that fits a program.

    `content_id` is that of `modules`, which are sorted by name; `blocks` (in the order of the program's products)
    and `embedding` are the same arrays over the program. `num_bytes` counts the bytes of all arrays.
    """

    content_id: str
    base_model_name: str | None
    max_rank: int
    num_bytes: int
    modules: tuple[LoraModule, ...]
    blocks: tuple[AdapterBlock, ...]
    embedding: EmbeddingBlock | None


def place_modules(
    modules: Iterable[LoraModule],
    program: Program,
    *,
    source_rows: Mapping[str, tuple[int, ...]],
    base_model_name: str | None = None,
) -> Adapter:
    """The adapter that `modules` are over `program`. Raises `ModelError` listing what does not fit."""
    ordered = tuple(sorted(modules, key=lambda module: module.name))
    places = Places(program, source_rows)
    problems: list[str] = [] if ordered else ["no module"]
    for module in ordered:
        problems += shape_problems(module.name, module.a.shape, module.b.shape, places)
    if problems:
        refuse("an adapter", problems)
    blocks: list[AdapterBlock] = []
    embedding: EmbeddingBlock | None = None
    specs = {spec.name: spec for spec in program.weights}
    for module in ordered:
        place = places.by_module[module.name]
        if place.kind == "embedding":
            embedding = EmbeddingBlock(module.a, module.b, module.scale * place.factor)
            continue
        spec = specs[place.weight]
        if spec.input_order is not None:
            refuse(
                "an adapter",
                [f"{module.name}, whose inputs the checkpoint stores in another order (act-order)"],
            )
        # The rows of a fused tensor move when it is loaded, and with them what is added to them.
        b = module.b[part_by_part(spec)] if spec.interleaved else module.b
        blocks.append(AdapterBlock(place.weight, place.begin, place.end, module.a, b, module.scale))
    order = {weight: number for number, (weight, _) in enumerate(program.products())}
    return Adapter(
        content_id=content_id(ordered),
        base_model_name=base_model_name,
        max_rank=max(len(module.a) for module in ordered),
        num_bytes=sum(module.a.nbytes + module.b.nbytes for module in ordered),
        modules=ordered,
        blocks=tuple(sorted(blocks, key=lambda block: (order[block.weight], block.begin))),
        embedding=embedding,
    )


def content_id(modules: Iterable[LoraModule]) -> str:
    """Hex blake2b (128 bits) of what changes outputs: per module, sorted, its name, rank, scale, and types,
    shapes and bytes of its tensors."""
    hasher = hashlib.blake2b(b"tokenloom.adapter.1\n", digest_size=16)
    for module in sorted(modules, key=lambda module: module.name):
        forms = [[array.dtype.name, list(array.shape)] for array in (module.a, module.b)]
        label = json.dumps([module.name, len(module.a), float(module.scale).hex(), *forms])
        hasher.update(label.encode("ascii") + b"\n")
        for array in (module.a, module.b):
            hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def shape_problems(
    module: str, a: Sequence[int], b: Sequence[int], places: Places, rank: int | None = None
) -> list[str]:
    """What is wrong with the shapes of the tensors of `module`; `rank`: what its rank must be."""
    place = places.by_module.get(module)
    if place is None:
        return [f"{shorten(module)}: {places.why_not(module)}"]
    if rank is None:
        rank = a[0] if len(a) == 2 else 0
    if not 1 <= rank <= MAX_RANK:
        return [f"{module} of rank {rank} instead of 1 to {MAX_RANK}"]
    wanted = {"A": (a, [rank, place.inputs]), "B": (b, [place.outputs, rank])}
    return [
        f"{lora_key(module, part, place)} of shape {list(found)} instead of {needed}"
        for part, (found, needed) in wanted.items()
        if list(found) != needed
    ]


def lora_key(module: str, part: str, place: Place) -> str:
    """What peft calls tensor `part` ("A" or "B") of a module, less the prefix of all."""
    return f"{module}.lora_embedding_{part}" if place.kind == "embedding" else f"{module}.lora_{part}.weight"


def refuse(what: str, problems: Sequence[str]) -> NoReturn:
    """Raise the `ModelError` that lists `problems`."""
    more = len(problems) - MAX_PROBLEMS
    shown = "; ".join(problems[:MAX_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    raise ModelError(
        f"{what} that does not fit: {shown}",
        "LoRA tensors of linears, head and embedding of the base model, as adapter_config.json says",
    )
