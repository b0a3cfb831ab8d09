"""Class names: the user's own words, made safe for the platform and otherwise left alone."""

from __future__ import annotations

import colorsys
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Final

OBJECT_CLASS: Final = "object"
TEXT_CLASS: Final = "text"
MAX_CLASS_NAME: Final = 100
MAX_SUFFIX: Final = 50
_ARTICLES: Final = ("a ", "an ", "the ")

# A class has one shape. Those of the classes that clients are told of before they ask are fixed.
FIXED_SHAPES: Final[Mapping[str, str]] = {
    OBJECT_CLASS: "rectangle",
    TEXT_CLASS: "polygon",
    f"{OBJECT_CLASS} (polygon)": "polygon",
    f"{OBJECT_CLASS} (bitmap)": "bitmap",
}
# Where a name is wanted for two shapes, the first of these has it.
_SHAPES: Final = ("rectangle", "polygon", "bitmap")


def clean_class_name(name: str) -> str:
    """``name`` on one line, without control characters, at most 100 long; never empty."""
    cleaned = " ".join(_printable(name).split())
    return cleaned[:MAX_CLASS_NAME].rstrip() or OBJECT_CLASS


def clean_suffix(suffix: str) -> str:
    """``suffix`` without control characters, at most 50 long; it may begin with a space."""
    return _printable(suffix)[:MAX_SUFFIX].rstrip()


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
    return clean_class_name(classes.get(phrase_key(label)) or label)


def class_titles(
    wanted: Iterable[tuple[str, str]], suffix: str = "", fixed: Mapping[str, str] = FIXED_SHAPES
) -> dict[tuple[str, str], str]:
    """The class of every (cleaned name, shape) in one annotation, so that a class has one shape.

    A name stays as it is where it can; ``cat`` that is wanted for boxes and polygons is ``cat``
    and ``cat (polygon)``. ``suffix`` comes last; the whole is at most 100 long. ``fixed`` are
    the classes whose shape is known elsewhere.
    """
    taken = dict(fixed)
    titles: dict[tuple[str, str], str] = {}
    for name, shape in sorted(dict.fromkeys(wanted), key=lambda pair: _SHAPES.index(pair[1])):
        title = next(t for t in _titles(name, shape, suffix) if taken.get(t, shape) == shape)
        taken[title] = shape
        titles[name, shape] = title
    return titles


def possible_titles(name: str, shape: str, suffix: str) -> tuple[str, str]:
    """What ``class_titles`` makes of a name: as it is, and where another shape has that."""
    titles = _titles(name, shape, suffix)
    return next(titles), next(titles)


def class_color(name: str) -> list[int]:
    """A class has one colour in every project, so that runs can be compared by eye."""
    digest = hashlib.sha256(name.encode("utf-8", "replace")).digest()
    hue, value = digest[0] / 256, 0.75 + digest[1] / 1024
    return [round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.75, value)]


def _titles(name: str, shape: str, suffix: str) -> Iterator[str]:
    yield _with_ending(name, suffix)
    yield _with_ending(name, f" ({shape}){suffix}")
    for number in count(2):
        yield _with_ending(name, f" ({shape} {number}){suffix}")


def _with_ending(name: str, ending: str) -> str:
    return name[: MAX_CLASS_NAME - len(ending)].rstrip() + ending


def _printable(text: str) -> str:
    """Control, format-surrogate and unassigned characters become spaces; joiners stay."""
    return "".join(
        " " if unicodedata.category(char) in ("Cc", "Cs", "Cn", "Zl", "Zp") else char
        for char in text
    )
