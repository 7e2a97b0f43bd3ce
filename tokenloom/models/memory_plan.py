"""What a model will take of the machine's memory, decided before anything is allocated.

```
available   |-- weights --|-- rope --|-- workspace --|------ KV frames ------|-- headroom --|
                                     |-- building --|
```
Building ends before the first step takes its workspace and the first token a KV frame.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.errors import InvalidParameter, OutOfMemory
from tokenloom.kernels.adapter_image import page_bytes_for
from tokenloom.kernels.backend import kv_page_bytes
from tokenloom.kernels.native.packed_forms import Sources, WeightForm, expected_forms
from tokenloom.kernels.native.sizes import form_bytes, hidden_bytes, step_bytes
from tokenloom.kernels.program import Embed, Program, Route, WeightSpec
from tokenloom.models.config import ModelConfig
from tokenloom.models.machine_memory import MachineMemory, read_machine_memory
from tokenloom.models.rope import table_bytes
from tokenloom.models.weight_sources import WeightFormat, roundings
from tokenloom.quantization.linear_format import LinearFormat
from tokenloom.quantization.weights import num_groups

FRAME_BYTES = 2 << 20
"""Bytes of one frame: the size of a huge page, so that a frame is one entry of the address tables."""

_FRAME_UNIT = 256 << 10
"""Frames that are larger, for larger KV pages, are multiples of this many bytes."""

DEFAULT_KV_BYTES = 4 << 30
"""Most memory that KV pages take unless more is asked for."""

_KV_SHARE = 0.5
"""Share of what is left after weights and workspace that KV pages take unless more is asked for."""

_MIN_HEADROOM = 256 << 20
_HEADROOM_SHARE = 0.05
_LOGIT_ROWS = 64
_SPLIT_KEYS = 128
_SINGLE_ROWS = 64
_ITEM_BYTES = 4
_NARROW = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes in bytes unless the name says otherwise.

    `page_bytes` holds K and V of `PAGE_SIZE` tokens for every layer; a frame of `frame_bytes` holds
    `pages_per_frame` of them. `num_pages` is the size of the KV pool, for sequences of up to `max_context`
    tokens. `headroom` stays free for the rest of the process and its neighbours. `building_bytes` are taken
    for a moment while the model is built.
    """

    weight_bytes: int
    rope_bytes: int
    workspace_bytes: int
    page_bytes: int
    frame_bytes: int
    pages_per_frame: int
    num_pages: int
    max_context: int
    headroom: int
    machine: MachineMemory
    building_bytes: int = 0

    @property
    def num_frames(self) -> int:
        return -(-self.num_pages // self.pages_per_frame)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all frames."""
        return self.num_frames * self.frame_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes at the peak."""
        later = max(self.workspace_bytes + self.kv_bytes, self.building_bytes)
        return self.weight_bytes + self.rope_bytes + later

    @property
    def num_tokens(self) -> int:
        """Tokens whose K and V fit at once."""
        return self.num_pages * PAGE_SIZE

    @property
    def num_full_sequences(self) -> int:
        """Sequences of `max_context` tokens that fit at once."""
        return self.num_pages // pages_of(self.max_context)

    @classmethod
    def fit(
        cls,
        config: ModelConfig,
        program: Program,
        *,
        max_batch_tokens: int,
        max_running: int,
        num_pages: int = 0,
        kv_memory_bytes: int = 0,
        dtype: str = "auto",
        kv_dtype: str = "float32",
        weights: str = "auto",
        kernels: str = "reference",
        num_threads: int = 0,
        stored: Sources | None = None,
        reading_bytes: int = 0,
        machine: MachineMemory | None = None,
    ) -> MemoryPlan:
        """Choose the number of KV pages; `config.max_context` is the longest sequence. `dtype` and
        `weights` as in `load_model`; K and V are stored in `kv_dtype`, in the layouts of `kernels`, which
        compute on `num_threads` (0: one per core of this process). `stored` and `reading_bytes` are those of the
        `ModelDescription`.

        `num_pages` or `kv_memory_bytes`, where not 0, are honoured as they are. Else the pool is what
        `max_running` sequences of full length need, but at most half of what is left and `DEFAULT_KV_BYTES`,
        and at least one such sequence. `machine` None reads this machine's memory. Raises `OutOfMemory` with
        the numbers and the cure if it does not fit, `InvalidParameter` if both sizes are given or the memory
        is too small for a frame.
        """
        machine = machine or read_machine_memory()
        page_bytes = kv_page_bytes(program.kv, kv_dtype, kernels, PAGE_SIZE)
        # A frame is also cut into whole pages of adapters.
        unit = max(_FRAME_UNIT, page_bytes_for(program, dtype))
        frame_bytes = -(-max(FRAME_BYTES, page_bytes) // unit) * unit
        pages_per_frame = frame_bytes // page_bytes
        if num_pages and kv_memory_bytes:
            raise InvalidParameter("kv_memory_mb", kv_memory_bytes >> 20, "left out where num_pages is given")
        rope = table_bytes(config, config.max_context)
        building = 0
        if kernels == "native":
            forms = packed_weights(config, program, dtype, weights, stored)
            weight_size = sum(map(form_bytes, forms.values()))
            workspace = step_bytes(
                program,
                forms,
                dtype=dtype,
                kv_dtype=kv_dtype,
                max_batch_tokens=max_batch_tokens,
                max_context=config.max_context,
                num_threads=num_threads or _num_cores(),
            )
            building = native_building_bytes(config, program, forms, reading_bytes)
        else:
            weight_size = weight_bytes(config, program, dtype, weights, stored)
            workspace = workspace_bytes(config, program, max_batch_tokens)
        headroom = max(_MIN_HEADROOM, int(machine.available * _HEADROOM_SHARE))
        left = machine.available - headroom - weight_size - rope - workspace
        if kv_memory_bytes:
            num_pages = kv_memory_bytes // frame_bytes * pages_per_frame
            if num_pages == 0:
                least = f"at least {-(-frame_bytes >> 20)}, the size of a frame"
                raise InvalidParameter("kv_memory_mb", kv_memory_bytes >> 20, least)
        elif not num_pages:
            num_pages = _choose_pages(config, max_running, left, page_bytes, frame_bytes)
        plan = cls(
            weight_bytes=weight_size,
            rope_bytes=rope,
            workspace_bytes=workspace,
            page_bytes=page_bytes,
            frame_bytes=frame_bytes,
            pages_per_frame=pages_per_frame,
            num_pages=num_pages,
            max_context=config.max_context,
            headroom=headroom,
            machine=machine,
            building_bytes=building,
        )
        if plan.total_bytes > machine.available - headroom:
            raise OutOfMemory(plan._shortage(left))
        return plan

    def _shortage(self, left: int) -> str:
        fixed = self.weight_bytes + self.rope_bytes
        text = (
            f"the model needs {show_bytes(self.total_bytes)}: {self._parts()}; "
            f"of {show_bytes(self.machine.available)} available ({self.machine.source}), "
            f"{show_bytes(self.headroom)} stay free. "
        )
        fitting = max(left, 0) // self.frame_bytes * self.pages_per_frame
        # Fewer pages help only where the model can be built at all.
        if fitting and fixed + self.building_bytes <= self.machine.available - self.headroom:
            cure = (
                f"Set num_pages to at most {fitting}, kv_memory_mb to at most {max(left, 0) >> 20}, "
                f"or max_context to at most {fitting * PAGE_SIZE}."
            )
        else:
            least = max(self.workspace_bytes + self.frame_bytes, self.building_bytes)
            needed = show_bytes(fixed + least + self.headroom)
            cure = f"It needs {needed} available: free memory, or take a smaller model or max_batch_tokens."
        return text + cure

    def _parts(self) -> str:
        return (
            f"weights {show_bytes(self.weight_bytes)}, KV {show_bytes(self.kv_bytes)} "
            f"({self.num_pages} pages = {self.num_tokens} tokens), "
            f"workspace {show_bytes(self.workspace_bytes + self.rope_bytes)}"
        )

    def render(self) -> str:
        """A table of a few lines for people."""
        sequences = f"{self.num_full_sequences} sequences of {self.max_context} tokens"
        if self.num_full_sequences == 0:
            sequences = f"no sequence of {self.max_context} tokens: requests are limited to {self.num_tokens}"
        rows = [
            ("weights", self.weight_bytes, "as stored, and packed for products"),
            ("KV", self.kv_bytes, f"{self.num_pages} pages = {self.num_tokens} tokens; {sequences}"),
            ("workspace", self.workspace_bytes + self.rope_bytes, "one step's buffers and the RoPE tables"),
            (
                "together",
                self.total_bytes,
                f"machine has {show_bytes(self.machine.available)} available "
                f"of {show_bytes(self.machine.total)} ({self.machine.source})",
            ),
        ]
        return "\n".join(f"{name:<10}{show_bytes(size):>10}  {note}" for name, size, note in rows)


def weight_bytes(
    config: ModelConfig,
    program: Program,
    dtype: str = "auto",
    weights: str = "auto",
    stored: Sources | None = None,
) -> int:
    """Bytes of the weights: all as loaded for arithmetic in `dtype`, and those that are multiplied once more,
    as the reference backend packs them in float32. Weights in 8 or 4 bits are loaded as float32.
    """
    narrow = dtype in _NARROW or config.dtype != "float32"
    multiplied = {name for name, _ in program.products()}
    if weights in ("int8", "int4"):
        wide = multiplied | {op.weight for op in program.ops if isinstance(op, Embed)}
    else:
        wide = set(multiplied) if stored is None and config.quantization is not None else set()
    wide |= {weight.name for weight in program.weights if weight.integers}
    if stored is not None:
        kinds = {"int8", "int4"} if dtype in _NARROW else {"int8", "int4", "float32"}
        wide |= {name for name, forms in stored.items() if any(kind in kinds for kind, _ in forms)}
    return sum(
        math.prod(weight.shape)
        * ((2 if narrow and weight.name not in wide else 4) + (4 if weight.name in multiplied else 0))
        for weight in program.weights
    )


def packed_weight_bytes(config: ModelConfig, program: Program, dtype: str, weights: str = "auto") -> int:
    """Bytes of the weights as the native backend holds them, exact if the checkpoint has one float type."""
    return sum(map(form_bytes, packed_weights(config, program, dtype, weights).values()))


def packed_weights(
    config: ModelConfig, program: Program, dtype: str, weights: str = "auto", stored: Sources | None = None
) -> dict[str, WeightForm]:
    """What the native backend will hold, by name of the weight, from a checkpoint of `config`; `stored` None: in
    the forms that `config` tells."""
    if stored is None:
        stored = {spec.name: _stored(config, program, spec) for spec in program.weights}
    arithmetic = "bfloat16" if dtype == "bfloat16" else "float32"
    return expected_forms(program, arithmetic, roundings(program, cast(WeightFormat, weights)), stored)


def _stored(config: ModelConfig, program: Program, spec: WeightSpec) -> list[tuple[str, int]]:
    """What the sources of a weight give."""
    if spec.integers:
        return [("int32", 0)]
    formats = _linear_formats(config, program, spec)
    return [(config.dtype, 0) if stored is None else stored.form for stored in formats]


def _linear_formats(config: ModelConfig, program: Program, spec: WeightSpec) -> list[LinearFormat | None]:
    """How the sources of a weight are stored that are quantised: those of linears and the head may be, an embedding
    not."""
    multiplied = {name for name, _ in program.products()}
    embeddings = {op.weight for op in program.ops if isinstance(op, Embed)}
    is_linear = spec.name in multiplied - embeddings - program.routers()
    quantization = config.quantization
    if not is_linear or quantization is None:
        return [None] * len(spec.sources)
    return [quantization.format_of(source.removesuffix(".weight")) for source in spec.sources]


def native_building_bytes(
    config: ModelConfig, program: Program, forms: Mapping[str, WeightForm], reading_bytes: int = 0
) -> int:
    """Bytes that the native backend takes for a moment: a weight as it is read before it is packed, then
    tables twice until the model has taken them over."""
    read = reading_bytes or max(_reading_bytes(config, program, spec) for spec in program.weights)
    tables = sum(form_bytes(form) for form in forms.values() if form.kind == "table")
    return max(read, tables + table_bytes(config, config.max_context))


def _reading_bytes(config: ModelConfig, program: Program, spec: WeightSpec) -> int:
    """Bytes of the sources of a weight that are no views of the file: 8 and 4 bits as a byte each, float32 for the
    values of other formats and where a stack has parts of different kinds, and what is stored the other way or
    interleaved."""
    size = math.prod(spec.shape)
    stored = _stored(config, program, spec)
    kinds = set(stored)
    if not any(_linear_formats(config, program, spec)):
        return size * (4 if config.dtype == "float32" else 2) if spec.transposed or spec.interleaved else 0
    groups = [group for kind, group in stored if kind == "int4"]
    unpacked = size + 4 * spec.shape[0]
    if groups:
        # With columns in another order, a copy that is in theirs.
        unpacked = (2 if spec.input_order else 1) * size + 3 * spec.shape[0] * num_groups(
            spec.shape[1], min(groups)
        )
    read = unpacked if len(kinds) == 1 and kinds != {("float32", 0)} else unpacked + 4 * size
    return 2 * read if spec.interleaved else read


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pages_of(num_tokens: int) -> int:
    """Pages that a sequence of `num_tokens` fills."""
    return -(-num_tokens // PAGE_SIZE)


def workspace_bytes(config: ModelConfig, program: Program, max_batch_tokens: int) -> int:
    """Upper estimate of the buffers and temporaries of one step of `max_batch_tokens` rows."""
    widths = [buffer.width for buffer in program.buffers]
    specs = {weight.name: weight for weight in program.weights}
    widest = max(specs[name].shape[0] for name, _ in program.products() if name != program.head.weight)
    chosen = max((op.top_k for op in program.ops if isinstance(op, Route)), default=1)
    row = sum(widths) + 2 * chosen * widest + 4 * config.q_size
    # Attention gathers K and V of some sequences and scores some splits of 128 keys at a time: a few million
    # numbers, or what one split of the step takes (heads padded to tiles at most double it).
    keys = 2 * max(1 << 21, _SINGLE_ROWS * 2 * config.kv_size * _SPLIT_KEYS)
    scores = 4 * max(1 << 20, 2 * max_batch_tokens * config.num_heads * _SPLIT_KEYS)
    logits = 4 * _LOGIT_ROWS * config.vocab_size
    items = max_batch_tokens * row + keys + scores + logits
    return items * _ITEM_BYTES + hidden_bytes(program, max_batch_tokens)


def _choose_pages(config: ModelConfig, max_running: int, left: int, page_bytes: int, frame_bytes: int) -> int:
    pages_per_frame = frame_bytes // page_bytes
    one = pages_of(config.max_context)
    budget = min(int(max(left, 0) * _KV_SHARE), DEFAULT_KV_BYTES) // frame_bytes * pages_per_frame
    pages = max(min(max_running * one, budget), one)
    return -(-pages // pages_per_frame) * pages_per_frame


def show_bytes(size: int) -> str:
    """Such as "12.5 MiB"."""
    if abs(size) < 1024:
        return f"{size} B"
    value, unit = size / 1024, 0
    while abs(value) >= 1024 and unit < 3:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[unit]}"
