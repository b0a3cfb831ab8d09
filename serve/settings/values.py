"""One value of the settings, from whatever a client sent: types with bounds, phrases, windows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    Strict,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from florence2.errors import RequestError
from florence2.records import BoxXyxy, SizeWh, check_region
from florence2.tasks import parse_steps
from serve.naming import clean_class_name, clean_text, phrase_key
from serve.settings.errors import RuleError, check_count, hint, refused, shown

MAX_PHRASE: Final = 1000
MAX_PHRASES: Final = 100
MAX_CLASS_NAME: Final = 1000
MAX_CLASSES: Final = 100
MAX_PROMPTS: Final = 20
MAX_TEXT: Final = 120_000
MAX_MODEL_NAME: Final = 1000

NOTHING: Final = ("", "none", "null", "~")
"""Words that mean that nothing was given."""

_PHRASE_END: Final = re.compile(r"\.(?:\s+|$)|[;\r\n]+")
# "St. Bernard" and "J. Smith" are one phrase each.
_ABBREVIATION: Final = re.compile(r"(?:^|[\s.])(?:[A-Z]|No|(?i:St|Mr|Mrs|Ms|Dr|vs|Jr|Sr))$")
# "<and>" is how the model itself joins phrases, so a prompt may hold it.
_SPECIAL_TOKEN: Final = re.compile(r"</?(?!and>)[A-Za-z_]+\d*>")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question per image. ``class_name`` is the class of all its answers, if mapped."""

    text: str | None = None
    class_name: str | None = None


def split_phrases(text: str) -> list[str]:
    """The phrases of ``text``, each once, as first written.

    Raises RequestError when there is none, too many, or one that is no plain phrase.
    """
    parts = [" ".join(part.split()) for part in _parts(text)]
    phrases = list(
        {phrase_key(part): part for part in reversed(parts) if phrase_key(part)}.values()
    )
    if not phrases:
        raise RequestError(
            f"A prompt names at least one thing and {text[:60]!r} names none; "
            'write for example "red car. dog".'
        )
    return check_phrases(phrases[::-1])


def _parts(text: str) -> Iterator[str]:
    """The text cut at full stops, semicolons and line ends, but not after an abbreviation."""
    start = 0
    for end in _PHRASE_END.finditer(text):
        # The longest abbreviation and what comes before it; more would cost quadratic time.
        before = text[max(start, end.start() - 8) : end.start()]
        if end.group().startswith(".") and _ABBREVIATION.search(before):
            continue
        yield text[start : end.start()]
        start = end.end()
    yield text[start:]


def check_phrases(phrases: list[str]) -> list[str]:
    """``phrases`` as they are; RequestError when they are too many, too long or hold a token."""
    if len(phrases) > MAX_PHRASES:
        raise RequestError(
            f"A request asks for at most {MAX_PHRASES} phrases and got {len(phrases)}; "
            "split the request."
        )
    for phrase in phrases:
        if len(phrase) > MAX_PHRASE:
            raise RequestError(
                f"A phrase has at most {MAX_PHRASE} characters and this one has {len(phrase)}; "
                "shorten it, or part it into phrases with full stops."
            )
        if special := _SPECIAL_TOKEN.search(phrase):
            raise RequestError(
                f"A prompt is plain words and {phrase[:60]!r} holds the token "
                f"{special.group()!r}; remove it, and name the task on its own."
            )
    return phrases


def join_classes(named: Sequence[tuple[str, Sequence[str]]]) -> dict[str, tuple[str, ...]]:
    """Prompts by class; a class named twice has both lists, each prompt once.

    Raises RequestError for a prompt of two classes.
    """
    owners: dict[str, str] = {}
    joined: dict[str, dict[str, str]] = {}
    for name, prompts in named:
        for prompt in check_phrases(list(prompts)):
            key = phrase_key(prompt)
            owner = owners.setdefault(key, name)
            if owner != name:
                raise RequestError(
                    f"A prompt belongs to one class and {prompt[:60]!r} is given to {owner!r} and "
                    f"{name!r}; keep one of them."
                )
            joined.setdefault(name, {}).setdefault(key, prompt)
    return {name: tuple(prompts.values()) for name, prompts in joined.items()}


