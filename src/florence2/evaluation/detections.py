"""Scored boxes of many scenes, judged together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from florence2.evaluation.figures import CalibrationError, Floats, Ranking
from florence2.evaluation.matching import keep_best, match_by_rank
from florence2.evaluation.overlaps import box_ious
from florence2.records import BoxXyxy


@dataclass(frozen=True, slots=True)
class SceneBoxes:
    """What was found in one scene, and what is there. Boxes in any one unit."""

    boxes: tuple[BoxXyxy, ...]
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    true_boxes: tuple[BoxXyxy, ...]
    true_labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """Predictions [D] with their scores, of which scene, and whether right [T, D]."""

    scores: Floats
    scenes: NDArray[np.int64]
    right: NDArray[np.bool_]


def judge(scenes: Sequence[SceneBoxes], label: str, thresholds: Sequence[float]) -> Judged:
    """All predictions of one label, best score first; equal scores stay in scene order."""
    parts = [_judge_scene(scene, label, thresholds) for scene in scenes]
    scores = np.concatenate([scores for scores, _ in parts] or [np.zeros(0)])
    right = np.concatenate([r for _, r in parts] or [np.zeros((len(thresholds), 0), bool)], axis=1)
    numbers = np.repeat(np.arange(len(parts)), [len(scores) for scores, _ in parts])
    order = np.argsort(-scores, kind="stable")
    return Judged(scores[order], numbers[order], right[:, order])


def _judge_scene(
    scene: SceneBoxes, label: str, thresholds: Sequence[float]
) -> tuple[Floats, NDArray[np.bool_]]:
    own = [place for place, name in enumerate(scene.labels) if name == label]
    ranked = [own[place] for place in keep_best([scene.scores[place] for place in own])]
    true = [
        box for box, name in zip(scene.true_boxes, scene.true_labels, strict=True) if name == label
    ]
    ious = box_ious([scene.boxes[place] for place in ranked], true)
    right = np.stack([match_by_rank(ious, threshold) for threshold in thresholds])
    return np.array([scene.scores[place] for place in ranked], np.float64), right


def rankings(scenes: Sequence[SceneBoxes], thresholds: Sequence[float]) -> list[Ranking]:
    """One ranking per label that truly occurs."""
    found = []
    for label in sorted({name for scene in scenes for name in scene.true_labels}):
        judged = judge(scenes, label, thresholds)
        positives = np.array([scene.true_labels.count(label) for scene in scenes], np.float64)
        found.append(Ranking(judged.right, judged.scenes, positives))
    return found


def pooled(scenes: Sequence[SceneBoxes], threshold: float = 0.5) -> Judged:
    """The predictions of all labels, also of those that never truly occur, which are wrong."""
    labels = sorted({name for scene in scenes for name in (*scene.labels, *scene.true_labels)})
    parts = [judge(scenes, label, (threshold,)) for label in labels] or [
        judge((), "", (threshold,))
    ]
    return Judged(
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.scenes for part in parts]),
        np.concatenate([part.right for part in parts], axis=1),
    )


def calibration(scenes: Sequence[SceneBoxes]) -> CalibrationError:
    """Of the scores, against being right at an overlap of 0.5."""
    judged = pooled(scenes)
    return CalibrationError(judged.scores, judged.right[0], judged.scenes)
