"""Drawn scenes as a labeled data set: ``python -m florence2_demo.labeled_scenes FOLDER``.

The images, and ``labels.json`` in COCO's format with the box and the outline of every thing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from florence2_demo.drawing import draw_scene
from florence2_demo.lexicon import KINDS
from florence2_demo.scene import make_scene

LABELS_FILE: Final = "labels.json"


def write_labeled_scenes(folder: Path, seeds: Iterable[int]) -> Path:
    """Draws the scenes of some seeds into a folder, and gives the file with their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, seed in enumerate(seeds, start=1):
        scene = make_scene(seed)
        width, height = scene.size_wh
        file = folder / f"scene_{seed:06}.png"
        draw_scene(scene).save(file)
        images.append({"id": number, "file_name": file.name, "width": width, "height": height})
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box_xyxy
            ring = [
                round(value * side, 2)
                for point in thing.outline_xy
                for value, side in zip(point, scene.size_wh, strict=True)
            ]
            box = x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": KINDS.index(thing.kind) + 1,
                    "bbox": [round(value, 2) for value in box],
                    "area": round(box[2] * box[3], 2),
                    "segmentation": [ring],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": kind} for number, kind in enumerate(KINDS, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    labels = folder / LABELS_FILE
    labels.write_text(json.dumps(content), encoding="utf-8")
    return labels


def main() -> None:
    """Draws what the command line asks for."""
    parser = argparse.ArgumentParser(description="Draw scenes, with their labels as a COCO file.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first; training never sees these")
    plan = parser.parse_args()
    write_labeled_scenes(plan.folder, range(plan.seed, plan.seed + plan.scenes))


if __name__ == "__main__":
    main()
