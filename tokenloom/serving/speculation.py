"""From the options of speculation to the proposers of an engine."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tokenloom.config import Config
from tokenloom.engine.engine import Engine
from tokenloom.engine.proposer import Proposer
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.errors import InvalidParameter
from tokenloom.kernels.backend import Choice
from tokenloom.serving.model_directory import model_directory
from tokenloom.serving.threads import num_threads
from tokenloom.speculation.corpus import read_corpus
from tokenloom.speculation.draft_model import DraftModel
from tokenloom.speculation.load_draft import load_draft, plan_draft
from tokenloom.speculation.ngram import NgramProposer
from tokenloom.speculation.rejection_judge import RejectionJudge
from tokenloom.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_CORPUS_TOKENS: Final = 4 << 20
_ALONE_BYTES: Final = 4 << 20
"""Weights of a draft model that one thread computes with."""


def add_speculation(config: Config, engine: Engine, tokenizer: Tokenizer, ops: Choice, pool: Any) -> None:
    """Give `engine` the proposers that `config` names. `pool` are the threads of the native kernels. Raises
    `InvalidParameter`, `ModelError` or `UnsupportedFeature`."""
    options = config.speculation
    proposers: list[Proposer] = []
    for name in options.speculate:
        if name == "ngram":
            proposers.append(_ngram(config, engine, tokenizer))
        else:
            proposers.append(_draft(config, engine, ops, pool))
    limits = SpeculationLimits(
        max_depth=options.max_draft_depth,
        max_nodes=options.max_draft_tokens,
        width=options.draft_width,
        max_rows=options.max_verify_rows,
        pace=options.draft_pace,
    )
    if proposers:
        engine.speculate(Speculator(proposers, limits, engine.clock, RejectionJudge(ops.kernels)))


def _draft(config: Config, engine: Engine, ops: Choice, pool: Any) -> DraftModel:
    options = config.speculation
    target = model_directory(config.model.model, config.model.revision)
    if options.draft_model:
        directory = model_directory(options.draft_model)
    elif not config.model.model:
        directory = Path(__file__).parent.parent / "embedded" / "draft"
    else:
        raise InvalidParameter("draft_model", "", "the directory of a draft of the model")
    plan = plan_draft(
        directory,
        target,
        ops,
        dtype=config.model.dtype,
        max_context=engine.max_context,
        max_running=engine.max_running,
        num_pages=engine.limits.num_pages,
        num_threads=num_threads(config.runtime.threads),
    )
    if plan.memory.weight_bytes < _ALONE_BYTES:
        # The model is read in less time than threads take to meet after each op.
        plan, pool = replace(plan, num_threads=1), None
    return load_draft(
        plan,
        pool=pool,
        target_vocab_size=engine.limits.vocab_size,
        prefix_cache=config.cache.prefix_cache,
        debug=config.runtime.debug,
    )


def _ngram(config: Config, engine: Engine, tokenizer: Tokenizer) -> NgramProposer:
    options = config.speculation
    corpus = None
    if options.ngram_corpus:

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        corpus = read_corpus(Path(options.ngram_corpus), encode, engine.limits.vocab_size, MAX_CORPUS_TOKENS)
    return NgramProposer(min_match=options.ngram_min_match, corpus=corpus)
