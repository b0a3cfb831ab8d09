"""Class names: the user's own words, made safe for the platform and otherwise left alone."""

from __future__ import annotations

import colorsys
import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Final

OBJECT_CLASS: Final = "object"
TEXT_CLASS: Final = "text"
MAX_CLASS_NAME: Final = 100
_ARTICLES: Final = ("a ", "an ", "the ")


def clean_class_name(name: str) -> str:
    """``name`` on one line, without control characters, at most 100 long; never empty."""
    cleaned = " ".join(_printable(name).split())
    return cleaned[:MAX_CLASS_NAME].rstrip() or OBJECT_CLASS


def clean_text(text: str) -> str:
    """``text`` for a tag: line breaks stay, other control characters go."""
    return "\n".join(_printable(line).strip() for line in text.splitlines()).strip()


def phrase_key(phrase: str) -> str:
    """What two spellings of one phrase share: case, article and closing full stop do not count."""
    key = " ".join(_printable(phrase).split()).casefold().rstrip(".,;:")
    for article in _ARTICLES:
        if key.startswith(article) and len(key) > len(article):
            return key[len(article) :]
    return key


def class_of(label: str, classes: Mapping[str, str]) -> str:
    """The user's class for a label (``classes`` is keyed by ``phrase_key``), or the label."""
    return classes.get(phrase_key(label)) or clean_class_name(label)


def class_color(name: str) -> list[int]:
    """A class has one colour in every project, so that runs can be compared by eye."""
    digest = hashlib.sha256(name.encode("utf-8", "replace")).digest()
    hue, value = digest[0] / 256, 0.75 + digest[1] / 1024
    return [round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.75, value)]


def _printable(text: str) -> str:
    """Control, format-surrogate and unassigned characters become spaces; joiners stay."""
    return "".join(
        " " if unicodedata.category(char) in ("Cc", "Cs", "Cn", "Zl", "Zp") else char
        for char in text
    )
