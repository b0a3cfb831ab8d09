"""Drawn scenes as labeled images: ``python -m florence2_demo.labeled_scenes FOLDER``.

As records for training, evaluation and tuning, and as a folder of images with ``labels.json`` in
COCO's format: the box and the outline of every thing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from florence2.labeled.records import LabeledData, LabeledImage, LabeledObject, Ring
from florence2.records import BoxXyxy
from florence2_demo.drawing import draw_scene
from florence2_demo.lexicon import KINDS
from florence2_demo.scene import Scene, make_scene
from florence2_demo.shapes import EXTRA_KINDS

LABELS_FILE: Final = "labels.json"
NEW_KIND: Final = EXTRA_KINDS[0]
"""What the demo checkpoint does not know."""

_FORMAT: Final = "scenes"


def scenes_with_new_kind(first: int, count: int, *, share: float = 1.0) -> Iterator[Scene]:
    """Scenes from seed ``first`` on: ``share`` of them have a thing of the new kind at least."""
    seed, found = first, 0
    while found < count:
        is_new = found < round(share * count)
        scene = make_scene(seed, kinds=(NEW_KIND,) * 6 + KINDS if is_new else KINDS)
        seed += 1
        if not is_new or any(thing.kind == NEW_KIND for thing in scene.objects):
            found += 1
            yield scene


def labeled_scene(scene: Scene, folder: Path) -> LabeledImage:
    """The scene drawn into a file of ``folder``; each thing with its box, outline and name."""
    path = folder / f"scene_{scene.seed:06}.png"
    draw_scene(scene).save(path)
    width, height = scene.size_wh

    def labeled(
        kind: str, name: str, box: BoxXyxy, outline: Sequence[tuple[float, float]]
    ) -> LabeledObject:
        x1, y1, x2, y2 = box
        ring: Ring = tuple(value for x, y in outline for value in (x * width, y * height))
        in_pixels = (x1 * width, y1 * height, x2 * width, y2 * height)
        return LabeledObject(kind, in_pixels, (ring,), {"description": name})

    objects = tuple(
        labeled(thing.kind, thing.name, thing.box_xyxy, thing.outline_xy) for thing in scene.objects
    )
    return LabeledImage(path, path.name, scene.size_wh, objects)


def labeled_scenes(scenes: Iterable[Scene], folder: Path) -> LabeledData:
    """Scenes as one source of labeled images; its classes are the kinds that occur."""
    folder.mkdir(parents=True, exist_ok=True)
    images = tuple(labeled_scene(scene, folder) for scene in scenes)
    classes = sorted({thing.label for image in images for thing in image.objects})
    return LabeledData(folder, _FORMAT, images, tuple(classes))


def write_labeled_scenes(folder: Path, scenes: Iterable[Scene]) -> Path:
    """Draws scenes into a folder, and gives the file with their labels beside them."""
    data = labeled_scenes(scenes, folder)
    kinds = (*KINDS, *EXTRA_KINDS)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(data.images, start=1):
        width, height = image.size_wh
        images.append({"id": number, "file_name": image.name, "width": width, "height": height})
        for thing in image.objects:
            x1, y1, x2, y2 = thing.box_xyxy
            box = x1, y1, x2 - x1, y2 - y1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": kinds.index(thing.label) + 1,
                    "bbox": [round(value, 2) for value in box],
                    "area": round(box[2] * box[3], 2),
                    "segmentation": [
                        [round(value, 2) for value in ring] for ring in thing.rings_xy
                    ],
                    "iscrowd": 0,
                }
            )
    named = [kind for kind in kinds if kind in KINDS or kind in data.classes]
    categories = [{"id": kinds.index(kind) + 1, "name": kind} for kind in named]
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
    parser.add_argument(
        "--new",
        type=float,
        default=0.0,
        metavar="SHARE",
        help=f"of so many a {NEW_KIND}, which the demo checkpoint does not know, is in the scene",
    )
    plan = parser.parse_args()
    write_labeled_scenes(plan.folder, scenes_with_new_kind(plan.seed, plan.scenes, share=plan.new))


if __name__ == "__main__":
    main()
