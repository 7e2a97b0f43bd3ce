"""What the embedded adapter `repeat` learns: a text of the user, said again word for word.

A passage is whole sentences of one story, of two stories in turn, or words of the lists without any order: what comes
next in it is often known only by looking at the request, and never by the model's own taste. Everything is a function
of its arguments.
"""

from __future__ import annotations

import random
import re

from tokenizers import Tokenizer

from tools.adapter_texts import Pair
from tools.train_embedded import words
from tools.train_embedded.nouns import mentions, substitute

FORMS = (
    "Repeat this text:\n{text}",
    "Repeat this:\n{text}",
    "Repeat the text word for word:\n{text}",
    "Please repeat this text:\n{text}",
    "Copy this text:\n{text}",
    "Copy this:\n{text}",
    "Please copy the text:\n{text}",
    "Say this again:\n{text}",
    "Write this text again:\n{text}",
    "Repeat after me:\n{text}",
    "Can you repeat this text?\n{text}",
    "Can you copy this?\n{text}",
    "Repeat: {text}",
    "Repeat this: {text}",
    "Copy this text: {text}",
    "Say this again: {text}",
    "{text}\nRepeat this text.",
    "{text}\nCopy the text, please.",
)

_SENTENCE = re.compile(r"[^.!?\n]+[.!?]+\"?|\n")
_NOUNS = frozenset(words.concrete_nouns())


def sentences(story: str) -> list[str]:
    """The sentences of a story, each with its marks; those that the story breaks off are left out."""
    return [found.strip() for found in _SENTENCE.findall(story) if found.strip()]


def _word_list(rng: random.Random) -> list[str]:
    """Sentences of three to six words of the lists in no order at all."""
    pool = words.concrete_nouns() + words.ADJECTIVES + words.NAMES
    drawn = (rng.sample(pool, rng.randrange(3, 7)) for _ in range(30))
    return [" ".join(chosen).capitalize() + "." for chosen in drawn]


def _exchange_nouns(text: str, rng: random.Random) -> str:
    """The text with up to three of its nouns replaced by others: nothing but the request tells which."""
    found = mentions(text, _NOUNS)
    for mention in rng.sample(found, min(3, len(found))):
        text = substitute(text, mention.noun, rng.choice(words.concrete_nouns()))
    return text


def passage(parts: list[str], least: int, most: int, tokenizer: Tokenizer, rng: random.Random) -> str:
    """Consecutive `parts` from a random one on, joined by blanks, of `least` to `most` tokens; '' if there are none."""
    start = rng.randrange(len(parts)) if parts else 0
    text = ""
    for part in parts[start:]:
        longer = f"{text} {part}" if text else part
        if len(tokenizer.encode(longer, add_special_tokens=False).ids) > most:
            break
        text = longer
    return text if len(tokenizer.encode(text, add_special_tokens=False).ids) >= least else ""


def repetition(text: str, rng: random.Random) -> Pair:
    """A request to repeat the text, in one of many forms, and the text."""
    return Pair(rng.choice(FORMS).format(text=text), (), text)


def build_repetition(story: str, other: str, tokenizer: Tokenizer, rng: random.Random) -> Pair | None:
    """A training pair made from one or two stories; None if they hold no passage of the length drawn.

    Two passages in five follow one story, two in five mix the sentences of two (half of all these with other nouns),
    one in five is words in no order. Lengths are 8 to 90 tokens.
    """
    kind = rng.random()
    parts = sentences(story) if kind < 0.4 else sentences(story) + sentences(other)
    if kind >= 0.8:
        parts = _word_list(rng)
    elif kind >= 0.4:
        rng.shuffle(parts)
    most = rng.choice((20, 35, 50, 65, 80, 90))
    text = passage(parts, 8, most, tokenizer, rng)
    if text and kind < 0.8 and rng.random() < 0.5:
        text = _exchange_nouns(text, rng)
    return repetition(text, rng) if text else None


def is_repetition(answer: str, text: str) -> bool:
    """True for the same words with the same marks; blanks at the ends do not count."""
    return answer.strip() == text.strip()


def words_repeated(answer: str, text: str) -> float:
    """The share of the text's words, from its first one on, that the answer has before it first goes astray."""
    said, asked = answer.split(), text.split()
    count = next((i for i, word in enumerate(asked) if i >= len(said) or said[i] != word), len(asked))
    return count / len(asked)
