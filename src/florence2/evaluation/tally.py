"""Collects marks of answers scene by scene, and makes figures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from florence2.errors import FlorenceError
from florence2.evaluation import detections
from florence2.evaluation.bootstrap import Measured, measure, resamplings
from florence2.evaluation.detections import SceneBoxes
from florence2.evaluation.figures import IOU_THRESHOLDS, Figure, MeanAveragePrecision, Ratio
from florence2.evaluation.marks import (
    MARKINGS,
    fraction_boxes,
    is_well_formed,
    speaks_known_words,
)
from florence2.evaluation.questions import Question
from florence2.records import Box, Result

FIGURES: Final = (
    "od_map50",
    "od_map",
    "grounding_recall50",
    "ovd_recall50",
    "proposal_recall50",
    "segmentation_miou",
    "ocr_cer",
    "category_accuracy",
    "caption_exact",
    "ece",
)
"""The figures that name a checkpoint's quality, in the order of the report; others follow."""


@dataclass(slots=True)
class Form:
    """How the answers to one task are spelled: of ``asked``, so many."""

    asked: int = 0
    well_formed: int = 0
    known_words: int = 0


class Tally:
    """The marks of ``num_scenes`` scenes; memory grows by a few numbers per scene."""

    def __init__(self, tasks: Sequence[str], num_scenes: int) -> None:
        self.num_scenes = num_scenes
        self.forms = {task: Form() for task in tasks}
        self.boxes: list[SceneBoxes] = []
        self._marks = {
            marking.name: np.zeros((2, num_scenes))
            for marking in MARKINGS
            if any(task in tasks for task in marking.tasks)
        }

    def add(self, scene_number: int, question: Question, result: Result) -> None:
        """Counts one answer; ``scene_number`` is 0 for the first scene."""
        form = self.forms[question.task]
        form.asked += 1
        form.well_formed += is_well_formed(result)
        form.known_words += speaks_known_words(result)
        for marking in MARKINGS:
            if question.task in marking.tasks:
                self._marks[marking.name][:, scene_number] += marking.mark(question, result)
        if question.task == "<OD>":
            self.boxes.append(scene_boxes(question, result))

    def measured(self, seed: int) -> dict[str, Measured]:
        """Every figure of the tasks asked, with its interval over resampled scenes."""
        figures: dict[str, Figure] = {}
        if "<OD>" in self.forms:
            ranked = detections.rankings(self.boxes, IOU_THRESHOLDS)
            figures["od_map50"] = MeanAveragePrecision(detections.rankings(self.boxes, (0.5,)))
            figures["od_map"] = MeanAveragePrecision(ranked)
            figures["ece"] = detections.calibration(self.boxes)
        figures |= {name: Ratio(*marks) for name, marks in self._marks.items()}
        weights = resamplings(self.num_scenes, seed)
        names = sorted(figures, key=_rank)
        return {name: measure(figures[name], weights) for name in names}


def _rank(name: str) -> int:
    return FIGURES.index(name) if name in FIGURES else len(FIGURES)


def scene_boxes(question: Question, result: Result) -> SceneBoxes:
    """The boxes of one answer to ``<OD>`` and the true ones; FlorenceError without scores."""
    boxes, labels = fraction_boxes(result)
    scores = [thing.score for thing in result.objects if isinstance(thing, Box)]
    known = tuple(score for score in scores if score is not None)
    if len(known) < len(boxes):
        raise FlorenceError("Average precision needs a score for every box, and some have none.")
    truth = question.truth
    return SceneBoxes(boxes, labels, known, truth.boxes_xyxy, truth.labels)
