"""Finding nouns in story text: a mined list, and where a story names which of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from . import words

_FOLLOWERS = frozenset(
    """
and or but was were is are with to in on of at that who which from had has could would did said for
so he she it they when while because as by into near under behind until then again too named called
went came saw
""".split()
)
_STOP = frozenset(
    """
time day way moral end lot one other first last same next thing bit while most best only more little
few whole middle rest top bottom front back side kind sort part new old big small good bad many much
all else two three left right inside outside great sudden hurry it them him her us me you what this
that there place moment minute hour second word long far very really too once both start beginning
important nice happy sad better three-year-old him himself problem situation fact reason number
thought result turn
""".split()
)
_AFTER_ARTICLE = re.compile(r"\b(?:a|an|the)\s+([a-z]+)(?:([.,!?;:\"\n])|\s+([a-z]+))", re.IGNORECASE)
_AFTER_TO = re.compile(r"\b(?:to|could|can|will|would|not) ([a-z]+)")
_WORD = re.compile(r"[A-Za-z]+")


def mine_nouns(stories: Iterable[str], minimum: int = 6) -> list[str]:
    """Words that follow an article and stand before punctuation or a function word, most frequent first.

    Left out: a word that mostly stands before other words (an adjective), one that follows ``to`` more often
    than an article (a verb), and plurals.
    """
    closed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    verbs: Counter[str] = Counter()
    for story in stories:
        verbs.update(_AFTER_TO.findall(story))
        for word, mark, after in _AFTER_ARTICLE.findall(story):
            if word != word.lower():
                continue
            total[word] += 1
            closed[word] += bool(mark) or after.lower() in _FOLLOWERS
    adjectives = set(words.ADJECTIVES)
    return [
        word
        for word, count in closed.most_common()
        if count >= minimum
        and count >= 0.6 * total[word]
        and len(word) > 2
        and word not in _STOP
        and word not in adjectives
        and verbs[word] < closed[word]
        and (not word.endswith("s") or word.endswith(("ss", "us")))
    ]


def noun_list(stories: Iterable[str]) -> list[str]:
    """The mined nouns and the hand list together, each once, in a fixed order."""
    return list(dict.fromkeys(mine_nouns(stories) + words.concrete_nouns()))


@dataclass(frozen=True)
class Mention:
    """The first place where a story names a noun: ``[start, end)`` are offsets of the noun itself."""

    noun: str
    start: int
    end: int
    adjective: str | None
    count: int = 1


def mentions(story: str, nouns: frozenset[str]) -> list[Mention]:
    """The first mention of every listed noun in the story, in story order."""
    out: list[Mention] = []
    counts = Counter(word.lower() for word in _WORD.findall(story))
    seen: set[str] = set()
    before = ""
    for match in _WORD.finditer(story):
        word = match.group().lower()
        if word in nouns and word not in seen:
            seen.add(word)
            adjective = before if before in words.ADJECTIVES else None
            out.append(Mention(word, match.start(), match.end(), adjective, counts[word]))
        before = word
    return out


def substitute(story: str, old: str, new: str) -> str:
    """Replace the noun ``old`` (and its plain plural) by ``new`` everywhere, with the right article."""

    def swap(match: re.Match[str]) -> str:
        article, gap, word, plural = match.group(1), match.group(2), match.group(3), match.group(4)
        fresh = new.capitalize() if word[0].isupper() else new
        if plural:
            fresh += "es" if fresh.endswith(("s", "x", "ch", "sh")) else "s"
        if article is None:
            return fresh
        vowel = words.with_article(new).startswith("an ")
        if article.lower() in ("a", "an"):
            article = article[0] + ("n" if vowel else "")
        return article + gap + fresh

    pattern = re.compile(rf"(?:\b(a|an|the)(\s+))?\b({old})(e?s)?\b", re.IGNORECASE)
    return pattern.sub(swap, story)
