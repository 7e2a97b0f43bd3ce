"""Prompts: exact lengths, exact sharing, as ids and as text."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenloom.bench.load.prompts import Prompts, Vocabulary, ids_of, word_vocabulary, words_of
from tokenloom.bench.load.traces import read_mooncake
from tokenloom.bench.load.workload import Session, Turn, scale_lengths
from tokenloom.errors import InvalidParameter
from tokenloom.text.tokenizer import Tokenizer


def shared(a: Any, b: Any) -> int:
    """Tokens that two prompts have in common from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def block_ids(turn: Turn) -> list[int]:
    return [first + k for first, count in turn.blocks for k in range(count)]


def blocks(ids: list[int], tokens: int, block: int = 16, scope: int = 0) -> Turn:
    runs = tuple((i, 1) for i in ids)
    return Turn(input_tokens=tokens, output_tokens=1, blocks=runs, block_tokens=block, scope=scope)


def test_prompts_share_exactly_the_blocks_that_they_name() -> None:
    prompts = Prompts(Vocabulary(range(1000)), seed=3)
    turns = [
        blocks([0, 1, 2], 48),
        blocks([0, 1, 3], 40),
        blocks([0, 4], 32),
        blocks([5, 1, 2], 48),
        blocks([0, 1, 2, 6], 60),
        blocks([0, 1, 2], 50),
    ]
    made = [prompts.make(turn, number) for number, turn in enumerate(turns)]
    for turn, prompt in zip(turns, made, strict=True):
        assert len(prompt) == turn.input_tokens
    for (a, x), (b, y) in combinations(zip(turns, made, strict=True), 2):
        common = shared(block_ids(a), block_ids(b)) * 16
        assert shared(x, y) == min(common, len(x), len(y))


def test_what_is_not_in_a_block_is_the_requests_own() -> None:
    prompts = Prompts(Vocabulary(range(1000)), seed=3)
    turn = blocks([7], 40)
    one, two = prompts.make(turn, 1), prompts.make(turn, 2)
    assert shared(one, two) == 16


def test_blocks_of_sessions_are_their_own() -> None:
    prompts = Prompts(Vocabulary(range(1000)), seed=3)
    one, two = (prompts.make(blocks([1, 2], 32, scope=scope), 0) for scope in (0, 1))
    assert shared(one, two) <= 1


def test_a_trace_shares_as_its_hash_ids_say(shared_data: Path) -> None:
    path = shared_data / "traces" / "mooncake" / "conversation_trace.jsonl.gz"
    if not path.is_file():
        pytest.skip("no Mooncake trace in the test data")
    sessions = [s for s, _ in zip(read_mooncake(path), range(60), strict=False)]
    turns = [session.turns[0] for session in sessions]
    # More ids than tokens: blocks whose ids are the vocabulary's size apart share their first token.
    for size, slack in ((200_000, 0), (1000, 1)):
        prompts = Prompts(Vocabulary(range(size)), seed=0)
        made = [np.array(prompts.make(turn, number)) for number, turn in enumerate(turns)]
        assert [len(prompt) for prompt in made] == [turn.input_tokens for turn in turns]
        for (a, x), (b, y) in combinations(zip(turns, made, strict=True), 2):
            common = min(shared(block_ids(a), block_ids(b)) * 512, len(x), len(y))
            least = min(len(x), len(y))
            equal = int((x[:least] != y[:least]).argmax()) if (x[:least] != y[:least]).any() else least
            assert common <= equal <= common + slack


def test_scaled_prompts_share_the_same_blocks() -> None:
    turns = [blocks([0, 1, 2], 1400, 512), blocks([0, 1, 3], 1100, 512)]
    scaled = [scale_lengths(Session(0.0, (turn,)), 1 / 32).turns[0] for turn in turns]
    prompts = Prompts(Vocabulary(range(1000)), seed=0)
    one, two = (prompts.make(turn, number) for number, turn in enumerate(scaled))
    assert (len(one), len(two)) == (44, 35)
    assert shared(one, two) == 32


