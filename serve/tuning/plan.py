"""What is tried on which images: classes and their prompts, windows, a part of the data."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from florence2.errors import RequestError, unknown_name
from florence2.evaluation.operating_points import Objective
from florence2.labeled.records import LabeledData, LabeledImage
from florence2.records import SizeWh
from florence2.tasks import OutputKind, TaskInput
from serve.naming import clean_class_name
from serve.settings import Settings, Tiling, parse_settings

UNTUNED_NMS: Final = 0.7
DEFAULT_NMS: Final = (UNTUNED_NMS, 0.5, 0.3)
_WINDOW_SHARE: Final = 0.6
_SHARPER: Final = 1.25

Prompts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """What is tried. ``prompts`` by class, each once; what is found is right from ``iou`` on.

    ``tilings``, of which the first is None, and ``nms`` are in the order in which they are
    preferred. ``settings`` are all prompts at once with nothing left out. RequestError for what
    cannot be asked.
    """

    prompts: Mapping[str, Prompts]
    task: str
    tilings: tuple[Tiling | None, ...] = (None,)
    nms: tuple[float | None, ...] = DEFAULT_NMS
    objective: Objective = field(default_factory=Objective)
    iou: float = 0.5
    num_beams: int | None = None

    settings: Settings = field(init=False)

    def __post_init__(self) -> None:
        settings = parse_settings(
            {
                "task_prompt": self.task,
                "mapping": {name: list(prompts) for name, prompts in self.prompts.items()},
                "num_beams": self.num_beams,
                "nms_threshold": "off",
            }
        )
        first, last = settings.steps[0], settings.steps[-1]
        if first.takes is not TaskInput.TEXT or last.output is OutputKind.TEXT:
            raise RequestError(
                f"Prompts are tuned with a task that takes text and finds places, and "
                f"{self.task} does not; leave out --task, or name <OPEN_VOCABULARY_DETECTION>."
            )
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "prompts", settings.mapping)


def classes_in(
    data: LabeledData, named: Mapping[str, Prompts]
) -> tuple[dict[str, Prompts], dict[str, int]]:
    """The prompts to try, by class as it is called in the data, and how many objects are ignored.

    A class without prompts is asked for by its name; with nothing named, so is every class that has
    objects. Names are compared in any case. RequestError for data without objects, and for a class
    that it does not have.
    """
    labels = [clean_class_name(one.label) for image in data.images for one in image.objects]
    if not labels:
        raise RequestError(
            f"Tuning compares answers with labeled objects, and {str(data.source)!r} has none; "
            "label some first."
        )
    known: dict[str, str] = {}
    for name in (*map(clean_class_name, data.classes), *labels):
        known.setdefault(name.casefold(), name)
    counts = Counter(known[label.casefold()] for label in labels)
    chosen: dict[str, Prompts] = {}
    for asked, prompts in (named or dict.fromkeys(counts, ())).items():
        found = known.get(asked.casefold())
        if found is None:
            raise RequestError(unknown_name("class", asked, known.values()))
        chosen[found] = prompts or (found.replace("_", " "),)
    if not any(counts[name] for name in chosen):
        raise RequestError(
            f"Tuning compares answers with labeled objects, and there is none of "
            f"{', '.join(chosen)}; label some, or name another --class."
        )
    return chosen, {name: count for name, count in counts.items() if name not in chosen}


def some_of(images: Sequence[LabeledImage], most: int) -> list[LabeledImage]:
    """At most so many of the images, drawn by a hash of their names, which also parts them."""
    return sorted(images, key=lambda image: _hash(image.name))[:most]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()


def windows_for(sizes_wh: Sequence[SizeWh], input_wh: SizeWh) -> Tiling | None:
    """Windows for images that are larger than what the network looks at, ``input_wh``.

    Four of them cover an image of the middle size. None where there would be little more to see.
    """
    width, height = (round(median(size[axis] for size in sizes_wh)) for axis in (0, 1))
    if width <= _SHARPER * input_wh[0] and height <= _SHARPER * input_wh[1]:
        return None
    window_wh = _window(width), _window(height)
    overlap_wh = _overlap(width, window_wh[0]), _overlap(height, window_wh[1])
    return Tiling(window_wh, overlap_wh)


def _window(length: int) -> int:
    return max(32, math.ceil(_WINDOW_SHARE * length))


def _overlap(length: int, window: int) -> int:
    return min(max(0, 2 * window - length), window // 2)
