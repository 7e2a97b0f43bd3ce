"""From the options of speculation to the proposers of an engine."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tokenloom import embedded
from tokenloom.config import Config
from tokenloom.engine.engine import Engine
from tokenloom.engine.proposer import Proposer
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.errors import InvalidParameter, UnsupportedFeature
from tokenloom.kernels.backend import Choice
from tokenloom.kernels.program import Program
from tokenloom.models.formats import resolve_formats
from tokenloom.models.loading import describe_model
from tokenloom.runtime.adapter_host import AdapterHost
from tokenloom.runtime.local import LocalExecutor
from tokenloom.serving.adapter_packer import PackingTarget
from tokenloom.serving.model_directory import model_directory
from tokenloom.serving.threads import num_threads
from tokenloom.speculation.corpus import read_corpus
from tokenloom.speculation.draft_adapters import DraftAdapters, draft_adapter_format
from tokenloom.speculation.draft_model import DraftModel
from tokenloom.speculation.load_draft import SharedFrames, load_draft, plan_draft
from tokenloom.speculation.ngram import NgramProposer
from tokenloom.speculation.rejection_judge import RejectionJudge
from tokenloom.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_CORPUS_TOKENS: Final = 4 << 20
_DRAFT_PART: Final = 4
"""A draft's KV takes at most one frame in this many from what others keep."""
_ALONE_BYTES: Final = 4 << 20
"""Weights of a draft model that one thread computes with."""


def add_speculation(
    config: Config, engine: Engine, adapters: AdapterHost, tokenizer: Tokenizer, ops: Choice, pool: Any
) -> None:
    """Give `engine` the proposers that `config` names. `adapters` are what it fetches, `pool` the threads of the native
    kernels. Raises `InvalidParameter`, `ModelError` or `UnsupportedFeature`."""
    options = config.speculation
    proposers: list[Proposer] = []
    for name in options.speculate:
        if name == "ngram":
            proposers.append(_ngram(config, engine, tokenizer))
        else:
            proposers += [
                _draft(config, engine, adapters, ops, pool, directory, draft)
                for draft, directory in draft_directories(config).items()
            ]
    limits = SpeculationLimits(
        max_depth=options.max_draft_depth,
        max_nodes=options.max_draft_tokens,
        width=options.draft_width,
        max_rows=options.max_verify_rows,
        pace=options.draft_pace,
    )
    if proposers:
        engine.speculate(Speculator(proposers, limits, engine.clock, RejectionJudge(ops.kernels)))


def draft_directories(config: Config) -> dict[str, Path]:
    """The draft models that `config` speculates with, by the names of these proposers: draft, draft2, ... Raises
    `InvalidParameter` where it does not say which."""
    if "draft" not in config.speculation.speculate:
        return {}
    if config.speculation.draft_model:
        found = [model_directory(name) for name in config.speculation.draft_model]
    elif config.model.model:
        raise InvalidParameter("draft_model", "", "the directory of a draft of the model")
    else:
        found = [embedded.DRAFT]
    return {f"draft{number if number > 1 else ''}": directory for number, directory in enumerate(found, 1)}


def draft_targets(config: Config, ops: Choice) -> dict[str, tuple[PackingTarget, Program]]:
    """What adapters of the draft models are packed for, and the layers that they go over, by the names of these. No
    weight is read. Raises `ModelError` or `InvalidParameter`."""
    found: dict[str, tuple[PackingTarget, Program]] = {}
    for name, directory in draft_directories(config).items():
        described = describe_model(directory)
        formats = resolve_formats(described, ops.kernels, dtype=config.model.dtype)
        form = draft_adapter_format(described.program, formats.dtype)
        target = PackingTarget(
            model=str(directory),
            max_context=None,
            weights="auto",
            dtype=form.dtype,
            page_bytes=form.page_bytes,
            max_rank=config.adapters.max_adapter_rank,
        )
        found[name] = target, described.program
    return found


def _draft(
    config: Config,
    engine: Engine,
    adapters: AdapterHost,
    ops: Choice,
    pool: Any,
    directory: Path,
    name: str,
) -> DraftModel:
    """The proposer `name`, the draft model in `directory`."""
    target = model_directory(config.model.model, config.model.revision)
    executor, cache = engine.executor, engine.scheduler.cache
    if not isinstance(executor, LocalExecutor):
        raise UnsupportedFeature("speculate draft", "the executor of this engine computes elsewhere")
    plan = plan_draft(
        directory,
        target,
        ops,
        dtype=config.model.dtype,
        max_context=engine.max_context,
        max_running=engine.max_running,
        num_threads=num_threads(config.runtime.threads),
        frames=SharedFrames(executor, engine.frames),
    )
    if plan.memory.weight_bytes < _ALONE_BYTES:
        # The model is read in less time than threads take to meet after each op.
        plan, pool = replace(plan, num_threads=1), None
    most = max(engine.frames.num_frames // _DRAFT_PART, 1)

    def free_frame() -> bool:
        """What others keep in case it is wanted again goes for a draft, up to its part of the pool."""
        used = len(draft.cache.pages.frames) + len(own.pool.pages.frames)
        return used < most and cache.yield_frame()

    draft = load_draft(
        plan,
        pool=pool,
        target_vocab_size=engine.limits.vocab_size,
        name=name,
        free_frame=free_frame,
        prefix_cache=config.cache.prefix_cache,
        debug=config.runtime.debug,
    )
    own = DraftAdapters(
        draft,
        draft_adapter_format(plan.described.program, plan.formats.dtype),
        max_bytes=config.adapters.max_adapter_mb << 20,
        free_frame=free_frame,
        debug=config.runtime.debug,
    )
    draft.adapter_of = own
    adapters.companions[name] = own
    # Both are there again in less time than anything else that lies in frames.
    cache.lenders[:0] = [draft, own]
    return draft


def _ngram(config: Config, engine: Engine, tokenizer: Tokenizer) -> NgramProposer:
    options = config.speculation
    corpus = None
    if options.ngram_corpus:

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        corpus = read_corpus(Path(options.ngram_corpus), encode, engine.limits.vocab_size, MAX_CORPUS_TOKENS)
    return NgramProposer(min_match=options.ngram_min_match, corpus=corpus)
