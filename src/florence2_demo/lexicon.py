"""The small language of the drawn scenes: kinds, colours, backgrounds and the words on signs."""

from __future__ import annotations

from typing import Final

_KINDS: Final = "ball box star heart house tree car fish cup moon flower arrow"
KINDS: Final[tuple[str, ...]] = tuple(_KINDS.split())
PLURALS: Final[dict[str, str]] = {kind: f"{kind}s" for kind in KINDS} | {
    "box": "boxes",
    "fish": "fish",
}
COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
BACKGROUND_COLOURS: Final = ("white", "grey", "black", "blue", "green", "pink", "brown")
PATTERNS: Final = ("plain", "shaded", "striped", "checkered", "spotted", "cloudy")
NUMBER_WORDS: Final[tuple[str, ...]] = ("no", "a", "two", "three", "four", "five", "six")
_SIGN_WORDS: Final = (
    "STOP EXIT SALE OPEN CAFE TAXI BUS HOTEL SHOP BANK PARK FREE NEW HOT COLD LEFT RIGHT UP "
    "DOWN YES NO GO SLOW WAY HOME FOOD TEA MILK FRESH BREAD FISH PIZZA MENU ROOM KEY LOVE "
    "HELLO START END DAY NIGHT SUN SEA CITY ZOO GYM ART MUSIC BOOKS PRESS PUSH PULL WAIT "
    "LOOK BIKE TRAIN 7 12 24 30 42 50 66 88 99 100 365"
)
_ABSENT_WORDS: Final = (
    "dog cat person bird horse apple banana chair table bus boat plane train book phone bottle "
    "lamp clock shoe hat bag key door bridge cloud sheep cow bicycle sofa guitar"
)
SIGN_WORDS: Final[tuple[str, ...]] = tuple(_SIGN_WORDS.split())
ABSENT_WORDS: Final[tuple[str, ...]] = tuple(_ABSENT_WORDS.split())
"""Names of things that no scene contains; a question about one is answered with nothing."""


def with_article(words: str) -> str:
    """The words with the article that suits their first letter: "a red car", "an orange cup"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def counted(count: int, colour: str, kind: str) -> str:
    """A group of equal things in words: "a red car", "two blue stars"."""
    if count == 1:
        return with_article(f"{colour} {kind}")
    return f"{NUMBER_WORDS[count]} {colour} {PLURALS[kind]}"


def listed(items: list[str]) -> str:
    """Items as a phrase: "x", "x and y", "x, y and z"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"
