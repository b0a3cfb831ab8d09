"""One value of the settings, from whatever a client sent; each reader names its key in errors."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Final, NoReturn

import yaml

from florence2.errors import RequestError
from serve.predict.naming import clean_class_name, clean_text

MAX_NAME: Final = 1000
MAX_TEXT: Final = 120_000
MAX_SUFFIX: Final = 30

_OFF: Final = ("off", "no", "false")
_YES: Final = ("true", "yes", "on")
NOTHING: Final = ("", "none", "null", "~")


def shown(value: object) -> str:
    """A received value in one short line, for a message."""
    try:
        text = " ".join(reprlib.repr(value).split())
    except ValueError:  # an integer with thousands of digits
        return "a very long number"
    return text if len(text) <= 80 else text[:77] + "..."


def refuse(name: str, rule: str, value: object, example: str) -> NoReturn:
    """RequestError: the rule, the value received, what to write."""
    raise RequestError(
        f"{name} is {rule}, and {shown(value)} was received; write for example {example}."
    )


def nearest(kind: str, received: object, known: Iterable[str]) -> str:
    """One sentence about a name that is in no list, with the nearest one that is."""
    choices = list(known)
    words = received[:100] if isinstance(received, str) else shown(received)
    near = difflib.get_close_matches(words, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(choices)}."
    return f"Unknown {kind} {shown(received)}; {hint}"


def number(name: str, value: object, low: float = 0.0, high: float = 1.0) -> float:
    """A number from ``low`` to ``high``, as a number or in digits."""
    read = _float(value)
    if read is None or not low <= read <= high:
        refuse(name, f"a number from {low:g} to {high:g}", value, "0.3")
    return read


def _float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def share_or_off(name: str, value: object) -> float | None:
    """A number from 0 to 1, or None for off (which YAML reads as false)."""
    if value is False or (isinstance(value, str) and value.strip().lower() in _OFF):
        return None
    read = _float(value)
    if read is None or not 0 <= read <= 1:
        refuse(name, "a number from 0 to 1, or off", value, "0.7")
    return read


def whole(name: str, value: object, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, as a number or in digits."""
    read = _float(value)
    if read is None or not low <= read <= high or read != int(read):
        refuse(name, f"a whole number from {low} to {high}", value, str(max(low, 3)))
    return int(read)


def flag(name: str, value: object) -> bool:
    """True or false, or the word for it."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word is True or word in _YES:
        return True
    if word is False or word in _OFF:
        return False
    refuse(name, "true or false", value, "true")


def choice(name: str, value: object, known: tuple[str, ...]) -> str:
    """One of the ``known`` words, in any case, with spaces or underscores."""
    word = value.strip().lower().replace(" ", "_") if isinstance(value, str) else value
    if word not in known:
        raise RequestError(nearest(name, value, known))
    return str(word)


def text(name: str, value: object) -> str | None:
    """Clean text, a list being its lines; None when nothing is left."""
    entries = value if isinstance(value, list | tuple) else [value]
    lines = [_words(name, entry) for entry in entries if entry is not None]
    joined = "\n".join(line for line in lines if line)
    return joined or None


def _words(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        refuse(name, "text or a list of texts", value, '"red car. dog"')
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise RequestError(
            f"{name} has at most {MAX_TEXT} characters, and {len(value)} were received; "
            "split the request."
        )
    return clean_text(value if isinstance(value, str) else shown(value))


def suffix(name: str, value: object) -> str:
    """The end of class names, as it is; a space may begin it."""
    if not isinstance(value, str) or len(value) > MAX_SUFFIX or not value.isprintable():
        refuse(name, f"at most {MAX_SUFFIX} plain characters", value, '"_auto"')
    return value


def class_name(name: str, value: object) -> str:
    """A class name made safe; a number is one too, because YAML reads bare digits so."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        refuse(f"A class in {name}", "a name", value, '"dog"')
    words = value if isinstance(value, str) else shown(value)
    if not words.strip() or len(words) > MAX_NAME:
        refuse(f"A class in {name}", f"a name of 1 to {MAX_NAME} characters", value, '"dog"')
    return clean_class_name(words)


def table(name: str, value: object, example: str) -> Mapping[object, object]:
    """A mapping, or one written as YAML or JSON in a text."""
    read = _parsed(value) if isinstance(value, str) else value
    if not isinstance(read, Mapping):
        refuse(name, "a mapping", value, example)
    return read


def _parsed(written: str) -> object:
    """Everything a text says as texts, lists and mappings; the text itself if it is no YAML."""
    try:
        return yaml.load(written[:MAX_TEXT], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return written