def test_a_prefix_is_shared_by_all_and_the_rest_by_none() -> None:
    prompts = Prompts(Vocabulary(range(50, 1000)), seed=0)
    turn = Turn(input_tokens=30, output_tokens=1, prefix_tokens=20)
    made = [prompts.make(turn, number) for number in range(20)]
    assert {tuple(prompt[:20]) for prompt in made} == {tuple(made[0][:20])}
    assert len({tuple(prompt[20:]) for prompt in made}) == 20
    assert min(min(prompt) for prompt in made) >= 50  # type: ignore[type-var]
    assert made[3] == Prompts(Vocabulary(range(50, 1000)), seed=0).make(turn, 3)
    assert made[3][:20] != Prompts(Vocabulary(range(50, 1000)), seed=1).make(turn, 3)[:20]


def test_tokens_are_uniform() -> None:
    prompts = Prompts(Vocabulary(range(64)), seed=5)
    counts = np.bincount(prompts.indices(Turn(input_tokens=1, output_tokens=1), 0, 64_000), minlength=64)
    # Chi-square with 63 degrees of freedom: above 104 in one of a thousand.
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 104


@pytest.fixture(scope="module")
def tokenizer(embedded_model: Path) -> Tokenizer:
    return Tokenizer.from_dir(embedded_model)


def test_ids_leave_out_special_tokens(tokenizer: Tokenizer) -> None:
    vocabulary = ids_of(tokenizer)
    assert not set(vocabulary.ids) & tokenizer.special_ids
    assert len(vocabulary) == tokenizer.vocab_size - len(tokenizer.special_ids)


@pytest.mark.parametrize("chat", [False, True])
def test_texts_have_the_length_asked_for(tokenizer: Tokenizer, chat: bool) -> None:
    def count(text: str) -> int:
        if not chat:
            return len(tokenizer.encode(text))
        rendered = tokenizer.render_chat([{"role": "user", "content": text}], add_generation_prompt=True)
        return len(tokenizer.encode(rendered, add_special_tokens=False))

    vocabulary = word_vocabulary(words_of(tokenizer), count)
    prompts = Prompts(vocabulary, seed=1)
    for number, length in enumerate([vocabulary.overhead + 1, 32, 33, 100, 777]):
        text = prompts.make(Turn(input_tokens=length, output_tokens=1), number)
        assert isinstance(text, str)
        assert count(text) == length


def test_words_that_are_several_tokens_are_left_out() -> None:
    odd = [f" odd{i}" for i in range(7)]
    even = [f" w{i}" for i in range(20)]

    def count(text: str) -> int:
        return 3 + sum(2 if f" {word}" in odd else 1 for word in text.split())

    vocabulary = word_vocabulary([*even[:4], *odd, *even[4:]], count)
    assert list(vocabulary.words) == even
    assert vocabulary.overhead == 4  # and the first word
    with pytest.raises(InvalidParameter, match="at least 16 words"):
        word_vocabulary(even[:3] + odd, count)


def test_words_that_merge_with_their_neighbours_are_refused() -> None:
    words = [f" w{i}" for i in range(20)]

    def count(text: str) -> int:
        # Each is one token behind itself and behind its predecessor, but not behind every other one.
        numbers = [int(word[1:]) for word in text.split()]
        return len(numbers) - sum((b - a) % 20 == 5 for a, b in pairwise(numbers))

    with pytest.raises(InvalidParameter, match="does not depend on their neighbours"):
        word_vocabulary(words, count)


def test_a_vocabulary_of_one_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="--vocab-size"):
        Prompts(Vocabulary([5]), seed=0)


def test_prompts_are_plain_json() -> None:
    prompt = Prompts(Vocabulary(range(9)), seed=0).make(Turn(input_tokens=4, output_tokens=1), 0)
    assert json.loads(json.dumps(prompt)) == prompt
