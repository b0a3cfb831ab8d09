"""What people labeled, whatever format it was kept in: what training, evaluation and tuning read.

Coordinates are floats in pixels of the upright image, x before y, origin top left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from florence2.records import BoxXyxy, SizeWh

Ring = tuple[float, ...]
"""An outline (x1, y1, x2, y2, ...)."""


@dataclass(frozen=True, slots=True)
class LabeledObject:
    """One thing that someone labeled. ``rings_xy`` are its outlines, none where it is a box.

    ``texts`` are what is written on it or said about it, by the name of the tag: ``text``,
    ``description``.
    """

    label: str
    box_xyxy: BoxXyxy
    rings_xy: tuple[Ring, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WantedAnswer:
    """A question and the whole answer to it, as files of ``{image, prefix, suffix}`` keep them.

    ``prefix`` is a task prompt with its text, such as ``<OD>`` or ``<DocVQA>How much?``; ``suffix``
    the answer with its location tokens.
    """

    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True)
class LabeledImage:
    """An image and what people say is in it; one without objects was looked at and has none.

    ``name`` is unique in its data. ``dataset`` is the folder, split or dataset it came from
    ("parent/child" for one inside another), and "" where there is none. ``tags`` are those of the
    image, with None for a tag without a value. Where there are ``answers``, ``objects`` are what
    those that locate something say, read once more: train on the answers. ``crowds`` are regions
    with many things of a class that nobody told apart: what is found there is neither right nor
    wrong.
    """

    path: Path
    name: str
    size_wh: SizeWh
    objects: tuple[LabeledObject, ...] = ()
    tags: Mapping[str, str | None] = field(default_factory=dict)
    dataset: str = ""
    answers: tuple[WantedAnswer, ...] = ()
    crowds: tuple[LabeledObject, ...] = ()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that could not be used, and why in one sentence."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class LabeledData:
    """All labeled images of one source, in the order of their names.

    ``format`` is ``supervisely``, ``coco``, ``yolo`` or ``jsonl``; ``classes`` are those that the
    source names, with or without objects. ``left_out`` names what was passed over: images that
    cannot be read, and single objects of the images that could.
    """

    source: Path
    format: str
    images: tuple[LabeledImage, ...]
    classes: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()
