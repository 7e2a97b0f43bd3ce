"""Draft models in the engine, in the frames of their target: the very outputs of plain decoding, whatever happens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.kernels.harness import NATIVE, Numerics, each_numerics, page_bytes_of, prepared
from tests.kernels.harness import random_weights as weights_of
from tests.matrix.test_pairs import SETUPS, cancels, changed, plain
from tests.matrix.workload import CONFIG, WEIGHTS, Setup, base_requests, make_engine, serve
from tests.speculation.test_draft_model import sequence
from tokenloom.engine.engine import Engine
from tokenloom.engine.frames import PageClass
from tokenloom.engine.proposer import Wanted
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.models.config import ModelConfig, RopeConfig
from tokenloom.models.llama import build
from tokenloom.models.rope import rope_tables
from tokenloom.runtime.local import LocalExecutor
from tokenloom.speculation.draft_batch import DraftAdapter
from tokenloom.speculation.draft_model import DraftModel

TINY = replace(
    CONFIG, hidden_size=32, intermediate_size=40, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=20,
    rope=RopeConfig(rotary_dim=20), max_context=200,
)  # fmt: skip


def noisy_weights() -> dict[str, np.ndarray]:
    """Those of the target, somewhat off: right now and then."""
    rng = np.random.default_rng(9)
    return {
        name: (w * (1 + 0.1 * rng.standard_normal(w.shape))).astype(np.float32) for name, w in WEIGHTS.items()
    }


def draft_of(engine: Engine, numerics: Numerics, name: str, config: ModelConfig, weights: Any) -> DraftModel:
    """A draft in the frames of the engine's executor."""
    target = engine.executor
    assert isinstance(target, LocalExecutor)
    kernels, num_frames, frame_bytes = target.frames
    program = build(config)
    per_frame = min(5, frame_bytes // page_bytes_of(program, numerics))
    executor = LocalExecutor(
        program,
        prepared(program, weights, numerics),
        rope_tables(config, config.max_context),
        num_frames=num_frames,
        frame_bytes=frame_bytes,
        pages_per_frame=per_frame,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        kernels=kernels,
        frames_of=target,
    )

    def clear(frame: int) -> None:
        pages = np.arange(frame * per_frame, (frame + 1) * per_frame, dtype=np.int32)
        executor.backend.clear_kv_pages(pages)

    model = DraftModel(
        executor,
        PageClass(name, engine.frames, per_frame, None, clear),
        name=name,
        identity=(name,),
        vocab_size=config.vocab_size,
        target_vocab_size=CONFIG.vocab_size,
        max_context=config.max_context,
        max_rows=48,
        free_frame=engine.scheduler.cache.free_frame,
        debug=True,
    )
    engine.scheduler.cache.lenders.append(model)
    return model


def speculate(engine: Engine, numerics: Numerics, **limits: Any) -> list[DraftModel]:
    drafts = [
        draft_of(engine, numerics, "near", CONFIG, noisy_weights()),
        draft_of(engine, numerics, "far", TINY, weights_of(build(TINY))),
    ]
    bounds = {"max_depth": 4, "max_nodes": 12, "width": 2, "max_rows": 150, "pace": "fixed", **limits}
    engine.speculate(Speculator(drafts, SpeculationLimits(**bounds)))
    return drafts


POOLS: dict[str, dict[str, Any]] = {**SETUPS, "small_pool": {"num_pages": 49}}
"""In a tiny pool the target leaves no frame; in a small one they go back and forth."""

CASES: list[tuple[str, ...]] = [
    ("sampled", "penalties"),
    ("tiny_pool", "nucleus"),
    ("tiny_pool", "prefix_cache", "adapters"),
    ("small_pool", "sampled", "prefix_cache"),
    ("small_pool", "adapter_company", "adapters"),
    ("prefix_cache", "samples_3"),
    ("chunk_7", "bias", "min_tokens"),
    ("cancels", "allowed", "prefix_cache"),
    ("urgent", "stop_strings", "bad_words"),
    ("adapter_company", "adapters", "many_logprobs"),
    ("reserving", "few_at_once", "tenants", "stop_tokens"),
    ("company", "small_budget"),
]


@each_numerics(Numerics(), *NATIVE[:2], NATIVE[-1])
@pytest.mark.parametrize("names", CASES, ids="+".join)
def test_outputs_are_those_of_plain_decoding(names: tuple[str, ...], numerics: Numerics) -> None:
    seed = len(names[0]) % 3
    options: dict[str, Any] = {}
    for name in names:
        options |= POOLS.get(name, {})
    hook = options.pop("during", None)
    drafts: list[DraftModel] = []

    def during(engine: Engine, step: int) -> None:
        if not drafts:
            drafts.extend(speculate(engine, numerics))
        if hook is not None:
            hook(engine, step)
        for draft in drafts:
            draft.check()

    features = frozenset(name for name in names if name not in POOLS)
    outputs = serve(
        Setup(numerics=numerics, during=during, **options), changed(base_requests(seed), *sorted(features))
    )
    assert outputs == plain(features, seed, numerics)
    assert all(draft.stats.num_failures == 0 for draft in drafts)
    if "tiny_pool" in names:
        assert sum(draft.stats.num_short for draft in drafts) > 0
    else:
        assert sum(draft.stats.num_nodes for draft in drafts) > 0


@each_numerics(Numerics(), NATIVE[1])
def test_a_draft_that_is_nearly_the_target_is_right_most_of_the_time(numerics: Numerics) -> None:
    engine = make_engine(Setup(numerics=numerics))
    speculate(engine, numerics)
    for request in base_requests(0):
        engine.add_request(replace(request, params=SamplingParams(temperature=0.0, max_tokens=60, seed=1)))
    while engine.has_work:
        engine.step()
    places = engine.speculator.stats.by_place
    first = places["near", "", 1]
    assert first.accepted > 0.3 * first.tested
    assert engine.speculator.stats.num_accepted > 30
    engine.close()


@pytest.mark.parametrize("idle", [False, True])
def test_adapters_get_the_frames_of_drafts(idle: bool) -> None:
    """A draft fills what the target leaves; an adapter that somebody waits for comes all the same."""
    engine = make_engine(Setup(num_pages=21, max_running=4))
    near, _ = speculate(engine, Numerics())
    text = sequence([i % CONFIG.vocab_size for i in range(300)])
    while engine.frames.num_free:
        near.propose([Wanted(text, 1, 1, 1)])
    if idle:
        near.forget(text)
    assert not engine.frames.num_free
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    for adapter in ("a", "b"):
        engine.add_request(
            Request(request_id=adapter, prompt_token_ids=[1, 2, 3], params=params, adapter=adapter)
        )
    for _ in range(100):
        engine.step()
    assert not engine.has_work
    engine.close()


@each_numerics(Numerics(), NATIVE[0])
def test_a_draft_may_have_adapters_of_its_own(numerics: Numerics) -> None:
    """A draft that is the target itself, with the adapter of each request: all that it says is right."""
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    for adapter in ("", "a", "b"):
        asked = Request(request_id="r", prompt_token_ids=list(range(20)), params=params, adapter=adapter)
        text = serve(Setup(numerics=numerics), [asked])["r", 0][0]
        engine = make_engine(Setup(numerics=numerics))
        while adapter and not engine.adapters.is_ready(adapter):
            engine.adapters.reserve(adapter, lambda: False, over_waiters=False)
            engine.adapters.copy(adapter, 100)
        executor = engine.executor
        assert isinstance(executor, LocalExecutor)
        drafted = DraftAdapter(adapter, engine.adapters.slot_of(adapter))
        pages = engine.scheduler.cache.pages
        draft = DraftModel(
            executor, pages, identity=("self",), vocab_size=211, target_vocab_size=211, max_context=320,
            adapter_of=lambda seq, drafted=drafted: drafted, debug=True,
        )  # fmt: skip
        found = draft.propose([Wanted(sequence(range(20)), 9, 9, 1)])[0]
        assert found.tokens == text
        engine.close()


def test_a_failing_draft_costs_no_request() -> None:
    expected = plain(frozenset({"sampled"}), 1, Numerics())

    def during(engine: Engine, step: int) -> None:
        if step == 0:
            for draft in speculate(engine, Numerics()):
                draft._executor.close()

    setup = Setup(during=during, prefix_cache=True)
    assert serve(setup, changed(base_requests(1), "sampled")) == expected


def test_frames_that_come_and_go_are_cleared() -> None:
    """Each frame that the draft gets, and each that it gives back."""
    engine = make_engine(Setup())
    seen: list[int] = []
    draft = draft_of(engine, Numerics(), "far", TINY, weights_of(build(TINY)))
    pages = draft.cache.pages
    assert pages.on_frame is not None
    clear = pages.on_frame

    def record(frame: int) -> None:
        seen.append(frame)
        clear(frame)

    pages.on_frame = record
    engine.speculate(Speculator([draft], SpeculationLimits(pace="fixed")))
    engine.add_request(base_requests(0)[0])
    while engine.has_work:
        engine.step()
    assert pages.frames
    assert {frame for frame in seen if seen.count(frame) % 2} == pages.frames
    while draft.evict_for_frame():
        pass
    assert all(seen.count(frame) % 2 == 0 for frame in seen)
    engine.close()


def test_cancels_leave_nothing_behind() -> None:
    engine = make_engine(Setup(prefix_cache=True))
    drafts = speculate(engine, Numerics())
    for step in range(60):
        cancels(engine, step)
        engine.step()
    while engine.has_work:
        engine.step()
    for draft in drafts:
        draft.check()
        assert not draft.cache.references
    engine.close()
