"""What the embedded adapters learn to write: a pirate's stories, and cards of exactly three lines.

`pirate` rewrites any story by rules; `build_card` makes a request and its card; `parse_card` and `pirate_share` are
the measures. Everything is a function of its arguments, and nothing here needs more than the word lists.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from tools.train_embedded import words
from tools.train_embedded.nouns import Mention
from tools.train_embedded.pairs import request_for, roughen
from tools.train_embedded.words import with_article

OPENING, PARAGRAPH, CLOSING = "Ahoy! ", "Arr! ", "Yo ho ho!"
PIRATE_WORDS = {
    "the": "th'",
    "and": "an'",
    "of": "o'",
    "for": "fer",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "was": "were",
    "yes": "aye",
    "hello": "ahoy",
    "hi": "ahoy",
    "little": "wee",
    "very": "mighty",
    "said": "roared",
}
_NOT_GERUNDS = frozenset(
    "something anything everything nothing morning evening during ceiling sibling dumpling duckling".split()
) | {word for word in words.concrete_nouns() if word.endswith("ing")}
_SPOKEN = re.compile(r"\b(?:" + "|".join(PIRATE_WORDS) + r")\b|\b[a-z]*[aeiouy][a-z]*ing\b", re.IGNORECASE)
# `me` and `were` are ordinary words too and tell nothing.
_ROUGH = re.compile(
    r"\b(?:th'|an'|o'|fer|ye|yer|be|aye|ahoy|wee|mighty|roared|[a-z]+in')(?!\w)", re.IGNORECASE
)

PLACES = {
    "in the": "park forest garden house castle school village town city field jungle desert kitchen bedroom "
    "museum library hospital cave zoo shop market barn cottage meadow valley basement bakery",
    "on the": "farm beach mountain hill island bridge road street playground",
    "near the": "river lake pond sea ocean tunnel swamp tower harbor store",
}
_WHERE = [f"{how} {place}" for how, places in PLACES.items() for place in places.split()]
_VERBS = """
finds loses wants sees hides loves draws breaks paints shares follows brings fixes keeps watches needs
meets takes hears makes likes
""".split()
_NO_NOUN = (
    "Tell me a story.",
    "Tell a story.",
    "Write a short story.",
    "Can you tell me a story?",
    "A story, please.",
    "Tell me a bedtime story.",
    "Another one, please!",
    "Tell me something.",
    "Write something nice.",
    "Hello!",
    "Hi",
    "Good morning!",
    "Who are you?",
    "What can you do?",
    "How are you today?",
    "Thank you!",
    "What is your name?",
    "Why is the sky blue?",
    "How old are you?",
    "Where do the birds go in winter?",
    "Help me, please.",
    "What should I eat today?",
    "Please sing a song.",
)

_ONSETS = [*"b c d f g h j k l m n p r s t v w z br ch cl dr fl gr pl sh st th tr".split(), ""]
_CODAS = [*"l m n r s t x ck nd ng".split(), *[""] * 14]

CARD_KEYS = ("Who", "Where", "What")
MAX_CARD_WORDS = 10
_VALUE = re.compile(rf"[A-Za-z]+(?:[ '-][A-Za-z]+){{0,{MAX_CARD_WORDS - 1}}}")


@dataclass(frozen=True)
class Pair:
    """A request, the nouns that it names in their order, and an answer ('' until there is one)."""

    request: str
    nouns: tuple[str, ...]
    answer: str = ""


def _pirate_word(match: re.Match[str]) -> str:
    word = match.group()
    lower = word.lower()
    fresh = PIRATE_WORDS.get(lower)
    if fresh is None:
        fresh = lower if lower in _NOT_GERUNDS else lower[:-1] + "'"
    return fresh.capitalize() if word[0].isupper() else fresh


def pirate_words(text: str) -> str:
    """The text with every word of the table and every -ing form in a pirate's spelling. Idempotent."""
    return _SPOKEN.sub(_pirate_word, text)


def pirate(story: str) -> str:
    """The whole style: an opening, `Arr!` before each further paragraph, the words, and a last line."""
    paragraphs = [line for line in pirate_words(story).split("\n") if line]
    return OPENING + f"\n{PARAGRAPH}".join(paragraphs) + f"\n{CLOSING}"


