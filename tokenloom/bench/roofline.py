"""How near each op and each whole step comes to what the machine can do (the roofline model, Williams et al.
2009): memory bandwidth and product rates are measured in the same run, on the same threads.

The least time of an op is what its weights (and, for attention, K and V) take to be read, or what its products
take at the peak rate, whichever is longer; the fraction is that time over the time it took. Small weights may
come from the caches, so that a fraction can be above 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from tokenloom.errors import InvalidParameter, UnsupportedFeature
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.backend import NativeBackend
from tokenloom.kernels.program import Attention, Experts, Linear, Program, RopeStore
from tokenloom.models.memory_plan import pages_of
from tokenloom.runtime.synthetic_batches import page_writers, uniform_batch

_SWEEP_BYTES: Final = 256 << 20
_PEAK_ITERATIONS: Final = 2_000_000
_CONTEXT: Final = 128


class Case(NamedTuple):
    """A step of `sequences` sequences with `rows` rows each, behind `context` tokens."""

    name: str
    sequences: int
    rows: int
    context: int


CASES: Final = (
    Case("decode 1", 1, 1, _CONTEXT),
    Case("decode 8", 8, 1, _CONTEXT),
    Case("decode 32", 32, 1, _CONTEXT),
    Case("prefill 512", 1, 512, 0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes per second of reading memory, and operations per second in registers by format."""

    bandwidth: float
    peaks: dict[str, float]
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpShare:
    """One kind of op in a step: seconds, bytes that must be read, operations, fraction of the limit."""

    op: str
    seconds: float
    bytes: int
    operations: float
    fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One case; the fraction is that of the whole step."""

    case: str
    seconds: float
    fraction: float
    ops: list[OpShare]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure_limits(num_threads: int, isa: str = "") -> Limits:
    """Take about two seconds to measure this machine."""
    native = extension.load()
    pool = extension.thread_pool(num_threads)
    names = ("float32", "bfloat16", "int8")
    return Limits(
        bandwidth=native.bandwidth(pool, isa, _SWEEP_BYTES // num_threads, 5),
        peaks={name: native.peak(pool, isa, name, _PEAK_ITERATIONS) for name in names},
        threads=num_threads,
    )


def measure(backend: NativeBackend, limits: Limits, *, max_context: int, rounds: int = 5) -> list[StepReport]:
    """Run every case that fits, `rounds` times, and take the medians.

    The steps store their keys and values like any others; every page that they read has been written to
    (memory that never was is one page of zeros, which the caches hold).
    """
    reports = []
    for case in CASES:
        pages = case.sequences * pages_of(case.context + case.rows)
        if case.context + case.rows > max_context or pages > backend.num_pages:
            continue
        program = backend.program
        for writer in page_writers(pages, program.vocab_size):
            backend.run(writer)
        batch = uniform_batch(case.sequences, case.rows, case.context, program.vocab_size)
        backend.run(batch)
        taken = []
        for _ in range(rounds):
            backend.profile_ops(True)
            before = dict(enumerate(backend.op_seconds()))
            backend.run(batch)
            after = backend.op_seconds()
            taken.append([seconds - before[i][1] for i, (_, seconds) in enumerate(after)])
            backend.profile_ops(False)
        medians = np.median(np.array(taken), axis=0)
        reports.append(_report(case, backend, limits, medians.tolist()))
    if not reports:
        raise InvalidParameter("max_context", max_context, "large enough for a step of one row")
    return reports


def native_backend(backend: object) -> NativeBackend:
    """`backend`, if it is the native one. Raises `UnsupportedFeature`."""
    if not isinstance(backend, NativeBackend):
        raise UnsupportedFeature("a roofline of the reference backend", "it measures the native kernels")
    return backend


def _report(case: Case, backend: NativeBackend, limits: Limits, seconds: list[float]) -> StepReport:
    program, weights, kv_dtype = backend.program, backend.weight_sizes, backend.kv_dtype
    spent: dict[str, float] = defaultdict(float)
    work: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    last_store = max(i for i, op in enumerate(program.ops) if isinstance(op, RopeStore))
    for i, (op, took) in enumerate(zip((*program.ops, None, "plan"), seconds, strict=True)):
        least = 0.0
        # Behind the last store only the rows with logits are left, one of each sequence.
        rows = case.rows if i <= last_store else 1
        if isinstance(op, Linear) or op is None:
            name = program.head.weight if op is None else op.weight
            kind = "head" if op is None else f"linear {_short(op.weight)}"
            fmt, size = weights[name]
            shape = next(spec.shape for spec in program.weights if spec.name == name)
            operations = 2.0 * shape[0] * shape[1] * case.sequences * rows
            least = max(size / limits.bandwidth, operations / _peak(limits, fmt))
        elif isinstance(op, Experts):
            kind, size, operations = "experts", *_experts_work(program, op, weights, case.sequences * rows)
            least = max(size / limits.bandwidth, operations / _peak(limits, weights[op.down[0]][0]))
        elif isinstance(op, Attention):
            kind = "attention"
            seen = case.sequences * sum(case.context + case.rows - i for i in range(rows))
            operations = 4.0 * seen * op.num_heads * op.head_dim
            keys = case.sequences * (case.context + case.rows)
            size = keys * 2 * op.num_kv_heads * _vector_bytes(op.head_dim, kv_dtype)
            least = max(size / limits.bandwidth, operations / _peak(limits, kv_dtype))
        else:
            kind, size, operations = (op if isinstance(op, str) else type(op).__name__.lower()), 0, 0.0
        spent[kind] += took
        work[kind][0] += size
        work[kind][1] += operations
        work[kind][2] += least
    shares = [
        OpShare(
            op=kind,
            seconds=took,
            bytes=int(work[kind][0]),
            operations=work[kind][1],
            fraction=work[kind][2] / took if took else 0.0,
        )
        for kind, took in spent.items()
    ]
    total = sum(spent.values())
    least_total = sum(item[2] for item in work.values())
    return StepReport(case=case.name, seconds=total, fraction=least_total / total, ops=shares)


def _experts_work(
    program: Program, op: Experts, weights: Mapping[str, tuple[str, int]], rows: int
) -> tuple[int, float]:
    """Bytes of the experts that `rows` rows are likely to choose, if all are equally good, and operations."""
    top_k = next(spec.width for spec in program.buffers if spec.name == op.routes) // 2
    used = 1 - (1 - top_k / len(op.down)) ** rows
    names = (*op.gate_up, *op.down)
    shapes = {spec.name: spec.shape for spec in program.weights}
    elements = sum(math.prod(shapes[name]) for name in names) / len(op.down)
    return int(sum(weights[name][1] for name in names) * used), 2.0 * elements * rows * top_k


def _vector_bytes(head_dim: int, kv_dtype: str) -> int:
    """Bytes of one key or value of one head; one in 8 bits has a float32 scale."""
    return {"float32": 4 * head_dim, "bfloat16": 2 * head_dim, "int8": head_dim + 4}[kv_dtype]


def _peak(limits: Limits, fmt: str) -> float:
    return limits.peaks["int8" if fmt in ("int8", "int4") else fmt]


def _short(weight: str) -> str:
    """model.layers.3.mlp.gate_proj.weight+... -> gate_proj+..."""
    return "+".join(part.split(".")[-2] for part in weight.split("+"))
