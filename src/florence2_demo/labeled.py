"""Drawn scenes as labeled images: what training, evaluation and tuning read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from florence2.labeled.records import LabeledData, LabeledImage, LabeledObject, Ring
from florence2.records import BoxXyxy
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import Scene

_FORMAT: Final = "scenes"


def labeled_scene(scene: Scene, folder: Path) -> LabeledImage:
    """The scene drawn into a file of ``folder``; each thing with its box, outline and name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{scene.seed}.png"
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
    images = tuple(labeled_scene(scene, folder) for scene in scenes)
    classes = sorted({thing.label for image in images for thing in image.objects})
    return LabeledData(folder, _FORMAT, images, tuple(classes))
