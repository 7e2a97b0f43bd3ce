"""From a directory to a draft model that proposes; what does not fit its target is refused before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.engine.frames import FramePool, PageClass
from tokenloom.engine.sequence import Sequence
from tokenloom.errors import ModelError, shorten
from tokenloom.kernels.backend import Choice
from tokenloom.kernels.draft_work import MAX_CANDIDATES
from tokenloom.kernels.native.extension import thread_pool
from tokenloom.kernels.native.weights import WeightPacker
from tokenloom.models.formats import Formats, resolve_formats
from tokenloom.models.loading import ModelDescription, describe_model, load_model
from tokenloom.models.memory_plan import MemoryPlan
from tokenloom.models.weight_sources import ProgressListener, WeightFormat, roundings
from tokenloom.runtime.local import LocalExecutor
from tokenloom.speculation.draft_batch import DraftAdapter
from tokenloom.speculation.draft_model import DraftModel, no_adapter, no_frame
from tokenloom.text.tokenizer import Tokenizer

MAX_ROWS: Final = 512
"""Committed tokens that a draft computes in one call."""


@dataclass(frozen=True, slots=True)
class SharedFrames:
    """The frames of a target, to keep a draft's KV in: its executor has the memory, `pool` says whose a frame is."""

    executor: LocalExecutor
    pool: FramePool


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """A draft model before its weights are read. `memory` is what it will take: weights, one step, and, without
    `frames`, pages of its own. `max_pages` bounds its KV (None: all that there is)."""

    directory: Path
    described: ModelDescription
    formats: Formats
    isa: str
    weights: WeightFormat
    num_threads: int
    max_rows: int
    max_pages: int | None
    memory: MemoryPlan
    frames: SharedFrames | None

    @property
    def pages_per_frame(self) -> int:
        if self.frames is None:
            return self.memory.pages_per_frame
        return self.frames.executor.frames[2] // self.memory.page_bytes


def check_vocabularies(target: Path, draft: Path) -> None:
    """Raise `ModelError` unless each token has one id and one spelling in both models. Tokens that only one of them
    has do no harm: they are never proposed, or never accepted."""
    if draft == target:
        return
    theirs, ours = (Tokenizer.from_dir(directory).vocabulary for directory in (target, draft))
    spelling = {token_id: token for token, token_id in theirs.items()}
    for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
        expected = theirs.get(token, token_id)
        if expected != token_id or spelling.get(token_id, token) != token:
            found = f"a draft model {draft} with another vocabulary: token {token_id} is {shorten(token)}"
            here = shorten(spelling[token_id]) if token_id in spelling else "none"
            raise ModelError(f"{found}, in the target's {here}", "a draft with the tokenizer of its target")


def plan_draft(
    directory: Path,
    target: Path,
    ops: Choice,
    *,
    dtype: str = "auto",
    weights: WeightFormat = "auto",
    max_context: int = 0,
    max_rows: int = MAX_ROWS,
    max_running: int = 128,
    num_pages: int = 0,
    num_threads: int = 1,
    frames: SharedFrames | None = None,
) -> DraftPlan:
    """Check the draft in `directory` against `target`, and say what it will take.

    `max_context` is the target's (0: all that the draft has), `max_running` how many sequences it may be asked for
    at once. Its KV lies in `frames`, where it has `num_pages` pages at most (0: as many as it gets), or in memory of
    its own, of so many pages (0: fitted to the machine). Raises `ModelError`, `OutOfMemory`, `InvalidParameter` or
    `UnsupportedFeature`.
    """
    check_vocabularies(target, directory)
    described = describe_model(directory, weights=weights)
    if 0 < max_context < described.config.max_context:
        described = describe_model(directory, weights=weights, max_context=max_context)
    formats = resolve_formats(described, ops.kernels, dtype=dtype, weights=weights)
    memory = MemoryPlan.fit(
        described.config,
        described.program,
        max_batch_tokens=max(max_rows, max_running * MAX_CANDIDATES),
        max_running=max_running,
        # What it has in the frames of another model is in that one's plan.
        num_pages=num_pages if frames is None else 1,
        dtype=formats.dtype,
        kv_dtype=formats.kv_dtype,
        weights=weights,
        kernels=formats.kernels,
        num_threads=num_threads,
        stored=described.stored,
        reading_bytes=described.reading_bytes,
    )
    plan = DraftPlan(
        directory=directory,
        described=described,
        formats=formats,
        isa=ops.isa,
        weights=weights,
        num_threads=num_threads,
        max_rows=max_rows,
        max_pages=(num_pages or None) if frames is not None else memory.num_pages,
        memory=memory,
        frames=frames,
    )
    if not plan.pages_per_frame:
        raise ModelError(
            f"a draft model {directory} with {memory.page_bytes} bytes in a page of K and V",
            f"at most {0 if frames is None else frames.executor.frames[2]}, a frame of its target",
        )
    return plan


def load_draft(
    plan: DraftPlan,
    *,
    target_vocab_size: int,
    name: str = "draft",
    pool: Any = None,
    adapter_of: Callable[[Sequence], DraftAdapter | None] = no_adapter,
    free_frame: Callable[[], bool] = no_frame,
    prefix_cache: bool = True,
    progress: ProgressListener | None = None,
    debug: bool = False,
) -> DraftModel:
    """Read the weights, and make the proposer. `pool` are the threads of the native kernels (None: its own). Raises
    `ModelError`."""
    formats, program = plan.formats, plan.described.program
    packer = None
    if formats.kernels == "native":
        pool = pool or thread_pool(plan.num_threads)
        packer = WeightPacker(program, formats.dtype, pool, roundings(program, plan.weights))
    config = plan.described.config
    model = load_model(
        plan.directory,
        dtype=formats.dtype,
        weights=plan.weights,
        max_context=config.max_context,
        progress=progress,
        packer=packer,
    )
    memory, shared = plan.memory, plan.frames
    num_frames, frame_bytes = memory.num_frames, memory.frame_bytes
    if shared is not None:
        _, num_frames, frame_bytes = shared.executor.frames
    per_frame = plan.pages_per_frame
    executor = LocalExecutor(
        model.program,
        model.weights,
        model.rope,
        num_frames=num_frames,
        frame_bytes=frame_bytes,
        pages_per_frame=per_frame,
        dtype=model.dtype,
        kv_dtype=formats.kv_dtype,
        num_threads=plan.num_threads,
        kernels=formats.kernels,
        isa=plan.isa,
        pool=pool,
        frames_of=None if shared is None else shared.executor,
    )
    model.weights.clear()

    def clear(frame: int) -> None:
        # What one model holds may be no finite keys of the other.
        executor.backend.clear_kv_pages(np.arange(frame * per_frame, (frame + 1) * per_frame, dtype=np.int32))

    frames = FramePool(num_frames) if shared is None else shared.pool
    on_frame = None if shared is None else clear
    pages = PageClass("draft_kv", frames, per_frame, plan.max_pages, on_frame)
    return DraftModel(
        executor,
        pages,
        name=name,
        identity=(model.identity, executor.numerics_id),
        vocab_size=config.vocab_size,
        target_vocab_size=target_vocab_size,
        max_context=min(config.max_context, pages.max_pages * PAGE_SIZE),
        max_rows=plan.max_rows,
        adapter_of=adapter_of,
        free_frame=free_frame,
        prefix_cache=prefix_cache,
        debug=debug,
    )
