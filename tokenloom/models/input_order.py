"""Linears whose inputs a checkpoint keeps in another order (GPTQ's act-order): a pass over the finished program.

4-bit weights hold a scale for some consecutive inputs. Where a checkpoint puts inputs into groups by the size of
their activations, the columns of the weight are stored sorted by group, and the input row is gathered in the same
order before the product. No family knows of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tokenloom.errors import ModelError
from tokenloom.kernels.program import BufferSpec, Gather, Linear, Op, Program, WeightSpec
from tokenloom.kernels.program_check import check_program
from tokenloom.models.checkpoint import INPUT_ORDER
from tokenloom.models.weight_files import WeightFiles


def order_inputs(program: Program, checkpoint: WeightFiles) -> Program:
    """`program` with a `Gather` before each linear, and before the head, whose inputs `checkpoint` reorders.

    The linears that are stacked in one weight must share one order, since they read one row. Raises `ModelError`
    where they do not, and for orders that cannot be.
    """
    multiplied = {op.weight for op in program.ops if isinstance(op, Linear)} | {program.head.weight}
    orders: dict[str, WeightSpec] = {}
    for spec in program.weights:
        if spec.name in multiplied and (source := _shared_order(spec, checkpoint)) is not None:
            name = source.removesuffix(".weight") + INPUT_ORDER
            orders[spec.name] = WeightSpec(name, spec.shape[1:], (name,), integers=True)
    if not orders:
        return program
    widths = {spec.name: spec.width for spec in program.buffers}
    buffers: dict[str, BufferSpec] = {}
    ops: list[Op] = []

    def gather(source: str, order: WeightSpec) -> str:
        out = f"ordered {widths[source]}"
        buffers[out] = BufferSpec(out, widths[source], "activation")
        ops.append(Gather(source, order.name, out))
        return out

    for op in program.ops:
        order = orders.get(op.weight) if isinstance(op, Linear) else None
        if isinstance(op, Linear) and order is not None:
            op = replace(op, source=gather(op.source, order))
        ops.append(op)
    head = program.head
    if head.weight in orders:
        head = replace(head, source=gather(head.source, orders[head.weight]))
    weights = [
        replace(spec, input_order=orders[spec.name].name) if spec.name in orders else spec
        for spec in program.weights
    ]
    ordered = replace(
        program,
        ops=tuple(ops),
        head=head,
        buffers=(*program.buffers, *buffers.values()),
        weights=(*weights, *orders.values()),
    )
    check_program(ordered)
    return ordered


def _shared_order(spec: WeightSpec, checkpoint: WeightFiles) -> str | None:
    """The first source of `spec` if its inputs are reordered, and with them those of all others."""
    orders = [checkpoint.input_order(source) for source in spec.sources]
    first = orders[0]
    for source, order in zip(spec.sources, orders, strict=True):
        same = order is first if first is None or order is None else np.array_equal(order, first)
        if not same:
            raise ModelError(
                f"{source} with its inputs in another order than those of {spec.sources[0]} (g_idx)",
                "one order for linears that read the same row",
            )
    return None if first is None else spec.sources[0]