def classes_of(phrases: Sequence[str], mapping: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The class of every phrase and mapped prompt, by ``phrase_key``."""
    named = {phrase_key(p): name for name, prompts in mapping.items() for p in prompts}
    asked = {phrase_key(p): clean_class_name(p) for p in phrases}
    return asked | named


def prompts_of(phrases: Sequence[str], mapping: Mapping[str, Sequence[str]]) -> tuple[Prompt, ...]:
    """One prompt per phrase, the mapped ones with their class; the same phrase is asked once."""
    mapped = {
        phrase_key(text): Prompt(text, name) for name, texts in mapping.items() for text in texts
    }
    asked = {phrase_key(text): Prompt(text) for text in phrases}
    return tuple((asked | mapped).values())


def _read_text(value: object, before: str = "") -> str | None:
    """Clean text, a list being its lines; None when nothing is left."""
    entries = value if isinstance(value, list | tuple) else [value]
    lines = [_line(entry, before) for entry in entries if entry is not None]
    return "\n".join(line for line in lines if line) or None


def _line(value: object, before: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise refused("text or a list of texts", value, '"red car. dog"', before)
    if isinstance(value, str):
        check_count(len(value), MAX_TEXT, "characters", "split the request", before)
    return clean_text(value if isinstance(value, str) else shown(value))


def read_class_name(value: object) -> str:
    """A class name made safe; a number is one too, because YAML reads bare digits so."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise refused("a name", value, '"dog"', "A class in ")
    name = value if isinstance(value, str) else shown(value)
    if not name.strip() or len(name) > MAX_CLASS_NAME:
        raise refused(f"a name of 1 to {MAX_CLASS_NAME} characters", value, '"dog"', "A class in ")
    return clean_class_name(name)


def read_table(value: object, example: str) -> Mapping[object, object]:
    """A mapping, or one written as YAML or JSON in a text."""
    read = value
    if isinstance(value, str):
        try:  # every scalar stays the text that was written
            read = yaml.load(value[:MAX_TEXT], Loader=yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError, ValueError):
            read = value
    if not isinstance(read, Mapping):
        raise refused("a mapping", value, example)
    return read


def _read_mapping(value: object) -> dict[str, tuple[str, ...]]:
    """Prompts by class. A text is parted like ``text``, entries of a list are prompts as they are,
    and a class without prompts is asked for by its own name."""
    entries = read_table(value, "{dog: [puppy, hound], car: red car}")
    check_count(len(entries), MAX_CLASSES, "classes", "split the request")
    named = [(read_class_name(key), prompts) for key, prompts in entries.items()]
    joined = join_classes([(name, _prompts(name, prompts)) for name, prompts in named])
    for name, prompts in joined.items():
        if len(prompts) > MAX_PROMPTS:
            raise RuleError(
                f" has at most {MAX_PROMPTS} prompts, and {name!r} has {len(prompts)}; use fewer.",
                "A class in ",
            )
    return joined


def _prompts(name: str, value: object) -> list[str]:
    before = f"The prompt of {name!r} in "
    if isinstance(value, list | tuple):
        listed = [prompt for prompt in value if prompt not in (None, "")]
    elif value is None or (isinstance(value, str) and value.strip().lower() in NOTHING):
        listed = []
    else:
        return split_phrases(_read_text(value, before) or "")
    return [_prompt(prompt, before) for prompt in listed or [name]]


def _prompt(value: object, before: str) -> str:
    if isinstance(value, list | tuple):
        raise refused("text", value, '"puppy"', before)
    prompt = " ".join((_read_text(value, before) or "").split())
    if not phrase_key(prompt):
        raise refused("at least one word", value, '"puppy"', before)
    return check_phrases([prompt])[0]


TextOrList = Annotated[str | None, BeforeValidator(_read_text)]
ClassName = Annotated[str, BeforeValidator(read_class_name)]
PromptsByClass = Annotated[dict[str, tuple[str, ...]], BeforeValidator(_read_mapping)]

MAX_SUFFIX: Final = 30
MAX_LISTED: Final = 1000
MAX_COORDINATE: Final = 10_000_000

_OFF: Final = ("off", "no", "false")
_YES: Final = ("true", "yes", "on")
# The model looks at 768 x 768 pixels, so a window of this size is not scaled down.
_WINDOW: Final = 768
_OVERLAP: Final = 128


def rule(says: str, example: str, before: str = "") -> WrapValidator:
    """What a type takes, in words: whatever pydantic has to say against a value becomes this."""

    def read(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValueError as error:
            raise refused(says, value, example, before) from error

    return WrapValidator(read)


def whole(low: int, high: int, before: str = "") -> tuple[Any, ...]:
    """A whole number within bounds, as a number or in digits."""
    says = f"a whole number from {low} to {high}"
    return Field(ge=low, le=high), DIGITS, rule(says, str(max(low, 3)), before)


def _digits(value: object) -> float:
    # pydantic's own numbers may be flags and bytes too.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError("too large") from error


def word(value: object) -> object:
    """A word from a list in any case, with spaces or underscores."""
    if not isinstance(value, str):
        return value
    return value.encode("ascii", "replace").decode().strip().lower().replace(" ", "_")


def _off_is_none(value: object) -> object:
    # YAML reads a bare "off" as false.
    return None if value is False or word(value) in _OFF else value


def _pair(value: object) -> object:
    return value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)


def _flag(value: object) -> object:
    return True if word(value) in _YES else False if word(value) in _OFF else value


DIGITS: Final = BeforeValidator(_digits)
_SHARE_RULE: Final = rule("a number from 0 to 1", "0.3")

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), DIGITS, _SHARE_RULE]
ShareOrOff = Annotated[
    Share | None, BeforeValidator(_off_is_none), rule("a number from 0 to 1, or off", "0.7")
]
Flag = Annotated[bool, Strict(), BeforeValidator(_flag), rule("true or false", "true")]
Side = Annotated[int, *whole(32, 100_000)]
Overlap = Annotated[int, *whole(0, 100_000)]
Corner = Annotated[int, *whole(-MAX_COORDINATE, MAX_COORDINATE, before="A side of ")]
_SHARE: Final[TypeAdapter[float]] = TypeAdapter(Share)


