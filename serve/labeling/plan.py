"""What a labeling run asks about every image: typed, checked before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from florence2.cascade import parse_steps
from florence2.errors import RequestError
from florence2.records import Region
from florence2.tasks import Task, TaskInput
from serve.naming import clean_class_name, phrase_key

DEFAULT_TASK: Final = "<OD>"
DEFAULT_TEXT_TASK: Final = "<CAPTION_TO_PHRASE_GROUNDING>"
MAX_PHRASE: Final = 1000
MAX_PHRASES: Final = 100

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


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides what the labels are; runs that differ here do not mix."""

    task: str
    prompts: tuple[Prompt, ...]
    classes: tuple[tuple[str, str], ...]
    model: str
    region: Region | None = None
    threshold: float = 0.0
    num_beams: int | None = None
    max_new_tokens: int | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The user's classes in the order in which they were named."""
        return tuple(dict.fromkeys(name for _, name in self.classes))

    def settings(self) -> dict[str, Any]:
        """The plan in JSON's types, as journals keep and compare it."""
        return {
            "task": self.task,
            "prompts": [prompt.text for prompt in self.prompts if prompt.text],
            "classes": dict(self.classes),
            "region": list(self.region.box_xyxy) if self.region else None,
            "threshold": self.threshold,
            "model": self.model,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
        }


def make_plan(
    *,
    task: str | None = None,
    prompt: str | None = None,
    classes: Sequence[str] = (),
    region: str | None = None,
    threshold: float = 0.0,
    model: str,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
) -> Plan:
    """The plan for the words of a command line.

    Raises RequestError for a prompt, class, region or number that breaks a rule.
    """
    phrases = _phrases(prompt) if prompt is not None else []
    mapping = _mapping(classes)
    wanted = task or (DEFAULT_TEXT_TASK if phrases or mapping else DEFAULT_TASK)
    steps = parse_steps(wanted)
    _check_threshold(threshold)
    _check_search(num_beams, max_new_tokens)
    return Plan(
        task="+".join(step.token for step in steps),
        prompts=_prompts(steps[0], phrases, mapping),
        classes=_classes(phrases, mapping),
        model=model,
        region=_region(steps[0], region),
        threshold=threshold,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )


def _phrases(prompt: str) -> list[str]:
    parts = [" ".join(part.split()) for part in _parts(prompt)]
    phrases = list(
        {phrase_key(part): part for part in reversed(parts) if phrase_key(part)}.values()
    )
    if not phrases:
        raise RequestError(
            f"A prompt names at least one thing and {prompt!r} names none; "
            'write for example --prompt "red car. dog".'
        )
    return _checked(phrases[::-1])


def _parts(prompt: str) -> Iterator[str]:
    """The prompt cut at full stops, semicolons and line ends, but not after an abbreviation."""
    start = 0
    for end in _PHRASE_END.finditer(prompt):
        if end.group().startswith(".") and _ABBREVIATION.search(prompt[start : end.start()]):
            continue
        yield prompt[start : end.start()]
        start = end.end()
    yield prompt[start:]


def _checked(phrases: list[str]) -> list[str]:
    if len(phrases) > MAX_PHRASES:
        raise RequestError(
            f"A run asks for at most {MAX_PHRASES} phrases and got {len(phrases)}; split the run."
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
                f"{special.group()!r}; remove it, and choose the task with --task."
            )
    return phrases


def _mapping(classes: Sequence[str]) -> dict[str, list[str]]:
    """``dog=puppy,hound`` as {"dog": ["puppy", "hound"]}; ``dog`` alone asks for "dog"."""
    mapping: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    for entry in classes:
        name, _, listed = entry.partition("=")
        name = clean_class_name(name) if name.strip() else ""
        prompts = [" ".join(part.split()) for part in (listed or name).split(",") if part.strip()]
        if not name or not prompts:
            raise RequestError(
                f"A class is written NAME or NAME=prompt,prompt and {entry!r} is neither; "
                "write for example --class dog=puppy,hound."
            )
        for prompt in _checked(prompts):
            owner = owners.setdefault(phrase_key(prompt), name)
            if owner != name:
                raise RequestError(
                    f"A prompt belongs to one class and {prompt!r} is given to {owner!r} and "
                    f"{name!r}; keep one of them."
                )
        mapping.setdefault(name, []).extend(prompts)
    return mapping


def _classes(phrases: list[str], mapping: dict[str, list[str]]) -> tuple[tuple[str, str], ...]:
    named = {phrase_key(p): name for name, prompts in mapping.items() for p in prompts}
    asked = {phrase_key(p): clean_class_name(p) for p in phrases}
    return tuple((asked | named).items())


def _prompts(first: Task, phrases: list[str], mapping: dict[str, list[str]]) -> tuple[Prompt, ...]:
    if first.takes is not TaskInput.TEXT:
        if phrases:
            raise RequestError(
                f"{first.token} takes no text and got the prompt {phrases[0][:60]!r}; "
                f"leave out --prompt, or use --task {DEFAULT_TEXT_TASK!r}."
            )
        return (Prompt(),)
    mapped = {
        phrase_key(text): Prompt(text, name) for name, texts in mapping.items() for text in texts
    }
    asked = {phrase_key(text): Prompt(text) for text in phrases}
    if not asked and not mapped:
        raise RequestError(
            f"{first.token} needs to be told what to look for and got no text; "
            'add for example --prompt "red car. dog".'
        )
    return tuple((asked | mapped).values())


def _region(first: Task, region: str | None) -> Region | None:
    if first.takes is not TaskInput.REGION:
        if region is not None:
            raise RequestError(
                f"{first.token} takes no region and got {region!r}; leave out --region."
            )
        return None
    if region is None:
        raise RequestError(
            f"{first.token} asks about one region of each image and got none; "
            "add --region x1,y1,x2,y2 in pixels."
        )
    try:
        x1, y1, x2, y2 = (float(part) for part in region.split(","))
    except ValueError:
        x1 = y1 = x2 = y2 = float("nan")
    if not (0 <= x1 < x2 < float("inf") and 0 <= y1 < y2 < float("inf")):
        raise RequestError(
            f"A region is x1,y1,x2,y2 in pixels with x1 < x2 and y1 < y2 and got {region!r}; "
            "write for example --region 10,20,200,180."
        )
    return Region((x1, y1, x2, y2))


def _check_search(num_beams: int | None, max_new_tokens: int | None) -> None:
    """The engine's own rules, before a model is loaded; its module is slow to import."""
    if num_beams is None and max_new_tokens is None:
        return
    from florence2.generate import check_settings
    from florence2.records import GenerationSettings

    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    check_settings(settings if num_beams is None else replace(settings, num_beams=num_beams))


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise RequestError(
            f"A threshold is between 0 and 1 and got {threshold}; write for example 0.3."
        )
