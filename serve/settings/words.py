"""What to look for and what to call it: mapping, whitelist and thresholds by class."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from florence2.errors import RequestError
from serve.phrases import check_phrases, join_classes, split_phrases
from serve.predict.naming import FIXED_SHAPES, phrase_key
from serve.settings.values import NOTHING, class_name, number, refuse, table, text

Confidence = float | dict[str, float]

MAX_CLASSES: Final = 100
MAX_PROMPTS: Final = 20
MAX_LISTED: Final = 1000

ADVERTISED: Final = frozenset(FIXED_SHAPES)
"""The classes that the app itself tells clients about; some send them back with every request."""

_PER_MODE: Final = frozenset({"text_prompt", "reference_image"})


def mapping(name: str, value: object) -> dict[str, tuple[str, ...]]:
    """Prompts by class. A text is parted like ``text``, entries of a list are prompts as they are,
    and a class without prompts is asked for by its own name."""
    entries = table(name, value, "{dog: [puppy, hound], car: red car}")
    if len(entries) > MAX_CLASSES:
        raise RequestError(
            f"{name} has at most {MAX_CLASSES} classes, and {len(entries)} were received; "
            "split the request."
        )
    named = [(class_name(name, key), prompts) for key, prompts in entries.items()]
    joined = join_classes([(one, _prompts(name, one, prompts)) for one, prompts in named])
    for one, prompts in joined.items():
        if len(prompts) > MAX_PROMPTS:
            raise RequestError(
                f"A class in {name} has at most {MAX_PROMPTS} prompts, and {one!r} has "
                f"{len(prompts)}; use fewer."
            )
    return joined


def _prompts(name: str, one: str, value: object) -> list[str]:
    where = f"The prompt of {one!r} in {name}"
    if value is None or (isinstance(value, str) and value.strip().lower() in NOTHING):
        return [_phrase(where, one)]
    if not isinstance(value, list | tuple):
        return split_phrases(text(where, value) or "")
    prompts = [_phrase(where, entry) for entry in value if entry not in (None, "")]
    return prompts or [_phrase(where, one)]


def _phrase(where: str, value: object) -> str:
    if isinstance(value, list | tuple):
        refuse(where, "text", value, '"puppy"')
    prompt = " ".join((text(where, value) or "").split())
    if not phrase_key(prompt):
        refuse(where, "at least one word", value, '"puppy"')
    return check_phrases([prompt])[0]


def whitelist(name: str, value: object) -> tuple[str, ...] | None:
    """Class names in the order given, each once; a text is parted at commas; None for all."""
    if isinstance(value, str):
        if value.strip().lower() == "all":
            return None
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple | set | frozenset):
        refuse(name, "a list of class names, or all", value, "[dog, car]")
    if len(value) > MAX_LISTED:
        raise RequestError(
            f"{name} has at most {MAX_LISTED} classes, and {len(value)} were received; list fewer."
        )
    return tuple(dict.fromkeys(class_name(name, one) for one in value)) or None


def without_echo(listed: tuple[str, ...] | None, asked: Collection[str]) -> tuple[str, ...] | None:
    """``listed``, or None where it only repeats what the app advertises and nobody asked for.

    Clients send the classes of the model meta: those it always has, some of them, or all of them
    with the classes that were seen since.
    """
    if listed is None or any(one in asked and one in ADVERTISED for one in listed):
        return listed
    is_echo = ADVERTISED.issuperset(listed) or ADVERTISED.issubset(listed)
    return None if is_echo else listed


def thresholds(name: str, value: object) -> dict[str, float]:
    """A number from 0 to 1 by class."""
    read: dict[str, float] = {}
    by_key: dict[str, float] = {}
    for key, entry in table(name, value, "{dog: 0.4, car: 0.2}").items():
        one = class_name(name, key)
        found = number(f"The threshold of {one!r} in {name}", entry)
        before = by_key.setdefault(one.casefold(), found)
        if before != found:
            raise RequestError(
                f"A class has one threshold, and {name} has {before:g} and {found:g} for "
                f"{one!r}; keep one of them."
            )
        read[one] = found
    if len(read) > MAX_LISTED:
        raise RequestError(
            f"{name} has at most {MAX_LISTED} classes, and {len(read)} were received; list fewer."
        )
    return read


def confidence(name: str, value: object) -> Confidence:
    """One number, or numbers by class.

    A client with a number for each ``mode`` sends both, in a list or a mapping; that of
    ``text_prompt`` counts, because a reference is also found by words.
    """
    if isinstance(value, list | tuple):
        if not all(isinstance(part, dict) for part in value):
            refuse(name, "a number from 0 to 1, or a mapping of them", value, "0.3")
        value = {key: entry for part in value for key, entry in part.items()}
    if isinstance(value, dict) and value and _PER_MODE.issuperset(value):
        return number(name, value.get("text_prompt", value.get("reference_image")))
    if isinstance(value, dict) or (isinstance(value, str) and ":" in value):
        return thresholds(name, value)
    return number(name, value)
