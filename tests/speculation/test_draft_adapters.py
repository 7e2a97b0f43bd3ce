"""Adapters of a draft in the pool: they come in slices, go at any time, and stay for as long as a call uses them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.adapter_source import FakeSource
from tokenloom.engine.adapter_pool import AdapterPool
from tokenloom.engine.frames import FramePool
from tokenloom.engine.request import Request
from tokenloom.engine.sequence import Sequence
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.runtime.adapter_host import AdapterFile, AdapterFormat
from tokenloom.speculation.draft_adapters import _RETRY_CALLS, DraftAdapters
from tokenloom.speculation.draft_batch import DraftAdapter

PAGE, PER_FRAME, FRAMES = 1 << 18, 4, 12
WITHOUT = DraftAdapter()


class Host(FakeSource):
    """A `FakeSource` of which adapters are known once they were added; sizes are pages."""

    def __init__(self, form: AdapterFormat) -> None:
        super().__init__({})
        self.format = form

    def add(self, adapter: str, path: Path) -> bool:
        if str(path) == "broken":
            raise ModelError("broken", "an image")
        is_new = adapter not in self.sizes
        self.sizes[adapter] = int(str(path))
        return is_new


@dataclass
class Calls:
    """What a draft model is to its adapters."""

    name: str = "draft"
    is_calling: bool = False
    stats: Any = field(default_factory=lambda: SimpleNamespace(num_calls=0))
    pool: FramePool = field(default_factory=lambda: FramePool(FRAMES))

    @property
    def executor(self) -> Any:
        return SimpleNamespace(backend=None, frames=("reference", FRAMES, PAGE * PER_FRAME))

    @property
    def cache(self) -> Any:
        return SimpleNamespace(pages=SimpleNamespace(pool=self.pool))

    def begin(self) -> None:
        self.is_calling = True
        self.stats.num_calls += 1

    def end(self) -> None:
        self.is_calling = False


def made(page_bytes: int = PAGE, free_frame: Any = lambda: False, **options: Any) -> tuple[Calls, Any]:
    """A draft, and its adapters over a `Host`. A slice is four pages, the least of `FetchSlice`."""
    draft: Any = Calls()
    form = AdapterFormat("float32", page_bytes)
    adapters: Any = DraftAdapters(draft, form, free_frame=free_frame, debug=True, **options)
    adapters.host = Host(form)
    pages = adapters.pool.pages
    adapters.pool = AdapterPool(pages, adapters.host, page_bytes=page_bytes)
    return draft, adapters


def text(adapter: str = "") -> Sequence:
    return Sequence(
        Request(request_id="r", prompt_token_ids=[1, 2, 3], adapter=adapter),
        0, root=b"", max_length=99, stop_ids=frozenset(), checker=None,
    )  # fmt: skip


def give(adapters: Any, adapter: str, content: str, pages: int) -> None:
    adapters.know(AdapterFile(content, str(pages)))
    adapters.go_with(adapter, content)


def ask(draft: Calls, adapters: Any, *names: str) -> list[DraftAdapter | None]:
    """One call of the draft for sequences with these adapters of the target."""
    draft.begin()
    found = [adapters(text(name)) for name in names]
    for each in found:
        assert each is None or each.slot < 0 or adapters.host.bound[each.slot][0] == each.content
    draft.end()
    adapters.check()
    return found


def test_it_is_fetched_in_slices_and_drafted_with_once_it_is_there() -> None:
    draft, adapters = made()
    give(adapters, "A", "a", 10)
    assert ask(draft, adapters, "", "other", "A") == [WITHOUT, WITHOUT, None]
    assert ask(draft, adapters, "A", "A") == [None, None]
    assert adapters.host.copied == [("a", 4), ("a", 4)]
    found = ask(draft, adapters, "A")[0]
    assert found == DraftAdapter("a", 0)
    assert adapters.host.copied[-1] == ("a", 2)
    assert ask(draft, adapters, "A") == [found]


def test_one_slice_in_a_call_whoever_asks() -> None:
    draft, adapters = made()
    for name in "abc":
        give(adapters, name.upper(), name, 4)
    first = ask(draft, adapters, "A", "B", "C")
    assert first == [DraftAdapter("a", 0), None, None]
    assert ask(draft, adapters, "A", "B", "C")[1] == DraftAdapter("b", 1)


def test_what_is_used_is_not_driven_out_by_what_comes() -> None:
    draft, adapters = made(max_bytes=8 * PAGE)
    give(adapters, "A", "a", 4)
    give(adapters, "B", "b", 4)
    give(adapters, "C", "c", 4)
    for _ in range(3):
        found = ask(draft, adapters, "A", "B", "C")
    assert [each.content for each in found if each] == ["a", "b", ""], "no room: drafted without it"
    for _ in range(_RETRY_CALLS):
        found = ask(draft, adapters, "A", "C")
    for _ in range(2):
        found = ask(draft, adapters, "A", "C")
    assert [each.content for each in found if each] == ["a", "c"], "b was not used any more"
    assert adapters.pool.stats.num_evicted == 1


def test_the_target_may_have_every_frame_between_two_calls() -> None:
    draft, adapters = made()
    give(adapters, "A", "a", 4)
    give(adapters, "B", "b", 9)
    ask(draft, adapters, "A", "B")
    ask(draft, adapters, "A", "B")
    assert adapters.num_cold_frames == len(adapters.pool.pages.frames) == 4
    draft.begin()
    adapters(text("A"))
    adapters(text("B"))
    assert adapters.num_cold_frames == 0 and not adapters.evict_for_frame(), "the call uses them"
    draft.end()
    while adapters.evict_for_frame():
        adapters.check()
    assert draft.pool.num_free == FRAMES and not adapters.host.bound
    # Whoever wanted the frames wants them still: no to and fro.
    assert ask(draft, adapters, "A", "B") == [WITHOUT, WITHOUT]
    for _ in range(_RETRY_CALLS + 4):
        found = ask(draft, adapters, "A", "B")
    assert [each.content for each in found if each] == ["a", "b"]


def test_another_content_takes_its_place_and_the_old_one_goes() -> None:
    draft, adapters = made()
    give(adapters, "A", "a", 4)
    give(adapters, "X", "a", 4)
    assert ask(draft, adapters, "A")[0] == DraftAdapter("a", 0)
    give(adapters, "A", "b", 4)
    assert [each and each.content for each in ask(draft, adapters, "A", "X")] == ["b", "a"]
    adapters.go_with("X", "")
    assert adapters.host.forgotten == ["a"]
    adapters.go_with("A", "")
    adapters.check()
    assert adapters.host.forgotten == ["a", "b"] and not adapters.pool.resident
    assert ask(draft, adapters, "A") == [WITHOUT]


def test_one_that_is_half_there_goes_with_its_name() -> None:
    draft, adapters = made()
    give(adapters, "A", "a", 9)
    assert ask(draft, adapters, "A") == [None]
    adapters.go_with("A", "")
    adapters.check()
    assert draft.pool.num_free == FRAMES
    give(adapters, "A", "a", 9)
    ask(draft, adapters, "A")
    ask(draft, adapters, "A", "A")
    assert ask(draft, adapters, "A")[0] is not None
    assert adapters.host.copied[-1] == ("a", 1)


def test_what_nobody_waits_for_any_more_is_not_kept_half_fetched() -> None:
    draft, adapters = made()
    give(adapters, "A", "a", 9)
    give(adapters, "B", "b", 4)
    ask(draft, adapters, "A")
    ask(draft, adapters, "B")
    ask(draft, adapters, "B")
    assert set(adapters.pool.resident) == {"b"}


@pytest.mark.parametrize("failing", ["copy", "bind"])
def test_pages_of_one_that_cannot_be_read_come_back(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, adapters = made()
    give(adapters, "A", "a", 3)

    def fail(*arguments: Any) -> None:
        raise OSError("unreadable")

    with monkeypatch.context() as broken:
        broken.setattr(adapters.host, failing, fail)
        for _ in range(3):
            with pytest.raises(OSError, match="unreadable"):
                ask(draft, adapters, "A")
            draft.end()
            adapters.check()
            assert draft.pool.num_free == FRAMES
    assert ask(draft, adapters, "A") == [DraftAdapter("a", 0)]


def test_calls_without_it_count_too() -> None:
    """The base model's sequences do not keep what nobody asks for any more from whoever wants the frames."""
    draft, adapters = made()
    give(adapters, "A", "a", 4)
    assert ask(draft, adapters, "A")[0] == DraftAdapter("a", 0)
    ask(draft, adapters, "")
    ask(draft, adapters, "")
    draft.begin()
    adapters(text(""))
    assert adapters.num_cold_frames == 1 and adapters.evict_for_frame()
    draft.end()
    adapters.check()


