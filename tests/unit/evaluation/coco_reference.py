"""Scenes with random boxes, and what an independent evaluator says of them."""

from __future__ import annotations

import numpy as np
import pytest

from florence2.evaluation.detection import ImageBoxes


def random_scenes(seed, count=40, *, crowded=False):
    """True boxes, and predictions that hit some of them by some; ``crowded`` images have crowds
    too, which hold some of the predictions and some of the true boxes."""
    rng = np.random.default_rng(seed)
    scenes = []
    for _ in range(count):
        true = [random_box(rng) for _ in range(rng.integers(0, 6))]
        names = [str(rng.choice(["ball", "car", "cup"])) for _ in true]
        hit = [place for place in range(len(true)) if rng.random() < 0.9]
        boxes = [tuple(np.array(true[place]) + rng.normal(0, 2, 4)) for place in hit]
        labels = [names[place] for place in hit]
        boxes += [random_box(rng) for _ in range(rng.integers(0, 4))]
        labels += [str(rng.choice(["ball", "car", "cup"])) for _ in boxes[len(labels) :]]
        scores = rng.permutation(1000)[: len(boxes)] / 1000
        crowds = [random_box(rng) for _ in range(rng.integers(0, 4))] if crowded else []
        of_crowds = [str(rng.choice(["ball", "car", "cup"])) for _ in crowds]
        scenes.append(
            ImageBoxes(
                tuple(boxes),
                tuple(labels),
                tuple(scores),
                tuple(true),
                tuple(names),
                crowd_boxes=tuple(crowds),
                crowd_labels=tuple(of_crowds),
            )
        )
    return scenes


def random_box(rng):
    x, y, w, h = rng.uniform(0, 60), rng.uniform(0, 60), rng.uniform(10, 40), rng.uniform(10, 40)
    return (float(x), float(y), float(x + w), float(y + h))


IDS = {"ball": 1, "car": 2, "cup": 3}


def coco_rows(scenes, boxes, labels):
    """What the attributes ``boxes`` and ``labels`` of the scenes hold, as COCO writes it."""
    for number, scene in enumerate(scenes, start=1):
        for box, label in zip(getattr(scene, boxes), getattr(scene, labels), strict=True):
            x1, y1, x2, y2 = (float(value) for value in box)
            place = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": IDS[label]}
            yield {"image_id": number, **place}


def coco_map(scenes):
    """Average precision over overlaps from 0.5 to 0.95, and at 0.5."""
    reference = pytest.importorskip("faster_coco_eval")
    coco = reference.COCO()
    rows = [row | {"iscrowd": 0} for row in coco_rows(scenes, "true_boxes", "true_labels")]
    rows += [row | {"iscrowd": 1} for row in coco_rows(scenes, "crowd_boxes", "crowd_labels")]
    coco.dataset = {
        "images": [{"id": n + 1, "width": 128, "height": 128} for n in range(len(scenes))],
        "annotations": [
            row | {"id": number, "area": row["bbox"][2] * row["bbox"][3]}
            for number, row in enumerate(rows, start=1)
        ],
        "categories": [{"id": number, "name": name} for name, number in IDS.items()],
        "info": {},
    }
    coco.createIndex()
    scores = [score for scene in scenes for score in scene.scores]
    predictions = coco_rows(scenes, "boxes", "labels")
    scored = [row | {"score": float(score)} for row, score in zip(predictions, scores, strict=True)]
    judge = reference.COCOeval_faster(coco, coco.loadRes(scored), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return float(judge.stats[0]), float(judge.stats[1])
