"""The settings of a labeling run: a settings file, and the command line's own options over it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import yaml

from florence2.errors import RequestError, shown
from florence2.records import check_region
from florence2.tasks import Task, TaskInput, parse_steps
from serve.console import say
from serve.naming import clean_class_name
from serve.settings import (
    Settings,
    changed_settings,
    join_classes,
    parse_settings,
    split_phrases,
)
from serve.settings.schema import SPELLINGS

DETECTION: Final = "<OD>"
GROUNDING: Final = "<CAPTION_TO_PHRASE_GROUNDING>"


def label_settings(
    *,
    file: Path | None = None,
    task: str | None = None,
    prompt: str | None = None,
    classes: Sequence[str] | Mapping[str, Sequence[str]] = (),
    region: str | None = None,
    threshold: float | None = None,
    class_thresholds: Sequence[str] = (),
    nms: str | None = None,
    geometry: str | None = None,
    tiling: str | None = None,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    is_for_folders: bool = True,
) -> Settings:
    """The settings that a command line asks for, before a model is loaded.

    Each option takes the place of its key in ``file``; ``classes`` are written as ``read_classes``
    takes them, or have their prompts by name. Raises RequestError for a prompt, class,
    region or number that breaks a rule, and for settings that do not go together.
    """
    phrases = split_phrases(prompt) if prompt is not None else []
    named = classes if isinstance(classes, Mapping) else read_classes(classes)
    mapping = {name: tuple(prompts) for name, prompts in named.items()}
    if task is None and file is None:
        task = GROUNDING if phrases or mapping else DETECTION
    steps = parse_steps(task) if task is not None else ()
    if threshold is not None and not 0 <= threshold <= 1:
        raise RequestError(
            f"A threshold is between 0 and 1 and got {threshold}; write for example 0.3."
        )
    _check_search(num_beams, max_new_tokens)
    if file is None:
        _check_words(steps[0], phrases, mapping)
        _check_has_region(steps[0], region)
    own: dict[str, Any] = {
        "task_prompt": "+".join(step.token for step in steps) if steps else None,
        "text": prompt,
        "mapping": mapping or None,
        "regions": None if region is None else (_region_xyxy(region),),
        "confidence_threshold": threshold,
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
    }
    own = {key: value for key, value in own.items() if value is not None}
    others = {
        "class_thresholds": dict(map(_class_threshold, class_thresholds)) or None,
        "nms_threshold": nms,
        "geometry": geometry,
        "tiling": tiling,
    }
    others = {key: value for key, value in others.items() if value is not None}
    for key, value in others.items():
        _check_option(key, value)
    if file is None:
        # Checked above by the rules of the command line, which are older than those of requests.
        return parse_settings(others).model_copy(update=own)
    given = _without_other_questions(_read(file), mapping, task, file)
    replaced = {name for key in (*own, *others) for name in SPELLINGS[key]}
    raw = {key: value for key, value in given.items() if key not in replaced} | own | others
    if phrases or mapping:
        # What the command line looks for also takes the place of a reference.
        raw["mode"] = "text_prompt"
    # Only a request of one client has a suffix that it does not name.
    raw.setdefault("class_suffix", None)
    settings = parse_settings(raw)
    _check_is_for_commands(settings, file, is_for_folders=is_for_folders)
    return settings


def _check_option(key: str, value: object) -> None:
    """RequestError for a wrong value, by the name that the option has on a command line."""
    try:
        parse_settings({key: value})
    except RequestError as error:
        option = _OPTIONS.get(key, f"--{key}")
        raise RequestError(re.sub(rf"\b{key}\b(?!\.)", option, str(error))) from error


_OPTIONS: Final = {"class_thresholds": "--class-threshold", "nms_threshold": "--nms"}


def _check_is_for_commands(settings: Settings, file: Path, *, is_for_folders: bool) -> None:
    """RequestError for what only a server can do, or what needs a platform."""
    reference = settings.reference
    if is_for_folders and reference is not None and reference.image_id is not None:
        raise RequestError(
            f"Images of the platform are not looked at here, and {str(file)!r} has a "
            "reference_image_id; leave it out, and reference_bbox is a box on every image."
        )
    if settings.model is not None:
        raise RequestError(
            f"The model that labels is given by --model, and {str(file)!r} names the "
            f"adapter {settings.model!r} of a server; leave model out, and name the adapter's "
            "folder with --model."
        )


def _read(file: Path) -> Mapping[str, object]:
    try:
        given = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise RequestError(
            f"A settings file is YAML such as `task_prompt: <OD>`, and {str(file)!r} cannot be "
            f"read ({reason}); correct it or name another one."
        ) from error
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RequestError(
            f"A settings file has a key and a value on each line, and {str(file)!r} has "
            f"{shown(given)}; write for example `task_prompt: <OD>`."
        )
    return given


def _without_other_questions(
    given: Mapping[str, object],
    mapping: Mapping[str, tuple[str, ...]],
    task: str | None,
    file: Path,
) -> Mapping[str, object]:
    """What a file says, without calibrations of other prompts or another task than are asked for.

    Thresholds of the same classes go with them: they are about calibrated scores. What is dropped
    is said.
    """
    curves, thresholds = given.get("calibration"), given.get("class_thresholds")
    if not isinstance(curves, Mapping) or not (mapping or task):
        return given
    asked_key, task_key = (
        next((key for key in SPELLINGS[name] if given.get(key)), None)
        for name in ("mapping", "task_prompt")
    )
    asked = parse_settings({"mapping": given[asked_key]}).mapping if asked_key else {}
    is_other_task = (
        task is not None
        and task_key is not None
        and parse_steps(task) != parse_steps(str(given[task_key]))
    )
    before = {name.casefold(): prompts for name, prompts in asked.items()}
    now = {name.casefold(): prompts for name, prompts in (mapping or asked).items()}
    dropped = [
        name
        for name in map(str, curves)
        if is_other_task
        or (name.casefold() in before and now.get(name.casefold()) != before[name.casefold()])
    ]
    if not dropped:
        return given
    say(
        f"The calibration in {str(file)!r} of {', '.join(dropped)} is not about what is asked here "
        "and is left out with its threshold: without one, confidence is the model's own score."
    )
    keys = {name.casefold() for name in dropped}

    def kept(of_classes: object) -> object:
        if not isinstance(of_classes, Mapping):
            return of_classes
        return {key: one for key, one in of_classes.items() if str(key).casefold() not in keys}

    return {**given, "calibration": kept(curves), "class_thresholds": kept(thresholds)}


def read_classes(
    classes: Sequence[str], *, by_semicolon: bool = False
) -> dict[str, tuple[str, ...]]:
    """``dog=puppy,hound`` as {"dog": ("puppy", "hound")}; ``dog`` alone asks for "dog".

    With ``by_semicolon`` prompts that a semicolon stands between may have commas. Raises
    RequestError for what is written in another way.
    """
    named: list[tuple[str, list[str]]] = []
    for entry in classes:
        name, _, listed = entry.partition("=")
        name = clean_class_name(name) if name.strip() else ""
        separator = ";" if by_semicolon and ";" in listed else ","
        parts = (listed or name).split(separator)
        prompts = [" ".join(part.split()) for part in parts if part.strip()]
        if not name or not prompts:
            raise RequestError(
                f"A class is written NAME or NAME=prompt,prompt and {entry!r} is neither; "
                "write for example --class dog=puppy,hound."
            )
        named.append((name, prompts))
    return join_classes(named)


def _class_threshold(entry: str) -> tuple[str, str]:
    name, _, threshold = entry.rpartition("=")
    if not name.strip() or not threshold.strip():
        raise RequestError(
            f"A threshold of a class is written NAME=0.6 and {entry!r} is not; write for example "
            "--class-threshold dog=0.6."
        )
    return name, threshold


def _check_words(first: Task, phrases: Sequence[str], mapping: Mapping[str, Sequence[str]]) -> None:
    if first.takes is not TaskInput.TEXT:
        if phrases:
            raise RequestError(
                f"{first.token} takes no text and got the prompt {phrases[0][:60]!r}; "
                f"leave out --prompt, or use --task {GROUNDING!r}."
            )
    elif not phrases and not mapping:
        raise RequestError(
            f"{first.token} needs to be told what to look for and got no text; "
            'add for example --prompt "red car. dog".'
        )


def _check_has_region(first: Task, region: str | None) -> None:
    if first.takes is not TaskInput.REGION:
        if region is not None:
            raise RequestError(
                f"{first.token} takes no region and got {region!r}; leave out --region."
            )
    elif region is None:
        raise RequestError(
            f"{first.token} asks about one region of each image and got none; "
            "add --region x1,y1,x2,y2 in pixels."
        )


def _region_xyxy(region: str) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = (float(part) for part in region.split(","))
    except ValueError as error:
        raise RequestError(
            f"A region is x1,y1,x2,y2 in pixels with x1 < x2 and y1 < y2 and got {region!r}; "
            "write for example --region 10,20,200,180."
        ) from error
    return check_region((x1, y1, x2, y2))


def _check_search(num_beams: int | None, max_new_tokens: int | None) -> None:
    """The engine's own rules, before a model is loaded; its module is slow to import."""
    if num_beams is None and max_new_tokens is None:
        return
    from florence2.records import GenerationSettings, check_settings

    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    check_settings(settings if num_beams is None else replace(settings, num_beams=num_beams))


_IN_THEIR_OWN_WORDS: Final = frozenset({
    "task_prompt", "text", "mapping", "regions", "confidence_threshold", "num_beams",
    "max_new_tokens",
})  # fmt: skip


def journal_settings(settings: Settings, model: str) -> dict[str, Any]:
    """What decides what the labels are, in JSON's types, as journals keep and compare it.

    What earlier versions did not have is there only where it is not the default: their folders
    can be gone on with.
    """
    takes_text = settings.steps[0].takes is TaskInput.TEXT
    prompts = settings.prompts if takes_text else ()
    regions = [list(box) for box in settings.regions]
    others = {
        key: value
        for key, value in changed_settings(settings).items()
        if key not in _IN_THEIR_OWN_WORDS
    }
    return {
        "task": settings.task_prompt,
        "prompts": [prompt.text for prompt in prompts if prompt.text],
        "classes": settings.classes_by_phrase,
        "region": regions[0] if len(regions) == 1 else regions or None,
        "threshold": settings.confidence_threshold,
        "model": model,
        "num_beams": settings.num_beams,
        "max_new_tokens": settings.max_new_tokens,
    } | others
