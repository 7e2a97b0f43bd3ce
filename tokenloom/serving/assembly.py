"""From a configuration to a running engine: the one place that knows all the parts."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

from tokenloom.config import Config
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.policies.token_budget import choose_budget
from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.adapter_image import image_dtype, page_bytes_for
from tokenloom.kernels.backend import Choice, choose_kernels
from tokenloom.kernels.native.extension import thread_pool
from tokenloom.kernels.native.packed_forms import expected_forms
from tokenloom.kernels.native.weight_cache import WeightCache
from tokenloom.kernels.native.weights import WeightPacker
from tokenloom.models.formats import Formats, resolve_formats
from tokenloom.models.loading import LoadedModel, ModelDescription, describe_model, load_model
from tokenloom.models.memory_plan import MemoryPlan
from tokenloom.models.weight_sources import roundings
from tokenloom.runtime.adapter_host import AdapterFormat, AdapterHost
from tokenloom.runtime.local import LocalExecutor
from tokenloom.serving.adapter_library import AdapterLibrary
from tokenloom.serving.adapter_packer import PackingTarget
from tokenloom.serving.client import ModelCard
from tokenloom.serving.load_listener import LoadListener
from tokenloom.serving.model_directory import model_directory, model_name
from tokenloom.serving.requests import SeedSource
from tokenloom.serving.speculation import add_speculation, draft_targets
from tokenloom.serving.threads import num_threads
from tokenloom.text.output_text import make_stop_checker
from tokenloom.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_TILE: Final = 16
"""Budgets are chosen in multiples of this many rows."""

_PROFILE_RUNS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """An engine and what belongs to it. `engine.close()` releases the executor and with it the memory. `adapters`
    None: the executor has none."""

    engine: Engine
    adapters: AdapterHost | None = None
    tokenizer: Tokenizer
    card: ModelCard
    seeds: SeedSource


def build_engine(config: Config, listener: LoadListener) -> EngineParts:
    """Load what `config` names and build the engine on the local executor.

    The memory plan is made, and told to `listener`, before anything is allocated. Raises `ModelError`,
    `OutOfMemory`, `InvalidParameter` or `UnsupportedFeature`.
    """
    ops = choose_ops(config)
    directory = model_directory(config.model.model, config.model.revision)
    tokenizer = Tokenizer.from_dir(directory)
    scheduler = config.scheduler
    budget = ChunkedPrefill(scheduler.max_batch_tokens, scheduler.max_chunk_tokens)
    max_running = min(scheduler.max_running, budget.max_running)
    described = describe_model(directory, max_context=config.model.max_context, weights=config.model.weights)
    formats = choose_formats(config, described, ops)
    if ops.kernels == "reference" and config.runtime.kernels == "auto":
        log.warning("computing on the numpy reference: %s", ops.reason)
    threads = num_threads(config.runtime.threads)
    plan = MemoryPlan.fit(
        described.config,
        described.program,
        max_batch_tokens=scheduler.max_batch_tokens,
        # The KV of a draft model lies in the same frames: room for some sequences more.
        max_running=max_running + max(max_running // 4, 4) * ("draft" in config.speculation.speculate),
        num_pages=config.cache.num_pages,
        kv_memory_bytes=config.cache.kv_memory_mb << 20,
        dtype=formats.dtype,
        kv_dtype=formats.kv_dtype,
        weights=config.model.weights,
        kernels=formats.kernels,
        num_threads=threads,
        stored=described.stored,
        reading_bytes=described.reading_bytes,
    )
    listener.plan(plan.render())
    pool = thread_pool(threads) if formats.kernels == "native" else None
    model = _load(config, directory, described, formats, pool, listener)
    executor = LocalExecutor(
        model.program,
        model.weights,
        model.rope,
        num_frames=plan.num_frames,
        frame_bytes=plan.frame_bytes,
        pages_per_frame=plan.pages_per_frame,
        dtype=model.dtype,
        kv_dtype=formats.kv_dtype,
        num_threads=threads,
        kernels=formats.kernels,
        isa=ops.isa,
        pool=pool,
    )
    # The executor holds what it needs; what it packed for itself need not be kept twice.
    model.weights.clear()
    adapters = AdapterHost(executor.backend, adapter_format(described, formats))
    limits = _limits(config, model, plan, executor, max_running, adapters.format)
    if scheduler.target_itl_ms > 0:
        budget = _measured_budget(
            executor, min(limits.max_context, plan.num_tokens), budget, scheduler.target_itl_ms
        )
    engine = Engine(
        executor,
        limits,
        budget=budget,
        order=QueueOrder(scheduler.policy, scheduler.age_bound_s),
        stop_checkers=make_stop_checker(tokenizer),
        adapters=adapters,
    )
    add_speculation(config, engine, adapters, tokenizer, ops, pool)
    card = _card(config, model, executor, engine)
    seeds = SeedSource(config.runtime.seed)
    return EngineParts(engine=engine, adapters=adapters, tokenizer=tokenizer, card=card, seeds=seeds)


def adapter_format(described: ModelDescription, formats: Formats) -> AdapterFormat:
    """What adapters must be packed for, so that the engine takes them."""
    return AdapterFormat(image_dtype(formats.dtype), page_bytes_for(described.program, formats.dtype))


def open_library(config: Config) -> AdapterLibrary:
    """The adapters of a process under `config`, packed for the engine that it would build, draft models included. No
    weight is read. Raises `ModelError`, `InvalidParameter` or `UnsupportedFeature`."""
    directory = model_directory(config.model.model, config.model.revision)
    described = describe_model(directory, max_context=config.model.max_context, weights=config.model.weights)
    ops = choose_ops(config)
    form = adapter_format(described, choose_formats(config, described, ops))
    target = PackingTarget(
        model=str(directory),
        max_context=config.model.max_context,
        weights=config.model.weights,
        dtype=form.dtype,
        page_bytes=form.page_bytes,
        max_rank=config.adapters.max_adapter_rank,
    )
    return AdapterLibrary(
        target, described.program, data_dir=config.adapters.data_dir, drafts=draft_targets(config, ops)
    )


def choose_ops(config: Config) -> Choice:
    """What would compute under `config`. Raises `UnsupportedFeature` for options that exclude each other, or
    that this machine does not have."""
    ops = choose_kernels(config.runtime.kernels, dtype=config.model.dtype, isa=config.runtime.isa)
    if ops.kernels != "native":
        if config.cache.kv_dtype == "int8":
            raise UnsupportedFeature("kv_dtype int8", "only the native kernels have it")
        if config.model.weight_cache:
            raise UnsupportedFeature("weight_cache", "only the native kernels have packed weights to keep")
    return ops


def choose_formats(config: Config, described: ModelDescription, ops: Choice) -> Formats:
    """The formats that `config` asks for, with each "auto" resolved for the model on these ops."""
    return resolve_formats(
        described,
        ops.kernels,
        dtype=config.model.dtype,
        kv_dtype=config.cache.kv_dtype,
        weights=config.model.weights,
    )


def _load(
    config: Config,
    directory: Path,
    described: ModelDescription,
    formats: Formats,
    pool: Any,
    listener: LoadListener,
) -> LoadedModel:
    packer = cache = None
    if formats.kernels == "native":
        rounded = roundings(described.program, config.model.weights)
        packer = WeightPacker(described.program, formats.dtype, pool, rounded)
        if config.model.weight_cache:
            expect = partial(expected_forms, described.program, formats.dtype, rounded)
            cache = WeightCache(config.model.weight_cache, pool, expect)
    return load_model(
        directory,
        dtype=formats.dtype,
        weights=config.model.weights,
        max_context=config.model.max_context,
        progress=listener.advance,
        packer=packer,
        cache=cache,
    )


def _limits(
    config: Config,
    model: LoadedModel,
    plan: MemoryPlan,
    executor: LocalExecutor,
    max_running: int,
    adapters: AdapterFormat,
) -> EngineLimits:
    return EngineLimits(
        vocab_size=model.config.vocab_size,
        max_context=model.config.max_context,
        num_pages=plan.num_pages,
        pages_per_frame=plan.pages_per_frame,
        max_running=max_running,
        max_waiting=config.scheduler.max_waiting,
        eos_token_ids=model.config.eos_token_ids,
        identity=(model.identity, executor.numerics_id),
        adapter_pages_per_frame=plan.frame_bytes // adapters.page_bytes,
        adapter_page_bytes=adapters.page_bytes,
        max_adapter_bytes=config.adapters.max_adapter_mb << 20,
        admission=config.scheduler.admission,
        prefix_cache=config.cache.prefix_cache,
        debug=config.runtime.debug,
    )


def _measured_budget(
    executor: LocalExecutor, max_context: int, budget: ChunkedPrefill, target_itl_ms: float
) -> ChunkedPrefill:
    """The largest budget, at most `budget`, whose steps meet the target behind a quarter of the context."""
    sizes = [min(budget.max_batch_tokens, max_context)]
    while sizes[-1] >= 2 * _TILE:
        sizes.append(sizes[-1] // 2)
    executor.profile(sizes[0], 0)
    profile = []
    for rows in sizes:
        context = min(max_context // 4, max_context - rows)
        profile.append((rows, median(executor.profile(rows, context) for _ in range(_PROFILE_RUNS))))
    chosen = min(choose_budget(profile, target_itl_ms / 1000, _TILE), budget.max_batch_tokens)
    log.info("steps of %d rows meet %g ms between tokens", chosen, target_itl_ms)
    return replace(budget, max_batch_tokens=chosen)


def _card(config: Config, model: LoadedModel, executor: LocalExecutor, engine: Engine) -> ModelCard:
    # Who compares fingerprints wants to know about rounded weights too.
    rounded = "" if model.weight_format == "auto" else f"-{model.weight_format}"
    return ModelCard(
        name=model_name(config.model.model, config.model.served_model_name),
        created=int(time.time()),
        max_context=engine.max_context,
        vocab_size=model.config.vocab_size,
        max_running=engine.max_running,
        max_requests=engine.max_running + config.scheduler.max_waiting,
        numerics_id=executor.numerics_id + rounded,
        default_sampling=model.generation.as_sampling(),
        hidden_size=model.config.hidden_size,
        matryoshka=model.config.matryoshka,
        speculates=bool(engine.speculator.sources),
    )
