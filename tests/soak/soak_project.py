"""A project of many small drawn images, and what became of each of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from contract_calls import Row, expected_rows
from PIL import Image
from platform_double import PlatformDouble
from soak_table import NUM_IMAGES

from florence2 import Florence2
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

FIRST_SEED = 800_000
SIZE_WH = (160, 120)
TIE_PX = 3
TIE_SCORE = 0.02
SETTINGS = {"task_prompt": "<OD>", "num_beams": 1, "nms_threshold": "off"}


def drawn_images(count: int = NUM_IMAGES) -> list[bytes]:
    """JPEG files, no two alike."""
    files = []
    for number in range(count):
        buffer = io.BytesIO()
        draw_scene(make_scene(FIRST_SEED + number), SIZE_WH).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def serial_rows(images: Sequence[bytes]) -> list[list[Row]]:
    """The labels of each image, asked alone in this process."""
    model = Florence2.load("demo", device="cpu")
    try:
        return [
            expected_rows(model.run("<OD>", Image.open(io.BytesIO(one)), num_beams=1), SIZE_WH, {})
            for one in images
        ]
    finally:
        model.close()


def stored_rows(annotation: dict[str, Any]) -> list[Row]:
    """The rectangles of an annotation as the platform keeps them: a box ends behind its pixels."""
    rows = []
    for item in annotation["objects"]:
        (left, top), (right, bottom) = item["points"]["exterior"]
        tags = {tag["name"]: tag.get("value") for tag in item["tags"]}
        corners = (int(left), int(top), int(right) - 1, int(bottom) - 1)
        rows.append((item["classTitle"], tags["confidence"], *corners))
    return sorted(rows)


def same_labels(found: Sequence[Row], expected: Sequence[Row]) -> bool:
    """Whether each label is there once and nothing else.

    Of thousands of images some have a coordinate whose two best candidates are as good as equal:
    there the size of a batch decides.
    """
    left = list(found)
    for name, score, *corners in expected:
        like = next(
            (
                one
                for one in left
                if one[0] == name
                and abs(one[1] - score) <= TIE_SCORE
                and all(abs(a - b) <= TIE_PX for a, b in zip(one[2:], corners, strict=True))
            ),
            None,
        )
        if like is None:
            return False
        left.remove(like)
    return not left


@dataclass(frozen=True)
class Found:
    """Image ids: labeled as the serial answer says, with nothing though there is something, and
    with anything else, such as each label twice."""

    whole: frozenset[int]
    bare: frozenset[int]
    wrong: frozenset[int]


@dataclass(frozen=True)
class Overnight:
    """A project in the double and the serial answers by image id."""

    platform: PlatformDouble
    project_id: int
    dataset_id: int
    expected: dict[int, list[Row]]

    @classmethod
    def of(
        cls, platform: PlatformDouble, images: Sequence[bytes], answers: Sequence[list[Row]]
    ) -> Overnight:
        state = platform.state
        project = state.add_project("overnight")
        dataset = state.add_dataset(project.id, "drawn")
        expected = {
            state.add_image(dataset.id, f"{number:05}.jpg", content).id: rows
            for number, (content, rows) in enumerate(zip(images, answers, strict=True))
        }
        return cls(platform, project.id, dataset.id, expected)

    @property
    def num_images(self) -> int:
        return len(self.expected)

    def found(self) -> Found:
        whole, bare, wrong = set(), set(), set()
        for image_id, rows in self.expected.items():
            annotation = self.platform.state.image(image_id).annotation
            stored = stored_rows(annotation)
            if same_labels(stored, rows):
                whole.add(image_id)
            elif not stored:
                bare.add(image_id)
            else:
                wrong.add(image_id)
        return Found(frozenset(whole), frozenset(bare), frozenset(wrong))

    def num_labeled(self) -> int:
        """How many images have labels now."""
        return sum(
            bool(self.platform.state.image(one).annotation["objects"]) for one in self.expected
        )

    def state_of_run(self, **more: object) -> dict[str, Any]:
        """The request of a run over the project that writes."""
        asked = {"projectId": self.project_id, "upload_mode": "append", "settings": SETTINGS}
        return {**asked, **more}
