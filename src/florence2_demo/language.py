"""The small language of the drawn scenes: its words, sentences about a scene, and the way back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from florence2_demo.geometry import FractionBox
from florence2_demo.lexicon import (
    BACKGROUND_COLOURS,
    COLOURS,
    KINDS,
    NUMBER_WORDS,
    PATTERNS,
    PLURALS,
    SIGN_WORDS,
    counted,
    listed,
)
from florence2_demo.scene import Scene, SceneObject

_ONE_OF_KINDS: Final = {word: kind for kind in KINDS for word in (kind, PLURALS[kind])}
_PHRASE: Final = re.compile(
    rf"\b(?:({'|'.join(COLOURS)}) )?({'|'.join(sorted(_ONE_OF_KINDS, key=len, reverse=True))})\b",
    re.IGNORECASE,
)
_SIDE: Final = re.compile(r"\b(?:on the (left|right)|at the (top|bottom))\b", re.IGNORECASE)
_LARGE_SIDE: Final = 0.34
_SMALL_SIDE: Final = 0.16


@dataclass(frozen=True, slots=True)
class Phrase:
    """A kind of thing, of one colour or of any, optionally the outermost one on a side."""

    kind: str
    colour: str | None = None
    side: str | None = None

    @property
    def words(self) -> str:
        """The phrase as answers spell it, in the singular: "red car" or "car"."""
        return f"{self.colour} {self.kind}" if self.colour else self.kind

    def matches(self, scene: Scene) -> tuple[SceneObject, ...]:
        """The things it speaks of, left to right; with a side only the outermost one."""
        found = tuple(
            thing
            for thing in left_to_right(scene)
            if thing.kind == self.kind and self.colour in (None, thing.colour)
        )
        if self.side is None or not found:
            return found
        axis, sign = _SIDES[self.side]
        return (min(found, key=lambda thing: sign * thing.centre_xy[axis]),)


_SIDES: Final = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}


def left_to_right(scene: Scene) -> tuple[SceneObject, ...]:
    """The objects in the order that every answer uses: by the centres of their boxes."""
    return tuple(sorted(scene.objects, key=lambda thing: thing.centre_xy))


def find_phrases(text: str) -> tuple[Phrase, ...]:
    """The known things named in a text, each once, in the order of the text."""
    found = (
        Phrase(_ONE_OF_KINDS[kind.lower()], colour.lower() or None)
        for colour, kind in _PHRASE.findall(text)
    )
    return tuple(dict.fromkeys(found))


def find_referred(text: str) -> Phrase | None:
    """The first thing named, with the side if the text gives one: "the red car on the left"."""
    phrases = find_phrases(text)
    if not phrases:
        return None
    side = _SIDE.search(text)
    words = (side.group(1) or side.group(2)).lower() if side else None
    return Phrase(phrases[0].kind, phrases[0].colour, words)


def plain_label(label: str) -> str:
    """A label as the truth spells it: "the red cars" is "red car"; unknown words stay."""
    found = find_phrases(label)
    return found[0].words if len(found) == 1 else " ".join(label.split()).lower()


_CAPTION_WORDS: Final = (
    "the image shows on an and with text background is at top bottom left right in middle one "
    "object objects small medium large sign says"
)
_KNOWN_WORDS: Final = frozenset(
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


def has_known_words(answer: str) -> bool:
    """Whether a raw answer is spelled in the words of the scenes alone; an empty one is."""
    words = _WORD.findall(_TOKEN.sub(" ", answer))
    return all(word.lower() in _KNOWN_WORDS for word in words)


def _groups(scene: Scene) -> dict[tuple[str, str], list[SceneObject]]:
    """Objects of one colour and kind together, in the order of their left-most ones."""
    groups: dict[tuple[str, str], list[SceneObject]] = {}
    for thing in left_to_right(scene):
        groups.setdefault((thing.colour, thing.kind), []).append(thing)
    return groups


def _things(scene: Scene) -> str:
    return listed([counted(len(g), colour, kind) for (colour, kind), g in _groups(scene).items()])


def place_words(box_xyxy: FractionBox) -> str:
    """Where a box is, on a 3 x 3 grid: "at the top left", "on the right", "in the middle"."""
    x, y = (box_xyxy[0] + box_xyxy[2]) / 2, (box_xyxy[1] + box_xyxy[3]) / 2
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    row = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    if row:
        return f"at the {row} {column}".rstrip()
    return f"on the {column}" if column else "in the middle"


def size_word(thing: SceneObject) -> str:
    """ "small", "large" or "medium" by the mean of the box's sides as fractions."""
    x1, y1, x2, y2 = thing.box_xyxy
    side = ((x2 - x1) * (y2 - y1)) ** 0.5
    return "large" if side > _LARGE_SIDE else "small" if side < _SMALL_SIDE else "medium"


def _sign_words(scene: Scene) -> str:
    return " and ".join(line.text for line in scene.texts)


def caption(scene: Scene) -> str:
    """One sentence: what things, on what background, and what is written."""
    written = f" with the text {_sign_words(scene)}" if scene.texts else ""
    return f"{_things(scene)} on a {scene.background.colour} background{written}"


def detailed_caption(scene: Scene) -> str:
    """Two sentences: what there is, and where."""
    background = scene.background
    written = f" with the text {_sign_words(scene)}" if scene.texts else ""
    first = (
        f"The image shows {_things(scene)} on a {background.pattern} {background.colour} "
        f"background{written}."
    )
    things = left_to_right(scene)
    places = [f"the {thing.name} {place_words(thing.box_xyxy)}" for thing in things[1:]]
    start = f"The {things[0].name} is {place_words(things[0].box_xyxy)}"
    return f"{first} {listed([start, *places])}."


def more_detailed_caption(scene: Scene) -> str:
    """A short paragraph: the count, each thing with its size and place, each sign."""
    count, background = len(scene.objects), scene.background
    number = "one" if count == 1 else NUMBER_WORDS[count]
    sentences = [
        f"The image shows {number} {'object' if count == 1 else 'objects'} on a "
        f"{background.pattern} {background.colour} background."
    ]
    sentences += [
        f"A {size_word(thing)} {thing.name} is {place_words(thing.box_xyxy)}."
        for thing in left_to_right(scene)
    ]
    sentences += [f"A sign {place_words(line.box_xyxy)} says {line.text}." for line in scene.texts]
    return " ".join(sentences)
