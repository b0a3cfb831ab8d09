"""Phrases: how a text and a mapping are parted into prompts, and which class each belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import yaml
from pydantic import BeforeValidator

from florence2.errors import RequestError
from serve.predict.naming import clean_class_name, clean_text, phrase_key
from serve.settings.errors import RuleError, check_count, refused, shown

MAX_PHRASE: Final = 1000
MAX_PHRASES: Final = 100
MAX_CLASS_NAME: Final = 1000
MAX_CLASSES: Final = 100
MAX_PROMPTS: Final = 20
MAX_TEXT: Final = 120_000

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