def _read_task(value: object) -> str:
    """The canonical ``<OD>`` or ``<CAPTION>+<OCR>`` of a task's token or friendly name."""
    if not isinstance(value, str):
        raise refused("the name of a task", value, '"<OD>"')
    return "+".join(step.token for step in parse_steps(value[:1000]))


def _read_suffix(value: object) -> str:
    """The end of class names, as it is; a space may begin it."""
    if not isinstance(value, str) or len(value) > MAX_SUFFIX or not value.isprintable():
        raise refused(f"at most {MAX_SUFFIX} plain characters", value, '"_auto"')
    return value


def _read_classes(value: object) -> tuple[str, ...] | None:
    """Class names in the order given, each once; a text is parted at commas; None for all."""
    if value is None or word(value) == "all":
        return None
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple | set | frozenset):
        raise refused("a list of class names, or all", value, "[dog, car]")
    check_count(len(value), MAX_LISTED, "classes", "list fewer")
    return tuple(dict.fromkeys(map(read_class_name, value))) or None


def _read_confidence(value: object) -> object:
    """One number. Of a client with one for each ``mode``, that of ``text_prompt`` counts, because a
    reference is also found by words."""
    if isinstance(value, list | tuple):
        raise refused("a number from 0 to 1, or a mapping of them", value, "0.3")
    if isinstance(value, Mapping):
        return value.get("text_prompt", value.get("reference_image"))
    return value


def _read_thresholds(value: object) -> dict[str, float]:
    """A number from 0 to 1 by class."""
    read: dict[str, float] = {}
    by_key: dict[str, float] = {}
    for key, entry in read_table(value, "{dog: 0.4, car: 0.2}").items():
        name = read_class_name(key)
        try:
            read[name] = found = _SHARE.validate_python(entry)
        except ValueError as error:
            before = f"The threshold of {name!r} in "
            raise refused("a number from 0 to 1", entry, "0.3", before) from error
        known = by_key.setdefault(name.casefold(), found)
        if known != found:
            after = f" has {known:g} and {found:g} for {name!r}; keep one of them."
            raise RuleError(after, "A class has one threshold, and ")
    check_count(len(read), MAX_LISTED, "classes", "list fewer")
    return read


