"""Reading of the real TinyStories text and its split into training and held-out stories."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import unicodedata
from pathlib import Path

STORY_FILES = ("tinystories_a.jsonl.gz", "tinystories_b.jsonl.gz")
PIECE_FILES = ("tinystories_c_paragraphs.jsonl.gz", "tinystories_d.jsonl.gz")
HELD_OUT_MODULUS = 50

_PUNCTUATION = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\u00a0": " "}
)
_STORY_START = re.compile(r"\n(?=(?:Once upon a time|Once there (?:was|were)|There once was|Once, )\b)")


def normalise(text: str) -> str:
    """Straighten quotes and dashes, drop trailing blanks and empty lines. Idempotent."""
    text = unicodedata.normalize("NFC", text).translate(_PUNCTUATION)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def is_held_out(text: str) -> bool:
    """True for about one story in ``HELD_OUT_MODULUS``; depends on the normalised text alone."""
    digest = hashlib.sha1(normalise(text).encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_MODULUS == 0


def _read_pieces(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [normalise(json.loads(line)["text"]) for line in stream]


def _join_pieces(pieces: list[str]) -> list[str]:
    """Rebuild stories from paragraphs whose story borders are lost: a new one starts at a story opening."""
    stories = _STORY_START.split("\n".join(pieces))
    return [story for story in stories if story.startswith("Once") and 250 <= len(story) <= 2400]


def load_stories(data: Path) -> tuple[list[str], list[str]]:
    """Return (training stories, held-out stories), both deduplicated and disjoint.

    Only whole stories are held out; a training story that shares its first 80 characters with a held-out
    one is dropped, and so is a training story that contains them.
    """
    corpora = data / "corpora"
    whole: list[str] = []
    for name in STORY_FILES:
        whole += _read_pieces(corpora / name)
    joined: list[str] = []
    for name in PIECE_FILES:
        joined += _join_pieces(_read_pieces(corpora / name))
    whole = list(dict.fromkeys(story for story in whole if len(story) >= 150))
    held_out = [story for story in whole if is_held_out(story)]
    starts = {story[:80] for story in held_out}
    held_lines = {line for story in held_out for line in story.split("\n") if len(line) >= 60}
    training = []
    for story in dict.fromkeys([story for story in whole if not is_held_out(story)] + joined):
        if story[:80] in starts or any(line in held_lines for line in story.split("\n")):
            continue
        training.append(story)
    return training, held_out
