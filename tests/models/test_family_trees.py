"""Each family with token trees: the very tokens and logprobs of plain decoding, whatever is right in them."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.kernels.harness import NATIVE, Numerics, each_numerics
from tests.models import test_families as families
from tokenloom.engine.batch import StepResult, TokenBatch, Work
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.proposer import Proposal, Wanted
from tokenloom.engine.request import Request, TokenLogprobs
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.kernels.native import extension
from tokenloom.speculation.replay import ReplayProposer

torch = pytest.importorskip("torch", reason="torch is the oracle here")

VOCAB_SIZE = families.SMALL["vocab_size"]
MAX_CONTEXT = families.SMALL["max_position_embeddings"]
TOP = 2
RATES = (0.45, 0.3, 0.1)
"""Most paths leave the first child, so that ancestors do not lie side by side, and one in seven is wrong."""
SHAPE = (3, 2, 2, 1, 1, 1)
LENGTHS = {"short": 3, "page": 31, "window": 58, "split": 121, "end": MAX_CONTEXT - 14}
"""Prompts behind which trees cross a page, each of the windows, a split of attention, and end with the context."""
LATE, LATE_STEP = "late", 9
"""One that comes in the middle."""
SAMPLED = {"page", "split", LATE}
Outputs = dict[tuple[str, int], tuple[list[int], list[TokenLogprobs]]]


class Corrupted(ReplayProposer):
    """Its wrong tokens are any, its levels break off anywhere."""

    def propose(self, wanted: Any) -> list[Proposal]:
        return [self._corrupt(want, tree) for want, tree in zip(wanted, super().propose(wanted), strict=True)]

    def _corrupt(self, want: Wanted, tree: Proposal) -> Proposal:
        rng = random.Random(f"{want.seq.request.request_id}/{want.seq.num_output}")
        text = self._texts[want.seq.request.request_id, want.seq.index][want.seq.num_output :]
        kept = Proposal()
        number = {-1: -1}
        depths = {-1: -1}
        siblings: dict[int, set[int]] = {}
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            if parent not in number or rng.random() < 0.05:
                continue
            depths[node] = depths[parent] + 1
            if token != text[depths[node]]:
                token = rng.randrange(VOCAB_SIZE)
            taken = siblings.setdefault(parent, set())
            if token in taken:
                continue
            taken.add(token)
            number[node] = len(kept.tokens)
            kept.tokens.append(token)
            kept.parents.append(number[parent])
            kept.ranks.append(tree.ranks[node])
            kept.confidences.append(rng.random())
        return kept


class Watched:
    """An executor that counts rows of trees, nodes beside others of their depth, and prompt rows beside them."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.num_nodes = self.num_branching = self.num_beside = 0

    def submit(self, batch: TokenBatch) -> Any:
        verify = batch.work == Work.VERIFY
        for segment in np.flatnonzero(verify):
            rows = slice(batch.starts[segment], batch.starts[segment + 1])
            logical = batch.logical[rows]
            self.num_nodes += len(logical) - 1
            self.num_branching += len(logical) - len(np.unique(logical))
        lengths = np.diff(batch.starts)
        self.num_beside += int(lengths[batch.work == Work.PREFILL].sum()) if verify.any() else 0
        return self._executor.submit(batch)

    def collect(self, ticket: Any) -> StepResult:
        result: StepResult = self._executor.collect(ticket)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


def request(name: str) -> Request:
    prompt = families.tokens("llama")[: LENGTHS.get(name, 90)]
    prompt = [*prompt, *((7 * i + 3) % VOCAB_SIZE for i in range(LENGTHS.get(name, 90) - len(prompt)))]
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24 if name != "end" else None}
    if name in SAMPLED:
        sampling |= {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}
    params = SamplingParams(seed=len(name), logprobs=TOP, ignore_eos=True, **sampling)
    # Nobody finds the pages of another one.
    return Request(request_id=name, prompt_token_ids=prompt, params=params, tenant=name)


def serve(
    name: str,
    numerics: Numerics,
    texts: Mapping[tuple[str, int], list[int]] | None = None,
    asked: Sequence[str] = (*LENGTHS, LATE),
) -> Outputs:
    """What the requests `asked` get: as it is, or with trees and in chunks."""
    executor = Watched(families.ours(name, numerics, num_pages=60, num_threads=1))
    limits = EngineLimits(vocab_size=VOCAB_SIZE, max_context=MAX_CONTEXT, num_pages=60, debug=True)
    chunks = ChunkedPrefill(1024) if texts is None else ChunkedPrefill(140, 29)
    engine = Engine(executor, limits, budget=chunks)
    if texts is not None:
        bounds = SpeculationLimits(max_depth=6, max_nodes=24, width=3, max_rows=110, pace="fixed")
        proposer = Corrupted(texts, RATES, VOCAB_SIZE, shape=SHAPE)
        engine.speculate(Speculator([proposer], bounds, engine.clock))
    outputs: Outputs = {}
    for each in asked:
        if each != LATE:
            engine.add_request(request(each))
    for step in itertools.count():
        if step == LATE_STEP and LATE in asked:
            engine.add_request(request(LATE))
        if not engine.has_work:
            break
        for delta in engine.step():
            tokens, logprobs = outputs.setdefault((delta.request_id, delta.sample), ([], []))
            tokens += delta.token_ids
            logprobs += delta.logprobs
    stats = engine.speculator.stats
    engine.close()
    if texts is not None and LATE in asked:
        assert executor.num_branching > executor.num_nodes / 4 > 50
        assert executor.num_beside > 50
        assert 30 < stats.num_accepted < stats.num_drafted / 2
    return outputs


@functools.cache
def plain(name: str, numerics: Numerics) -> Outputs:
    return serve(name, numerics)


@pytest.mark.column("speculation")
@pytest.mark.parametrize("name", families.FAMILIES)
@each_numerics(Numerics(), *NATIVE)
def test_trees_give_the_outputs_of_plain_decoding(name: str, numerics: Numerics) -> None:
    expected = plain(name, numerics)
    texts = {key: tokens for key, (tokens, _) in expected.items()}
    assert serve(name, numerics, texts) == expected


@pytest.mark.column("speculation")
@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")
def test_what_trees_have_to_equal_is_what_transformers_says(name: str) -> None:
    """Tokens and logprobs in fp32 are those of its teacher-forced logits, also behind windows and at the end."""
    for key in ("window", "end"):
        prompt = list(request(key).prompt_token_ids)
        tokens, logprobs = plain(name, NATIVE[0])[key, 0]
        with torch.no_grad():
            logits = families.theirs(name)(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        theirs = torch.log_softmax(logits.double(), dim=-1).numpy()
        assert len(tokens) == (MAX_CONTEXT - len(prompt) if key == "end" else 24)
        for row, token, entry in zip(theirs, tokens, logprobs, strict=True):
            assert row[token] > row.max() - 2e-4
            np.testing.assert_allclose(entry.logprob, row[token], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")
def test_instruction_sets_verify_trees_with_the_same_bits(name: str) -> None:
    expected = plain(name, NATIVE[1])
    texts = {key: tokens for key, (tokens, _) in expected.items()}
    asked = ("page", "window")
    for isa in extension.isas()[1:]:
        found = serve(name, Numerics("native", "bfloat16", "bfloat16", isa=isa), texts, asked)
        assert found == {key: expected[key] for key in found}
        assert len(found) == len(asked)