Curve = tuple[tuple[float, float], ...]
"""Pairs of a raw score and the share of such objects that are right, straight lines between."""


def _read_calibration(value: object) -> dict[str, Curve]:
    """A curve by class."""
    read: dict[str, Curve] = {}
    by_key: dict[str, Curve] = {}
    for key, entry in read_table(value, "{dog: [[0.2, 0.1], [0.7, 0.9]]}").items():
        name = read_class_name(key)
        read[name] = curve = _read_curve(entry, f"The curve of {name!r} in ")
        if by_key.setdefault(name.casefold(), curve) != curve:
            raise RuleError(f" has two for {name!r}; keep one of them.", "A class has one curve, ")
    check_count(len(read), MAX_LISTED, "classes", "list fewer")
    return read


def _read_curve(value: object, before: str) -> Curve:
    pairs = value if isinstance(value, list | tuple) else ()
    check_count(len(pairs), MAX_LISTED, "pairs", "use fewer", before)
    try:
        curve = tuple((_SHARE.validate_python(x), _SHARE.validate_python(y)) for x, y in pairs)
    except (TypeError, ValueError):
        curve = ()
    steps = list(pairwise(curve))
    if not curve or any(x >= next_x or y > next_y for (x, y), (next_x, next_y) in steps):
        says = (
            "a list of pairs [raw score, share that is right] from 0 to 1, in which raw scores "
            "rise and shares do not fall"
        )
        raise refused(says, value, "[[0.2, 0.1], [0.7, 0.9]]", before)
    return curve


def _read_box(value: object) -> BoxXyxy:
    """(left, top, right, bottom) from [x1, y1, x2, y2], "x1,y1,x2,y2", or an SDK rectangle.

    The SDK counts the last row and column as inside, so these move out by one pixel.
    """
    points = value.get("points") if isinstance(value, Mapping) else None
    exterior = points.get("exterior") if isinstance(points, Mapping) else None
    if isinstance(exterior, list | tuple):
        corners = [_coordinates(corner) for corner in exterior]
        if len(corners) > 1 and all(len(corner) == 2 for corner in corners):
            xs, ys = zip(*corners, strict=True)
            if any(one % 1 for one in (*xs, *ys)):
                # Whole pixels by the SDK's rule; what is added would hide a box of shares.
                _checked_box((min(xs), min(ys), max(xs), max(ys)))
            return min(xs), min(ys), max(xs) + 1, max(ys) + 1
    elif len(box := _coordinates(value.split(",") if isinstance(value, str) else value)) == 4:
        return _checked_box(box)
    says = "a box [x1, y1, x2, y2] in pixels with x1 < x2 and y1 < y2"
    raise refused(says, value, "[10, 20, 200, 180]")


def _coordinates(value: object) -> list[float]:
    """All of the numbers, or none of them when one is no coordinate."""
    try:
        read = [_digits(one) for one in value] if isinstance(value, list | tuple) else []
    except ValueError:
        return []
    return read if all(abs(one) <= MAX_COORDINATE for one in read) else []


def _checked_box(box: Sequence[float]) -> BoxXyxy:
    try:
        return check_region(box, "")
    except RequestError as error:
        raise RuleError(str(error)) from error


def _read_boxes(value: object) -> tuple[BoxXyxy, ...]:
    """One box or a list of boxes."""
    if not isinstance(value, list | tuple) or isinstance(next(iter(value), None), int | float):
        return (_read_box(value),)
    check_count(len(value), MAX_LISTED, "boxes", "split the request")
    return tuple(map(_read_box, value))


def _read_corners(value: object) -> object:
    """What is to be four whole numbers: as other clients write a box, y before x."""
    corners = value.split(",") if isinstance(value, str) else value
    if not isinstance(corners, list | tuple) or len(corners) != 4:
        raise refused("[top, left, bottom, right] in whole pixels", value, "[20, 10, 180, 200]")
    return corners


