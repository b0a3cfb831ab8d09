"""Comparing words: labels, read text, and whether a word belongs to the scenes' language."""

from __future__ import annotations

import re
from typing import Final

from florence2_demo.language import find_phrases
from florence2_demo.lexicon import (
    BACKGROUND_COLOURS,
    COLOURS,
    KINDS,
    NUMBER_WORDS,
    PATTERNS,
    PLURALS,
    SIGN_WORDS,
)

_CAPTION_WORDS: Final = (
    "the image shows on an and with text background is at top bottom left right in middle one "
    "object objects small medium large sign says"
)
KNOWN_WORDS: Final = frozenset(
    word.lower()
    for words in (
        KINDS,
        PLURALS.values(),
        COLOURS,
        BACKGROUND_COLOURS,
        PATTERNS,
        NUMBER_WORDS,
        SIGN_WORDS,
        _CAPTION_WORDS.split(),
    )
    for word in words
)
_TOKEN: Final = re.compile(r"<[^<>]*>")
_WORD: Final = re.compile(r"[^\s.,]+")


def one_spaced(text: str) -> str:
    """The text with single spaces and none around it."""
    return " ".join(text.split())


def plain_label(label: str) -> str:
    """A label as the truth spells it: "the red cars" is "red car"; unknown words stay."""
    found = find_phrases(label)
    return found[0].words if len(found) == 1 else one_spaced(label).lower()


def has_known_words(answer: str) -> bool:
    """Whether a raw answer is spelled in the words of the scenes alone; an empty one is."""
    words = _WORD.findall(_TOKEN.sub(" ", answer))
    return all(word.lower() in KNOWN_WORDS for word in words)


def edit_distance(first: str, second: str) -> int:
    """The fewest characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def character_errors(read: str, written: str) -> float:
    """The character error rate: edits per character that is written, at most 1.

    Where nothing is written it is 1 for anything read and 0 for nothing.
    """
    read, written = one_spaced(read), one_spaced(written)
    if not written:
        return float(bool(read))
    return min(edit_distance(read, written) / len(written), 1.0)