def test_what_cannot_be_had_is_refused_by_name() -> None:
    _, adapters = made(max_bytes=8 * PAGE)
    with pytest.raises(InvalidParameter, match=r"adapter of the draft model draft: .* at most 2048 KiB"):
        adapters.know(AdapterFile("large", "9"))
    with pytest.raises(ModelError, match="broken"):
        adapters.know(AdapterFile("b", "broken"))
    assert adapters.host.sizes == {}
    _, adapters = made(page_bytes=PAGE * PER_FRAME * 2)
    with pytest.raises(ModelError, match="a frame of its target"):
        adapters.know(AdapterFile("a", "1"))


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events(seed: int) -> None:
    rng = random.Random(seed)
    draft, adapters = made(
        free_frame=lambda: bool(held) and draft.pool.give_back(held.pop()) is None,
        max_bytes=rng.choice((0, 20 * PAGE)),
    )
    held: list[int] = []
    sizes = {f"c{i}": rng.randrange(1, 15) for i in range(6)}
    targets = [f"T{i}" for i in range(8)]
    for _ in range(400):
        event = rng.randrange(8)
        if event == 0:
            content = rng.choice(list(sizes))
            give(adapters, rng.choice(targets), content, sizes[content])
        elif event == 1:
            adapters.go_with(rng.choice(targets), "")
        elif event == 2:
            # The target wants a frame.
            frame = draft.pool.take()
            if frame is None:
                expected = adapters.num_cold_frames > 0
                assert adapters.evict_for_frame() == expected
                frame = draft.pool.take()
            held += [] if frame is None else [frame]
        elif event == 3 and held:
            draft.pool.give_back(held.pop())
        else:
            ask(draft, adapters, *rng.choices([*targets, ""], k=rng.randrange(1, 6)))
        adapters.check()
        assert len(held) + len(adapters.pool.pages.frames) + draft.pool.num_free == FRAMES
    assert adapters.pool.stats.num_fetched > 5