@dataclass(frozen=True, slots=True)
class Tiling:
    """Windows that an image is looked at through, in pixels of the original image."""

    size_wh: SizeWh
    overlap_wh: SizeWh
    full_image: bool = True

    def __post_init__(self) -> None:
        if self.overlap_wh[0] >= self.size_wh[0] or self.overlap_wh[1] >= self.size_wh[1]:
            raise RuleError(
                f" overlap by less than their size, and an overlap of {shown(self.overlap_wh)} of "
                f"windows of {shown(self.size_wh)} was received; make the overlap smaller.",
                "Windows of ",
            )


class _Windows(BaseModel):
    width: Side = _WINDOW
    height: Side = _WINDOW
    overlap: Annotated[tuple[Overlap, Overlap] | None, BeforeValidator(_pair)] = None
    full_image: Flag = True


class _SlidingWindow(BaseModel):
    width: Side = Field(_WINDOW, alias="windowWidth")
    height: Side = Field(_WINDOW, alias="windowHeight")
    overlap_x: Overlap = Field(0, alias="overlapX")
    overlap_y: Overlap = Field(0, alias="overlapY")


def _read_tiling(value: object) -> Tiling | None:
    """Windows from a mapping, or from one number for both sides; None for off."""
    value = _off_is_none(value)
    if value is None or isinstance(value, Tiling):
        return value
    if isinstance(value, int | float) or (isinstance(value, str) and value.strip().isdigit()):
        value = {"width": value, "height": value}
    entries = read_table(value, "{width: 1024, height: 1024, overlap: 128}")
    for key in entries:
        if key not in _Windows.model_fields:
            raise RuleError(f" {hint(key, _Windows.model_fields)}", "Unknown entry of ")
    read = _Windows.model_validate(_without_empty(entries))
    overlap = min(_OVERLAP, read.width // 4), min(_OVERLAP, read.height // 4)
    return Tiling((read.width, read.height), read.overlap or overlap, read.full_image)


def _read_sliding_window(value: object) -> Tiling:
    """The windows that other clients name; as in the SDK, nothing but the windows."""
    read = _SlidingWindow.model_validate(_without_empty(read_table(value, "{}")))
    size_wh, overlap_wh = (read.width, read.height), (read.overlap_x, read.overlap_y)
    return Tiling(size_wh, overlap_wh, full_image=False)


def _without_empty(entries: Mapping[object, object]) -> dict[object, object]:
    return {key: value for key, value in entries.items() if value not in (None, "")}


def _read_model(value: object) -> str | None:
    if value is None or (isinstance(value, str) and len(value) <= MAX_MODEL_NAME):
        return None if value is None else value.strip()
    raise refused("a name", value, "cats")


ModelName = Annotated[str | None, BeforeValidator(_read_model)]
TaskPrompt = Annotated[str, BeforeValidator(_read_task)]
Classes = Annotated[tuple[str, ...] | None, BeforeValidator(_read_classes)]
Confidence = Annotated[Share, BeforeValidator(_read_confidence)]
Thresholds = Annotated[dict[str, float], BeforeValidator(_read_thresholds)]
Calibration = Annotated[dict[str, Curve], BeforeValidator(_read_calibration)]
Suffix = Annotated[str, BeforeValidator(_read_suffix)]
Rectangle = Annotated[BoxXyxy, BeforeValidator(_read_box)]
Regions = Annotated[tuple[BoxXyxy, ...], BeforeValidator(_read_boxes)]
Corners = Annotated[tuple[Corner, Corner, Corner, Corner], BeforeValidator(_read_corners)]
TilingOrOff = Annotated[Tiling | None, BeforeValidator(_read_tiling)]
DEFAULT_SLIDING_WINDOW: Final = Tiling((_WINDOW, _WINDOW), (0, 0), full_image=False)
SlidingWindow = Annotated[Tiling, BeforeValidator(_read_sliding_window)]
Geometry = Annotated[Literal["polygon", "bitmap"], BeforeValidator(word)]
UnknownTags = Annotated[Literal["tag", "description"], BeforeValidator(word)]
Mode = Annotated[Literal["text_prompt", "reference_image"], BeforeValidator(word)]
InferenceMode = Annotated[Literal["full_image", "sliding_window"], BeforeValidator(word)]
