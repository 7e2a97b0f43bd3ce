"""What bench/speculation.py compares with: lanes that take turns, bounds of means, and the rectangular layout."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.engine.helpers import request, run, simulated_engine
from tokenloom.engine.batch import Ticket, TokenBatch
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.speculation.replay import ReplayProposer


@pytest.fixture
def lanes_module(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "bench" / "peers"))
    monkeypatch.syspath_prepend(str(repository / "bench"))
    from guessing import lanes

    return lanes


def test_lanes_keep_together_and_touch_only_their_own_pages(
    lanes_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(f"r{i}", range(4, 12 + i), seed=i, max_tokens=60) for i in range(3)]
    alone = simulated_engine(num_pages=400)
    for each in requests:
        alone.add_request(each)
    texts = run(alone)

    engine = simulated_engine(num_pages=96, pages_per_frame=4)
    slots: list[set[int]] = []
    submit = engine.executor.submit

    def noted(batch: TokenBatch) -> Ticket:
        batch.check()
        slots.append(set(batch.slots.tolist()) - {-1})
        return submit(batch)

    monkeypatch.setattr(engine.executor, "submit", noted)
    lanes = lanes_module.make_lanes(engine, 3)
    speculators = [
        Speculator(
            [ReplayProposer(texts, (rate,), 1000)],
            SpeculationLimits(pace="fixed", max_depth=7, max_nodes=7, width=1),
            engine.clock,
        )
        for rate in (0.0, 0.6, 1.0)
    ]
    for lane, speculator in zip(lanes, speculators, strict=True):
        lane.begin(speculator, requests, texts)
    for goal in range(3, 3 * 24, 3):
        lanes_module.take_turns(lanes, goal)
        made = [lane.tokens for lane in lanes]
        assert min(made) >= goal and max(made) - min(made) <= 3 * 8
    owned = []
    for lane in lanes:
        slots.clear()
        lane.step()
        owned += slots
    assert all(len(mine) == 24 for mine in owned)
    assert len(set().union(*owned)) == 3 * 24
    assert [lane.tokens_per_step for lane in lanes][::2] == [1.0, 8.0]
    assert all(step.taken == [1, 1, 1] and step.rows == 24 for step in lanes[0].steps)


def test_a_lane_says_when_the_text_is_another_or_at_its_end(lanes_module: ModuleType) -> None:
    (lane,) = lanes_module.make_lanes(simulated_engine(), 1)
    requests = [request("a", max_tokens=5)]
    lane.begin(Speculator(), requests)
    while lane.engine.has_work:
        lane.step()
    with pytest.raises(RuntimeError, match="ended"):
        lane.step()
    texts = lane.texts
    texts["a", 0][3] += 1
    lane.begin(Speculator(), requests, texts)
    with pytest.raises(RuntimeError, match="the text of a changed"):
        lanes_module.take_turns([lane], 4)
    with pytest.raises(ValueError, match="too few for 40 lanes"):
        lanes_module.make_lanes(simulated_engine(num_pages=64), 40)


def test_bounds_hold_as_often_as_they_say(lanes_module: ModuleType) -> None:
    # From the tables of statistics books.
    table = {1: 6.314, 2: 2.920, 3: 2.353, 5: 2.015, 10: 1.812, 30: 1.697, 120: 1.658}
    for freedom, quantile in table.items():
        assert lanes_module.student(freedom) == pytest.approx(quantile, abs=0.01)
    rng = random.Random(2)
    held = sum(lanes_module.lower_bound([rng.gauss(1, 0.1) for _ in range(5)]) <= 1 for _ in range(4000))
    assert 0.935 < held / 4000 < 0.965
    assert lanes_module.trimmed_mean([1e9, *range(1, 19), -1e9]) == pytest.approx(9.5)
    assert lanes_module.trimmed_mean([3.0]) == 3.0


@pytest.mark.parametrize("threads", [1, 2])
def test_the_rectangle_keeps_every_token_and_ends_in_one_column(
    lanes_module: ModuleType, threads: int
) -> None:
    from guessing.padded import PaddedKV

    rng = random.Random(threads)
    for batch in (1, 2, 7):
        texts = [[rng.randrange(2, 60_000) for _ in range(rng.randint(1, 30))] for _ in range(batch)]
        padded = PaddedKV((3, 2, 4), [len(text) for text in texts], 300, threads=threads)
        for row, text in enumerate(texts):
            write(padded.kv, row, int(padded.padding[row]), text)
        for _ in range(40):
            taken = [rng.randint(1, 6) for _ in range(batch)]
            if rng.random() < 0.3:
                taken = [taken[0]] * batch
            for row, count in enumerate(taken):
                # What was verified lies behind the common end; only the first of it was accepted.
                news = [rng.randrange(2, 60_000) for _ in range(6)]
                write(padded.kv, row, padded.width, news)
                texts[row] += news[:count]
            seconds = padded.accept(taken)
            assert (seconds > 0) == (len(set(taken)) > 1)
            assert padded.width == max(map(len, texts))
            for row, text in enumerate(texts):
                assert padded.padding[row] + len(text) == padded.width
                kept = padded.kv[:, row, :, padded.padding[row] : padded.width]
                assert (kept == np.array(text)[None, None, :, None]).all()
        padded.close()


def write(kv: np.ndarray, row: int, column: int, tokens: list[int]) -> None:
    kv[:, row, :, column : column + len(tokens)] = np.array(tokens)[None, None, :, None]
