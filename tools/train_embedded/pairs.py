"""Turning stories into chat documents: a varied request that names nouns of the story, and the story."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from .nouns import Mention, mentions, substitute
from .words import with_article

SYSTEM_PROMPTS = (
    "You are a helpful storyteller.",
    "You are a helpful assistant.",
    "You are a friendly assistant who tells short stories for children.",
    "You tell simple stories.",
    "You are a kind storyteller. Use simple words.",
    "You write short stories.",
)

_ABOUT = (
    "Tell me a story about {x}.",
    "Tell a story about {x}.",
    "Tell me a short story about {x}.",
    "Write a story about {x}.",
    "Write a short story about {x}.",
    "Can you tell me a story about {x}?",
    "Please tell me a story about {x}.",
    "Could you write a story about {x}?",
    "I want a story about {x}.",
    "Make up a story about {x}.",
    "Give me a story about {x}.",
    "Do you know a story about {x}?",
    "I would like to hear a story about {x}.",
    "Hi! Can you tell a story about {x}?",
    "A story about {x}, please.",
    "Please write a little story about {x}.",
    "Story about {x}.",
    "Tell me about {x}.",
    "Once more: {x}!",
    "Can you tell a story in which there is {x}?",
    "Tell a story with {x}.",
    "Write a story with {x} in it.",
    "Write a simple story about {x} for a child.",
    "Tell the story of {x}.",
    "Create a story about {x}.",
)
_WORDS = (
    "Write a short story with the words {x}.",
    "Tell me a story that uses the words {x}.",
    "Write a story using these words: {x}.",
    "Use the words {x} in a story.",
    "Tell a story with the words {x}.",
    "Write a short story. Use the words {x}.",
    "Words: {x}. Tell me a story.",
    "Can you make a story out of {x}?",
    "The story should have {x} in it.",
)
_PLAIN = (
    "Tell me a story.",
    "Tell a story.",
    "Write a short story.",
    "Can you tell me a story?",
    "A story, please.",
    "I want to hear a story.",
    "Please tell me a story.",
    "Tell me a bedtime story.",
    "story",
    "Write a story.",
)
_AGAIN = ("Another one, please!", "Tell me another story.", "One more!", "Another story, please.")
_AGAIN_ABOUT = (
    "Now tell me one about {x}.",
    "Thank you! Now a story about {x}.",
    "Another one, about {x}.",
    "Great! Tell me another story, about {x}.",
    "Can you tell one about {x} too?",
)
_SMALL_TALK = (
    (
        ("Hello!", "Hi!", "Hello", "hi", "Hey!", "Hello there!", "Good morning!"),
        (
            "Hello! Would you like a story?",
            "Hi! Shall I tell you a story?",
            "Hello! What should my story be about?",
        ),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "what can you do?",
            "What can you do?",
            "Help",
        ),
        (
            "I am a small storyteller. I can tell you a story. What should it be about?",
            "I tell little stories. Give me two or three words, and I will tell you one.",
        ),
    ),
    (
        ("Thank you!", "Thanks!", "thanks", "That was nice.", "Bye!", "Goodbye!"),
        ("You are welcome! Come back for another story.", "You are welcome!", "Goodbye! Sleep well."),
    ),
    (
        ("How are you?", "how are you", "How are you today?"),
        ("I am fine, thank you! Would you like a story?", "I am happy today. Shall I tell you a story?"),
    ),
)


@dataclass
class Turn:
    """One chat turn; ``marks`` are offsets in the text of words whose tokens deserve extra loss weight."""

    role: str
    text: str
    marks: list[tuple[int, int]] = field(default_factory=list)


Document = list[Turn]


@dataclass(frozen=True)
class PairRates:
    """Shares of the kinds of documents made from stories."""

    plain: float = 0.17
    substitute: float = 0.30
    system: float = 0.2
    two_turns: float = 0.05
    small_talk: float = 0.02
    unnamed: float = 0.04
    early: float = 0.5
    early_chars: int = 260
    counts: tuple[float, float, float] = (0.15, 0.65, 0.20)
    substitute_each: bool = False


# Late in the training the request names what the story's opening names: a model that learns to place every
# noun at once is sure to do it, while a noun that may come anywhere often never comes.
FINISH_RATES = PairRates(early=0.92, early_chars=150)

# Last of all: two nouns nearly always, both in the opening, and each replaced by an arbitrary noun in half of the
# stories. Nothing but the request then tells what comes second, which is what a small model gets wrong.
POLISH_RATES = PairRates(
    plain=0.06,
    substitute=0.5,
    substitute_each=True,
    system=0.12,
    two_turns=0.03,
    unnamed=0.02,
    early=1.0,
    early_chars=130,
    counts=(0.04, 0.90, 0.06),
)


def _join(parts: list[str], rng: random.Random) -> str:
    if len(parts) == 1:
        return parts[0]
    last = rng.choice((" and ", " and ", " and ", ", and "))
    if len(parts) == 2:
        return parts[0] + (" and " if rng.random() < 0.9 else ", ") + parts[1]
    return ", ".join(parts[:-1]) + last + parts[-1]


def choose_mentions(found: list[Mention], rates: PairRates, rng: random.Random) -> list[Mention]:
    """Two mentions most often, sometimes one or three; a share of the time among those named early.

    A noun that the story repeats is chosen more often (weighted sampling without replacement).
    """
    count = rng.choices((1, 2, 3), rates.counts)[0]
    if rng.random() < rates.early:
        early = [m for m in found if m.start < rates.early_chars]
        found = early if len(early) >= count else found
    keyed = sorted(found, key=lambda m: rng.random() ** (1.0 / min(m.count, 4)), reverse=True)
    return keyed[:count]


def request_for(chosen: list[Mention], rng: random.Random, again: bool = False) -> str:
    """A request, in one of many forms, that names every chosen noun."""
    if again:
        form = rng.choice(_AGAIN_ABOUT)
    else:
        form = rng.choice(_ABOUT) if rng.random() < 0.78 else rng.choice(_WORDS)
    bare = form in _WORDS and rng.random() < 0.85
    style = rng.random()
    parts = []
    for mention in chosen:
        phrase = mention.noun
        if not bare:
            if mention.adjective and rng.random() < 0.6:
                phrase = f"{mention.adjective} {phrase}"
            phrase = f"the {phrase}" if style < 0.06 else phrase if style < 0.12 else with_article(phrase)
        elif rng.random() < 0.05:
            phrase = f'"{phrase}"'
        parts.append(phrase)
    return roughen(form.format(x=_join(parts, rng)), rng)


def roughen(text: str, rng: random.Random) -> str:
    """Sometimes lower case, sometimes without the final mark."""
    draw = rng.random()
    if draw < 0.2:
        text = text.lower()
    if rng.random() < 0.25:
        text = text.rstrip(".!?")
    return text


def _named_story(
    story: str,
    nouns: frozenset[str],
    pool: list[str],
    rates: PairRates,
    rng: random.Random,
    again: bool = False,
) -> Document | None:
    """Request and story, or None if the story names no listed noun."""
    found = mentions(story, nouns)
    if not found:
        return None
    chosen = choose_mentions(found, rates, rng)
    for old in list(chosen) if rates.substitute_each else [rng.choice(chosen)]:
        fresh = rng.choice(pool) if rng.random() < rates.substitute else None
        if fresh is not None and fresh not in story.lower():
            story = substitute(story, old.noun, fresh)
            wanted = {m.noun for m in chosen} - {old.noun} | {fresh}
            chosen = [m for m in mentions(story, nouns | {fresh}) if m.noun in wanted]
            rng.shuffle(chosen)
    marks = [(m.start, m.end) for m in chosen]
    return [Turn("user", request_for(chosen, rng, again)), Turn("assistant", story, marks)]


def _small_talk(rng: random.Random) -> Document:
    asked, answers = rng.choice(_SMALL_TALK)
    return [Turn("user", rng.choice(asked)), Turn("assistant", rng.choice(answers))]


def build_document(
    story: str, other: str, nouns: frozenset[str], pool: list[str], rates: PairRates, rng: random.Random
) -> Document:
    """One training document made from ``story`` (and, for two turns, ``other``); depends on ``rng`` alone.

    A plain document is a single turn of role ``text``. Every mark of an assistant turn is the first place
    where the story names a noun of the request just before it.
    """
    if rng.random() < rates.plain:
        return [Turn("text", story)]
    turns: Document = []
    if rng.random() < rates.system:
        turns.append(Turn("system", rng.choice(SYSTEM_PROMPTS)))
    if rng.random() < rates.small_talk:
        turns += _small_talk(rng)
    pair = None if rng.random() < rates.unnamed else _named_story(story, nouns, pool, rates, rng)
    turns += pair or [Turn("user", roughen(rng.choice(_PLAIN), rng)), Turn("assistant", story)]
    if rng.random() < rates.two_turns:
        more = None if rng.random() < 0.3 else _named_story(other, nouns, pool, rates, rng, again=True)
        turns += more or [Turn("user", roughen(rng.choice(_AGAIN), rng)), Turn("assistant", other)]
    elif rng.random() < rates.small_talk:
        turns += _small_talk(rng)
    return turns
