"""What the right answer to a task is, as records in fractions and as the answer's string."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Final, TypeVar

from florence2.tasks import TASKS, Task, TaskInput
from florence2.tokens import NUM_LOCATION_BINS, POLYGON_END, POLYGON_START, location_token
from florence2_demo import language
from florence2_demo.geometry import FractionBox, PointsXy, QuadXy, box_iou
from florence2_demo.language import left_to_right
from florence2_demo.scene import Scene, SceneObject
from florence2_demo.signs import TextLine

TASK_BY_TOKEN: Final[dict[str, Task]] = {task.token: task for task in TASKS}


@dataclass(frozen=True, slots=True)
class Truth:
    """The right answer. Lists stand side by side where a task has them; coordinates are
    fractions. ``labels`` name ``boxes_xyxy``, ``quads_xy`` or ``polygons_xy``.
    ``objects`` are the things behind boxes and polygons. ``answer`` is the exact string.
    """

    answer: str
    labels: tuple[str, ...] = ()
    boxes_xyxy: tuple[FractionBox, ...] = ()
    quads_xy: tuple[QuadXy, ...] = ()
    polygons_xy: tuple[PointsXy, ...] = ()
    objects: tuple[SceneObject, ...] = ()


def location_bin(fraction: float) -> int:
    """The bin of a coordinate: floor(1000 x), clamped to 0..999."""
    return min(max(int(fraction * NUM_LOCATION_BINS // 1), 0), NUM_LOCATION_BINS - 1)


def locations(fractions: Iterable[float]) -> str:
    """Location tokens of coordinates in a row, x before y."""
    return "".join(location_token(location_bin(fraction)) for fraction in fractions)


def _boxes(things: Iterable[SceneObject], label: Callable[[SceneObject], str]) -> Truth:
    things = tuple(things)
    labels = tuple(label(thing) for thing in things)
    boxes = tuple(thing.box_xyxy for thing in things)
    answer = "".join(f"{text}{locations(box)}" for text, box in zip(labels, boxes, strict=True))
    return Truth(answer, labels, boxes, objects=things)


def _grounded(scene: Scene, text: str) -> Truth:
    """Each phrase that something matches, once, followed by all its boxes."""
    answer, labels, found = "", list[str](), list[SceneObject]()
    for phrase in language.find_phrases(text):
        things = phrase.matches(scene)
        if things:
            answer += phrase.words + "".join(locations(thing.box_xyxy) for thing in things)
            labels += [phrase.words] * len(things)
            found += things
    boxes = tuple(thing.box_xyxy for thing in found)
    return Truth(answer, tuple(labels), boxes, objects=tuple(found))


def _outlined(things: tuple[SceneObject, ...]) -> Truth:
    """One polygon bare, as published; several each between ``<poly>`` and ``</poly>``."""
    spelled = [locations(chain(*thing.polygon_xy)) for thing in things]
    if len(spelled) > 1:
        spelled = [f"{POLYGON_START}{polygon}{POLYGON_END}" for polygon in spelled]
    return Truth(
        "".join(spelled),
        labels=("",) * len(things),
        polygons_xy=tuple(thing.polygon_xy for thing in things),
        objects=things,
    )


def _referred(scene: Scene, text: str) -> Truth:
    phrase = language.find_referred(text)
    return _outlined(phrase.matches(scene) if phrase else ())


_Placed = TypeVar("_Placed", SceneObject, TextLine)


def _nearest(placed: Iterable[_Placed], region: FractionBox) -> tuple[_Placed, ...]:
    """The one whose box overlaps the region most; none where none does."""
    best = max(placed, key=lambda one: box_iou(one.box_xyxy, region), default=None)
    return (best,) if best and box_iou(best.box_xyxy, region) > 0 else ()


def _region_label(scene: Scene, region: FractionBox, label: Callable[[SceneObject], str]) -> Truth:
    """The label followed by the region itself, as the published checkpoints answer."""
    things = _nearest(scene.objects, region)
    labels = tuple(label(thing) for thing in things)
    answer = "".join(f"{text}{locations(region)}" for text in labels)
    return Truth(answer, labels, (region,) * len(things), objects=things)


def _read(lines: Iterable[TextLine]) -> Truth:
    labels = tuple(line.text for line in lines)
    return Truth("\n".join(labels), labels)


def _read_quads(scene: Scene) -> Truth:
    quads = tuple(line.quad_xy for line in scene.texts)
    answer = "".join(f"{line.text}{locations(chain(*line.quad_xy))}" for line in scene.texts)
    return Truth(answer, tuple(line.text for line in scene.texts), quads_xy=quads)


_Namer = Callable[[SceneObject], str]
_KIND: Final[_Namer] = attrgetter("kind")
_NAME: Final[_Namer] = attrgetter("name")
_OF_SCENE: Final[dict[str, Callable[[Scene], Truth]]] = {
    "<CAPTION>": lambda scene: Truth(language.caption(scene)),
    "<DETAILED_CAPTION>": lambda scene: Truth(language.detailed_caption(scene)),
    "<MORE_DETAILED_CAPTION>": lambda scene: Truth(language.more_detailed_caption(scene)),
    "<OD>": lambda scene: _boxes(left_to_right(scene), _KIND),
    "<DENSE_REGION_CAPTION>": lambda scene: _boxes(left_to_right(scene), _NAME),
    "<REGION_PROPOSAL>": lambda scene: _boxes(left_to_right(scene), lambda _: ""),
    "<OCR>": lambda scene: _read(scene.texts),
    "<OCR_WITH_REGION>": _read_quads,
}
_OF_TEXT: Final[dict[str, Callable[[Scene, str], Truth]]] = {
    "<CAPTION_TO_PHRASE_GROUNDING>": _grounded,
    "<OPEN_VOCABULARY_DETECTION>": _grounded,
    "<REFERRING_EXPRESSION_SEGMENTATION>": _referred,
}
_OF_REGION: Final[dict[str, Callable[[Scene, FractionBox], Truth]]] = {
    "<REGION_TO_SEGMENTATION>": lambda scene, box: _outlined(_nearest(scene.objects, box)),
    "<REGION_TO_CATEGORY>": lambda scene, box: _region_label(scene, box, _KIND),
    "<REGION_TO_DESCRIPTION>": lambda scene, box: _region_label(scene, box, _NAME),
    "<REGION_TO_OCR>": lambda scene, box: _read(_nearest(scene.texts, box)),
}


def ground_truth(
    scene: Scene, task: str, text: str | None = None, region_xyxy: FractionBox | None = None
) -> Truth:
    """The right answer to a task token, for any text or region (fractions) a task may take.

    Texts are understood as far as they name the scenes' kinds and colours; everything else in
    them matches nothing. Nothing found gives an empty answer.
    """
    takes = TASK_BY_TOKEN[task].takes
    if takes is TaskInput.TEXT:
        return _OF_TEXT[task](scene, text or "")
    if takes is TaskInput.REGION:
        if region_xyxy is None:
            raise ValueError(f"{task} needs a region in fractions, received none.")
        return _OF_REGION[task](scene, region_xyxy)
    return _OF_SCENE[task](scene)
