"""What the double of the platform keeps: projects, datasets, images and their annotations.

Rows carry the field names of the platform's JSON where they leave as JSON. Annotations are kept the
way the platform keeps them, in subpixel coordinates and with ids given here.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from platform_checks import Refused, check_meta

Json = dict[str, Any]
MOMENT = "2026-01-01T00:00:00.000Z"
TEAM_ID, WORKSPACE_ID, USER_ID = 3, 5, 7


def content_hash(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


@dataclass
class StoredImage:
    id: int
    name: str
    dataset_id: int
    content: bytes
    size_wh: tuple[int, int]
    mime: str
    annotation: Json
    meta: Json = field(default_factory=dict)

    @property
    def hash(self) -> str:
        return content_hash(self.content)

    def to_json(self, project_id: int) -> Json:
        width, height = self.size_wh
        return {
            "id": self.id,
            "name": self.name,
            "link": None,
            "hash": self.hash,
            "mime": self.mime,
            "ext": self.mime.split("/")[1],
            "size": len(self.content),
            "width": width,
            "height": height,
            "labelsCount": len(self.annotation["objects"]),
            "datasetId": self.dataset_id,
            "projectId": project_id,
            "parentId": self.dataset_id,
            "createdAt": MOMENT,
            "updatedAt": MOMENT,
            "createdBy": USER_ID,
            "meta": self.meta,
            "pathOriginal": f"/images/original/{self.id}",
            "fullStorageUrl": f"/images/original/{self.id}",
            "tags": self.annotation["tags"],
            "description": "",
        }


@dataclass
class Dataset:
    id: int
    name: str
    project_id: int
    parent_id: int | None = None


@dataclass
class Project:
    id: int
    name: str
    meta: Json
    settings: Json = field(default_factory=dict)
    type: str = "images"


class PlatformState:
    """Everything the double knows. Raises Refused for what the platform would refuse."""

    def __init__(self) -> None:
        self._ids: Iterator[int] = itertools.count(1001)
        self.projects: dict[int, Project] = {}
        self.datasets: dict[int, Dataset] = {}
        self.images: dict[int, StoredImage] = {}
        self.uploaded: dict[str, bytes] = {}
        self.task_fields: Json = {}
        self.files: list[Json] = []

    def new_id(self) -> int:
        return next(self._ids)

    def project(self, key: Any) -> Project:
        return _row(self.projects, key, "Project")

    def dataset(self, key: Any) -> Dataset:
        return _row(self.datasets, key, "Dataset")

    def image(self, key: Any) -> StoredImage:
        return _row(self.images, key, "Image")

    def project_of(self, image: StoredImage) -> Project:
        return self.project(self.dataset(image.dataset_id).project_id)

    def images_of(self, dataset_id: int) -> list[StoredImage]:
        return [image for image in self.images.values() if image.dataset_id == dataset_id]

    def datasets_of(self, project_id: int) -> list[Dataset]:
        return [row for row in self.datasets.values() if row.project_id == project_id]

    def add_project(self, name: str) -> Project:
        names = {project.name for project in self.projects.values()}
        if name in names:
            raise Refused(f"Project {name!r} already exists.", kind="NONUNIQUE")
        empty: Json = {"classes": [], "tags": [], "projectType": "images"}
        project = Project(self.new_id(), name, empty)
        self.projects[project.id] = project
        return project

    def add_dataset(self, project_id: int, name: str, parent_id: int | None = None) -> Dataset:
        self.project(project_id)
        taken = {row.name for row in self.datasets_of(project_id) if row.parent_id == parent_id}
        if name in taken:
            raise Refused(f"Dataset {name!r} already exists.", kind="NONUNIQUE")
        row = Dataset(self.new_id(), name, project_id, parent_id)
        self.datasets[row.id] = row
        return row

    def add_image(self, dataset_id: int, name: str, content: bytes) -> StoredImage:
        self.dataset(dataset_id)
        if name in {image.name for image in self.images_of(dataset_id)}:
            raise Refused(f"Image {name!r} already exists.", kind="NONUNIQUE")
        with Image.open(io.BytesIO(content)) as opened:
            size_wh, mime = opened.size, f"image/{(opened.format or 'png').lower()}"
        size = {"width": size_wh[0], "height": size_wh[1]}
        empty: Json = {"description": "", "size": size, "tags": [], "objects": []}
        image = StoredImage(self.new_id(), name, dataset_id, content, size_wh, mime, empty)
        self.images[image.id] = image
        return image

    def set_meta(self, project: Project, meta: Json) -> Json:
        """Checks the meta and keeps it, with an id for whatever had none; the known keep theirs."""
        check_meta(meta)
        known = {
            (kind, item[key]): item["id"]
            for kind, key in (("classes", "title"), ("tags", "name"))
            for item in project.meta[kind]
        }
        kept = copy.deepcopy(meta)
        for kind, key in (("classes", "title"), ("tags", "name")):
            for item in kept.setdefault(kind, []):
                item["id"] = known.get((kind, item[key])) or self.new_id()
        kept.setdefault("projectType", "images")
        project.meta = kept
        return kept

    def set_annotation(self, image: StoredImage, annotation: Json) -> None:
        meta = self.project_of(image).meta
        image.annotation = {
            **copy.deepcopy(annotation),
            "objects": self.with_ids(meta, annotation["objects"], image),
            "tags": self.tags_with_ids(meta, annotation.get("tags", [])),
        }

    def with_ids(self, meta: Json, figures: list[Json], image: StoredImage) -> list[Json]:
        """Figures the way the platform gives them back: class ids, their own ids, tag ids."""
        class_ids = {item["title"]: item["id"] for item in meta["classes"]}
        kept = copy.deepcopy(figures)
        for figure in kept:
            figure["id"] = self.new_id()
            figure["classId"] = class_ids[figure["classTitle"]]
            figure["entityId"] = figure["imageId"] = image.id
            figure["createdAt"] = figure["updatedAt"] = MOMENT
            figure["labelerLogin"] = "labeler"
            figure["tags"] = self.tags_with_ids(meta, figure.get("tags", []))
        return kept

    def tags_with_ids(self, meta: Json, tags: list[Json]) -> list[Json]:
        tag_ids = {item["name"]: item["id"] for item in meta["tags"]}
        return [
            {**tag, "id": self.new_id(), "tagId": tag_ids[tag["name"]], "createdAt": MOMENT}
            for tag in tags
        ]

    def figure(self, key: Any) -> tuple[StoredImage, Json]:
        for image in self.images.values():
            for figure in image.annotation["objects"]:
                if figure["id"] == key:
                    return image, figure
        raise Refused(f"Figure {key} is not found.", status=404)


def _row(rows: dict[int, Any], key: Any, kind: str) -> Any:
    if key not in rows:
        raise Refused(f"{kind} {key} is not found.", status=404)
    return rows[key]
