"""What a labeling run asks about every image: typed, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from florence2.errors import RequestError
from florence2.prompts import check_region
from florence2.records import Region
from florence2.tasks import Task, TaskInput, parse_steps
from serve.predict.naming import clean_class_name
from serve.settings import Prompt, classes_of, join_classes, prompts_of, split_phrases

__all__ = ["DEFAULT_TASK", "DEFAULT_TEXT_TASK", "Plan", "Prompt", "make_plan"]

DEFAULT_TASK: Final = "<OD>"
DEFAULT_TEXT_TASK: Final = "<CAPTION_TO_PHRASE_GROUNDING>"


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
    phrases = split_phrases(prompt) if prompt is not None else []
    mapping = _mapping(classes)
    wanted = task or (DEFAULT_TEXT_TASK if phrases or mapping else DEFAULT_TASK)
    steps = parse_steps(wanted)
    _check_threshold(threshold)
    _check_search(num_beams, max_new_tokens)
    return Plan(
        task="+".join(step.token for step in steps),
        prompts=_prompts(steps[0], phrases, mapping),
        classes=tuple(classes_of(phrases, mapping).items()),
        model=model,
        region=_region(steps[0], region),
        threshold=threshold,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )


def _mapping(classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``dog=puppy,hound`` as {"dog": ("puppy", "hound")}; ``dog`` alone asks for "dog"."""
    named: list[tuple[str, list[str]]] = []
    for entry in classes:
        name, _, listed = entry.partition("=")
        name = clean_class_name(name) if name.strip() else ""
        prompts = [" ".join(part.split()) for part in (listed or name).split(",") if part.strip()]
        if not name or not prompts:
            raise RequestError(
                f"A class is written NAME or NAME=prompt,prompt and {entry!r} is neither; "
                "write for example --class dog=puppy,hound."
            )
        named.append((name, prompts))
    return join_classes(named)


def _prompts(
    first: Task, phrases: list[str], mapping: dict[str, tuple[str, ...]]
) -> tuple[Prompt, ...]:
    if first.takes is not TaskInput.TEXT:
        if phrases:
            raise RequestError(
                f"{first.token} takes no text and got the prompt {phrases[0][:60]!r}; "
                f"leave out --prompt, or use --task {DEFAULT_TEXT_TASK!r}."
            )
        return (Prompt(),)
    if not phrases and not mapping:
        raise RequestError(
            f"{first.token} needs to be told what to look for and got no text; "
            'add for example --prompt "red car. dog".'
        )
    return prompts_of(phrases, mapping)


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
    except ValueError as error:
        raise RequestError(
            f"A region is x1,y1,x2,y2 in pixels with x1 < x2 and y1 < y2 and got {region!r}; "
            "write for example --region 10,20,200,180."
        ) from error
    return Region(check_region((x1, y1, x2, y2)))


def _check_search(num_beams: int | None, max_new_tokens: int | None) -> None:
    """The engine's own rules, before a model is loaded; its module is slow to import."""
    if num_beams is None and max_new_tokens is None:
        return
    from florence2.generation.settings import check_settings
    from florence2.records import GenerationSettings

    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    check_settings(settings if num_beams is None else replace(settings, num_beams=num_beams))


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise RequestError(
            f"A threshold is between 0 and 1 and got {threshold}; write for example 0.3."
        )
