"""A small project in the double: two datasets of demo images, classes, tags, a labeler's work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from platform_double import PlatformDouble
from platform_state import Json

from serve.sdk import sly

IMAGES = Path(__file__).parents[2] / "demo" / "images"
DATASETS = {
    "outside": ("scene_city.jpg", "scene_street.jpg", "scene_garden.jpg"),
    "inside": ("scene_home.jpg", "photo_table.jpg"),
}
CLASSES = (
    sly.ObjClass("car", sly.Rectangle),
    sly.ObjClass("outline", sly.Polygon),
    sly.ObjClass("anything", sly.AnyGeometry),
)
TAGS = (
    sly.TagMeta("reviewed", sly.TagValueType.NONE),
    sly.TagMeta("remark", sly.TagValueType.ANY_STRING),
    sly.TagMeta("state", sly.TagValueType.ONEOF_STRING, possible_values=["whole", "broken"]),
)


@dataclass(frozen=True)
class Seeded:
    """Where things are: ids by name, and the image that already has a labeler's objects."""

    project_id: int
    dataset_ids: dict[str, int]
    image_ids: dict[str, int]
    labeled_id: int

    def in_dataset(self, name: str) -> list[int]:
        return [self.image_ids[image] for image in DATASETS[name]]


def seed(double: PlatformDouble) -> Seeded:
    state = double.state
    project = state.add_project("street")
    meta = state.set_meta(project, sly.ProjectMeta(list(CLASSES), list(TAGS)).to_json())
    dataset_ids, image_ids = {}, {}
    for dataset_name, names in DATASETS.items():
        dataset_ids[dataset_name] = state.add_dataset(project.id, dataset_name).id
        for name in names:
            content = (IMAGES / name).read_bytes()
            image_ids[name] = state.add_image(dataset_ids[dataset_name], name, content).id
    labeled = state.image(image_ids["scene_city.jpg"])
    labeled.annotation["objects"] = state.with_ids(meta, [_labeler_object()], labeled)
    return Seeded(project.id, dataset_ids, image_ids, labeled.id)


def _labeler_object() -> Json:
    """A car a person drew, reviewed: pixels 10..59 across, 20..49 down, in subpixel coordinates."""
    return {
        "classTitle": "car",
        "geometryType": "rectangle",
        "shape": "rectangle",
        "description": "",
        "points": {"exterior": [[10, 20], [60, 50]], "interior": []},
        "tags": [{"name": "reviewed", "value": None}],
        "nnCreated": False,
        "nnUpdated": False,
    }
