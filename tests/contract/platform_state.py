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
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from serve.sdk import sly

Json = dict[str, Any]
MOMENT = "2026-01-01T00:00:00.000Z"
TEAM_ID, WORKSPACE_ID, USER_ID = 3, 5, 7
GEOMETRIES = {"rectangle", "polygon", "bitmap", "point", "line", "graph", "any", "oriented_bbox"}
VALUE_TYPES = {"none", "any_number", "any_string", "oneof_string", "date"}


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
        return base64.b64encode(hashlib.sha256(self.content).digest()).decode()

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
class StoredFile:
    """A file of the team."""

    id: int
    path: str
    content: bytes

    def to_json(self) -> Json:
        name = self.path.rpartition("/")[2]
        return {
            "id": self.id,
            "teamId": TEAM_ID,
            "userId": USER_ID,
            "name": name,
            "path": self.path,
            "storagePath": f"/storage/{self.id}",
            "fullStorageUrl": f"/storage/{self.id}",
            "hash": base64.b64encode(hashlib.sha256(self.content).digest()).decode(),
            "meta": {"size": len(self.content), "ext": name.rpartition(".")[2], "mime": "any"},
            "createdAt": MOMENT,
            "updatedAt": MOMENT,
            "isDir": False,
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
    custom_data: Json = field(default_factory=dict)


@dataclass
class AppSession:
    """What an app has told of itself: its page, its task, and what it was made of."""

    page_data: Json = field(default_factory=dict)
    page_state: Json = field(default_factory=dict)
    meta: Json = field(default_factory=dict)
    output: Json = field(default_factory=dict)
    inputs: list[Json] = field(default_factory=list)


class PlatformState:
    """Everything the double knows. Raises Refused for what the platform would refuse."""

    def __init__(self) -> None:
        self._ids: Iterator[int] = itertools.count(1001)
        self.projects: dict[int, Project] = {}
        self.datasets: dict[int, Dataset] = {}
        self.images: dict[int, StoredImage] = {}
        self.uploaded: dict[str, bytes] = {}
        self.task_fields: Json = {}
        self.files: dict[str, StoredFile] = {}
        self.session = AppSession()

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
        # Calls are answered by several threads.
        return [image for image in list(self.images.values()) if image.dataset_id == dataset_id]

    def content_of(self, digest: Any) -> bytes | None:
        """Of an image, or a file that one may be made of, by its hash."""
        if digest in self.uploaded:
            return self.uploaded[digest]
        found = (one.content for one in list(self.images.values()) if one.hash == digest)
        return next(found, None)

    def datasets_of(self, project_id: int) -> list[Dataset]:
        return [row for row in list(self.datasets.values()) if row.project_id == project_id]

    def add_project(self, name: str) -> Project:
        names = {project.name for project in list(self.projects.values())}
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

    def add_file(self, team_id: Any, path: str, content: bytes) -> StoredFile:
        """One more file of the team, in the place of another of this path."""
        check_team(team_id)
        parts = path.split("/")
        if parts[0] or len(parts) < 2 or any(part in ("", ".", "..") for part in parts[1:]):
            raise Refused(f"A path of a file begins with / and has no empty parts, not {path!r}.")
        file = StoredFile(self.new_id(), path, content)
        self.files[path] = file
        return file

    def files_in(self, team_id: Any, path: str, *, recursive: bool) -> list[StoredFile]:
        """The file of a path, or those below a folder."""
        check_team(team_id)
        below = path.rstrip("/") + "/"
        found = [file for file in list(self.files.values()) if (file.path + "/").startswith(below)]
        return [file for file in found if recursive or "/" not in file.path[len(below) :]]

    def file(self, team_id: Any, path: Any) -> StoredFile:
        check_team(team_id)
        if path not in self.files:
            raise Refused(f"File {path!r} is not found.", status=404)
        return self.files[path]

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
        for image in list(self.images.values()):
            for figure in image.annotation["objects"]:
                if figure["id"] == key:
                    return image, figure
        raise Refused(f"Figure {key} is not found.", status=404)

    def remove_figures(self, keys: list[Any]) -> None:
        """All of them or, where there is none of a key, none."""
        wanted = set(keys)
        holders = [
            image
            for image in list(self.images.values())
            if any(figure["id"] in wanted for figure in image.annotation["objects"])
        ]
        found = {figure["id"] for image in holders for figure in image.annotation["objects"]}
        if missing := wanted - found:
            raise Refused(f"Figures {sorted(missing)} are not found.", status=404)
        for image in holders:
            objects = image.annotation["objects"]
            objects[:] = [figure for figure in objects if figure["id"] not in wanted]


def _row(rows: dict[int, Any], key: Any, kind: str) -> Any:
    if key not in rows:
        raise Refused(f"{kind} {key} is not found.", status=404)
    return rows[key]


class Refused(Exception):  # noqa: N818
    """An answer that is not 200."""

    def __init__(self, text: str, *, status: int = 400, kind: str = "VALIDATION") -> None:
        super().__init__(text)
        self.status, self.kind = status, kind
        self.errors: list[Json] = []


def check_team(team_id: Any) -> None:
    if team_id != TEAM_ID:
        raise Refused(f"Team {team_id!r} is not one of this account.", status=403)


def check_meta(meta: Json) -> None:
    for kind, key in (("classes", "title"), ("tags", "name")):
        names = [item.get(key) for item in meta.get(kind, [])]
        for name in names:
            check_name(name)
        if len(set(names)) != len(names):
            raise Refused(f"Names of {kind} repeat: {sorted(names)}.", kind="NONUNIQUE")
    for item in meta.get("classes", []):
        if item.get("shape") not in GEOMETRIES:
            raise Refused(f"Class {item['title']!r} has shape {item.get('shape')!r}.")
    for item in meta.get("tags", []):
        if item.get("value_type") not in VALUE_TYPES:
            raise Refused(f"Tag {item['name']!r} has type {item.get('value_type')!r}.")


def check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        raise Refused(f"A name is a text without blanks around it, not {name!r}.")
    if len(name) > 128 or any(ord(letter) < 32 for letter in name):
        raise Refused(f"A name has up to 128 printable characters, not {name!r}.")


def check_annotation(annotation: Json, meta: Json, size_wh: tuple[int, int]) -> None:
    """An annotation as it is uploaded: subpixel coordinates, classes and tags of the project."""
    width, height = size_wh
    size = annotation.get("size") or {}
    if (size.get("width"), size.get("height")) != (width, height):
        raise Refused(f"The annotation is for an image of {size}, the image is {width}x{height}.")
    check_tags(annotation.get("tags", []), meta, "imagesOnly")
    for figure in annotation.get("objects", []):
        check_figure(figure, meta, size_wh)


def check_figure(figure: Json, meta: Json, size_wh: tuple[int, int]) -> None:
    shapes = {item["title"]: item["shape"] for item in meta["classes"]}
    title, geometry = figure.get("classTitle"), figure.get("geometryType")
    if title not in shapes:
        raise Refused(f"Class {title!r} is not in the project, which has {sorted(shapes)}.")
    if shapes[title] not in ("any", geometry):
        raise Refused(f"Class {title!r} holds {shapes[title]}, not {geometry}.")
    for x, y in points_of(figure):
        if not (math.isfinite(x) and math.isfinite(y)):
            raise Refused(f"Coordinates are numbers, not {(x, y)}.")
        if not (0 <= x <= size_wh[0] and 0 <= y <= size_wh[1]):
            raise Refused(f"Point {(x, y)} of {title!r} is outside the image of {size_wh}.")
    check_tags(figure.get("tags", []), meta, "objectsOnly")


def points_of(figure: Json) -> list[tuple[float, float]]:
    if figure["geometryType"] != "bitmap":
        points = figure["points"]
        return [
            tuple(point) for part in (points["exterior"], *points["interior"]) for point in part
        ]
    left, top = figure["bitmap"]["origin"]
    height, width = sly.Bitmap.base64_2_data(figure["bitmap"]["data"]).shape
    return [(left, top), (math.floor(left) + width, math.floor(top) + height)]


def check_tags(tags: list[Json], meta: Json, only: str) -> None:
    metas = {item["name"]: item for item in meta["tags"]}
    for tag in tags:
        if tag.get("name") not in metas:
            raise Refused(f"Tag {tag.get('name')!r} is not in the project: {sorted(metas)}.")
        check_tag(tag.get("value"), metas[tag["name"]], only)


def check_tag(value: Any, meta: Json, only: str) -> None:
    applicable = meta.get("applicable_type", "all")
    if applicable not in ("all", only):
        raise Refused(f"Tag {meta['name']!r} is {applicable}, it was given to {only}.")
    fits = {
        "none": value is None,
        "any_number": isinstance(value, (int, float)) and math.isfinite(value),
        "any_string": isinstance(value, str),
        "date": isinstance(value, str),
        "oneof_string": value in meta.get("values", []),
    }[meta["value_type"]]
    if not fits:
        raise Refused(f"Tag {meta['name']!r} is {meta['value_type']}, its value is {value!r}.")
