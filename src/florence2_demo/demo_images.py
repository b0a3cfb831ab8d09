"""Writes the pictures that the demo, the tests and the documentation use.

``python -m florence2_demo.demo_images FOLDER`` makes them again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from PIL import Image

from florence2_demo.drawing import draw_scene
from florence2_demo.photos import landscape, still_life
from florence2_demo.placing import Size
from florence2_demo.scene import make_scene

FIRST_DEMO_SEED: Final = 900_000
"""Below the training seeds, so that no demo picture was trained on."""

_SCENES: Final[tuple[tuple[str, int, Size], ...]] = (
    ("scene_bike.png", 22, (640, 480)),
    ("scene_city.jpg", 26, (640, 480)),
    ("scene_night.jpg", 25, (640, 480)),
    ("scene_street.jpg", 29, (640, 480)),
    ("scene_home.jpg", 37, (720, 480)),
    ("scene_garden.jpg", 42, (512, 512)),
    ("scene_bread.jpg", 46, (640, 480)),
    ("scene_arrows.jpg", 30, (480, 640)),
)


def write_demo_images(folder: Path) -> list[Path]:
    """Eight drawn scenes and two photograph-like pictures, about 1 MB together."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        name: draw_scene(make_scene(FIRST_DEMO_SEED + seed, size_wh=size_wh))
        for name, seed, size_wh in _SCENES
    }
    pictures["photo_meadow.jpg"] = Image.fromarray(landscape((800, 600), seed=1))
    pictures["photo_table.jpg"] = Image.fromarray(still_life((800, 600), seed=2))
    for name, picture in pictures.items():
        picture.save(folder / name, quality=86, optimize=True)
    return [folder / name for name in pictures]


if __name__ == "__main__":
    write_demo_images(Path(sys.argv[1]))