def pirate_share(text: str) -> float:
    """Of the words that the style respells, the share in its spelling; 0 for a text without such words."""
    plain = sum(_pirate_word(match) != match.group() for match in _SPOKEN.finditer(text))
    rough = len(_ROUGH.findall(text))
    return rough / (rough + plain) if rough + plain else 0.0


def is_pirate_story(text: str) -> bool:
    """True for a text with the opening, the last line and `pirate_share` of at least 0.9."""
    return text.startswith(OPENING) and text.rstrip().endswith(CLOSING) and pirate_share(text) >= 0.9


def parse_card(text: str) -> dict[str, str]:
    """The fields of a card.

    A card is exactly the lines ``Who: …``, ``Where: …`` and ``What: …`` in this order, each with one to
    ``MAX_CARD_WORDS`` words of letters, hyphens and apostrophes, one blank between them. Anything else raises
    ValueError that says which line is wrong.
    """
    lines = text.split("\n")
    if len(lines) != len(CARD_KEYS):
        raise ValueError(f"{len(lines)} lines instead of {len(CARD_KEYS)}")
    out = {}
    for number, (key, line) in enumerate(zip(CARD_KEYS, lines, strict=True), start=1):
        label, _, value = line.partition(": ")
        if label != key or not _VALUE.fullmatch(value):
            raise ValueError(
                f"line {number} is not '{key}: ' and up to {MAX_CARD_WORDS} words: {line[:80]!r}"
            )
        out[key] = value
    return out


def is_card(text: str) -> bool:
    """True if `parse_card` accepts the text."""
    try:
        parse_card(text)
    except ValueError:
        return False
    return True


def made_up_word(rng: random.Random) -> str:
    """Two to four syllables that mean nothing."""
    syllables = rng.choices((2, 3, 4), (0.5, 0.35, 0.15))[0]
    return "".join(rng.choice(_ONSETS) + rng.choice("aeiou") + rng.choice(_CODAS) for _ in range(syllables))


def build_request(rng: random.Random, no_noun: float, made_up: float = 0.0) -> tuple[str, list[Mention]]:
    """A request in one of the forms of the base model's training, and its mentions as the request has them.

    `no_noun`: the share of the requests without a noun; `made_up`: that of the nouns which are no words at all.
    """
    if rng.random() < no_noun:
        return roughen(rng.choice(_NO_NOUN), rng), []
    pool = words.concrete_nouns()
    chosen = [
        Mention(noun, 0, 0, rng.choice(words.ADJECTIVES) if rng.random() < 0.5 else None)
        for noun in rng.sample(pool, rng.choices((1, 2, 3), (0.2, 0.7, 0.1))[0])
    ]
    if made_up:
        chosen = [replace(m, noun=made_up_word(rng)) if rng.random() < made_up else m for m in chosen]
    request = request_for(chosen, rng)
    lower = request.lower()
    return request, [
        m if m.adjective and f"{m.adjective} {m.noun}" in lower else Mention(m.noun, 0, 0, None)
        for m in chosen
    ]


def _phrase(mention: Mention) -> str:
    return with_article(f"{mention.adjective} {mention.noun}" if mention.adjective else mention.noun)


def build_card(rng: random.Random) -> Pair:
    """A request and its card: the first noun is who, the others are what; what is not named is drawn.

    Some nouns and some whole requests are made up, so that the form does not hang on known words.
    """
    chosen: list[Mention] = []
    if rng.random() < 0.05:
        request = " ".join(made_up_word(rng) for _ in range(rng.randrange(8)))
    else:
        request, chosen = build_request(rng, no_noun=0.2, made_up=0.15)
    named = [_phrase(mention) for mention in chosen]
    if not named:
        named.append(with_article(rng.choice(words.ANIMALS + words.PEOPLE)))
    if len(named) == 1:
        named.append(with_article(rng.choice(words.THINGS).replace("-", " ")))
    what = f"{rng.choice(_VERBS)} {' and '.join(named[1:])}"
    values = (named[0], rng.choice(_WHERE), what)
    answer = "\n".join(f"{key}: {value}" for key, value in zip(CARD_KEYS, values, strict=True))
    return Pair(request, tuple(m.noun for m in chosen), answer)
