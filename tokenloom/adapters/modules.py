"""Where the modules of a base model lie in its program: the columns of which product, or the embedding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from tokenloom.kernels.program import Embed, Experts, Linear, Program
from tokenloom.models.weight_sources import HEAD

_WEIGHT = ".weight"
_NUMBER = re.compile(r"\.(\d+)\.")


class Place(NamedTuple):
    """One module: outputs [begin, end) of the product with `weight`, which has `inputs` inputs.

    kind "embedding": the rows of `weight` that are looked up, `inputs` tokens and `end` columns, multiplied by
    `factor`. "router": a linear whose product chooses experts. "head": the product that gives the logits, also
    where its weight is that of the embedding. `source` is the tensor of the checkpoint.
    """

    kind: Literal["linear", "router", "head", "embedding"]
    weight: str
    begin: int
    end: int
    inputs: int
    source: str
    factor: float = 1.0

    @property
    def outputs(self) -> int:
        return self.end - self.begin


class Places:
    """The modules that an adapter may change, by their names in transformers (tensor names without ".weight").

    `rows` are those of `tokenloom.models.weight_sources.source_rows`.
    """

    def __init__(self, program: Program, rows: Mapping[str, tuple[int, ...]]) -> None:
        self.by_module: dict[str, Place] = {}
        self._specs = {spec.name: spec for spec in program.weights}
        self._unsplit: set[str] = set()
        self._of_experts: set[str] = set()
        routers = program.routers()
        for op in program.ops:
            if isinstance(op, Linear):
                self._add_stack(op.weight, rows, "router" if op.weight in routers else "linear")
            elif isinstance(op, Embed):
                vocab, width = self._specs[op.weight].shape
                source = self._specs[op.weight].sources[0]
                module = source.removesuffix(_WEIGHT)
                self.by_module[module] = Place("embedding", op.weight, 0, width, vocab, source, op.scale)
            elif isinstance(op, Experts):
                for name in (*op.gate_up, *op.down):
                    self._of_experts.update(map(_module, self._specs[name].sources))
        outputs, inputs = self._specs[program.head.weight].shape
        # A tied head is a module of its own in transformers, over the same tensor.
        source = self._specs[program.head.weight].sources[0]
        tied = any(isinstance(op, Embed) and op.weight == program.head.weight for op in program.ops)
        head = _module(HEAD if tied else source)
        self.by_module[head] = Place("head", program.head.weight, 0, outputs, inputs, source)

    def _add_stack(
        self, weight: str, rows: Mapping[str, tuple[int, ...]], kind: Literal["linear", "router"]
    ) -> None:
        spec = self._specs[weight]
        split = rows.get(weight)
        if split is None or len(split) != len(spec.sources) or sum(split) != spec.shape[0]:
            self._unsplit.update(map(_module, spec.sources))
            return
        begin = 0
        for source, count in zip(spec.sources, split, strict=True):
            self.by_module[_module(source)] = Place(kind, weight, begin, begin + count, spec.shape[1], source)
            begin += count

    def why_not(self, module: str) -> str:
        """Why `module` is none of them, to go behind its name."""
        if module in self._of_experts or ".experts" in module:
            return "a module of experts"
        if module in self._unsplit:
            return "a part of a stack whose parts are not known"
        number = _NUMBER.search(module)
        if number is not None and f"{module[: number.start()]}.0.{module[number.end() :]}" in self.by_module:
            return f"layer {number[1][:20]}, which the model does not have"
        return "no linear, head or embedding of the model"


def _module(source: str) -> str:
    return source.removesuffix(_WEIGHT)
