"""The methods of the platform's public API that the app and the SDK's clients call.

A method is a function of the state and the payload. It answers JSON, an image (its bytes are sent)
or Parts (images by id, sent as multipart); what it cannot do it refuses.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
from collections.abc import Callable
from typing import Any

from PIL import Image
from platform_clients import CLIENT_METHODS
from platform_production import PRODUCTION_METHODS
from platform_state import (
    MOMENT,
    TEAM_ID,
    WORKSPACE_ID,
    Dataset,
    Json,
    PlatformState,
    Project,
    Refused,
    StoredImage,
    check_annotation,
    check_tag,
)
from platform_videos import METHODS as VIDEO_METHODS

DONE = {"success": True}
MINE = {"teamId": TEAM_ID, "workspaceId": WORKSPACE_ID, "createdAt": MOMENT, "updatedAt": MOMENT}


class Parts(dict[int, bytes]):
    """Contents by image id."""


MODULE = {
    "id": 1,
    "name": "Serve Florence-2",
    "slug": "serve-florence-2",
    "config": {"categories": ["serve", "framework:Florence-2"]},
}


def modules_listed(state: PlatformState, payload: Json) -> Json:
    is_ours = set(payload["categories"]) <= {*MODULE["config"]["categories"]}
    return page([MODULE] if is_ours else [], {})


def workspace_json(state: PlatformState, payload: Json) -> Json:
    if payload["id"] != WORKSPACE_ID:
        raise Refused(f"Workspace {payload['id']} is not found.", status=404)
    return {"id": WORKSPACE_ID, "name": "labels", "description": "", **MINE}


def page(rows: list[Json], payload: Json) -> Json:
    """One page with everything that passes the filters."""
    for rule in [*payload.get("filter", []), *payload.get("filters", [])]:
        field, value = rule["field"], rule["value"]
        wanted = value if rule.get("operator") == "in" else [value]
        rows = [row for row in rows if row.get(field) in wanted]
    count = len(rows)
    return {"total": count, "perPage": 500, "pagesCount": 1, "entities": rows, "after": None}


def image_json(state: PlatformState, image: StoredImage) -> Json:
    return image.to_json(state.project_of(image).id)


def dataset_json(state: PlatformState, row: Dataset) -> Json:
    count = len(state.images_of(row.id))
    own = {"id": row.id, "name": row.name, "projectId": row.project_id, "parentId": row.parent_id}
    return {**own, **MINE, "description": "", "imagesCount": count, "itemsCount": count}


def project_json(state: PlatformState, project: Project) -> Json:
    datasets = state.datasets_of(project.id)
    count = sum(len(state.images_of(row.id)) for row in datasets)
    own = {"id": project.id, "name": project.name, "description": "", "type": project.type}
    counts = {"datasetsCount": len(datasets), "imagesCount": count, "itemsCount": count}
    extra = {"settings": project.settings, "customData": project.custom_data}
    return {**own, **MINE, **counts, **extra}


def annotation_json(image: StoredImage) -> Json:
    row = {"imageId": image.id, "imageName": image.name, "datasetId": image.dataset_id}
    annotation = copy.deepcopy(image.annotation)
    return {**row, "annotation": annotation, "createdAt": MOMENT, "updatedAt": MOMENT}


def task_fields_set(state: PlatformState, payload: Json) -> Json:
    state.task_fields |= {item["field"]: item["payload"] for item in payload.get("fields", [])}
    return DONE


def images_upload(state: PlatformState, files: list[bytes]) -> list[Json]:
    """Content that images are made of by its hash."""
    answers: list[Json] = []
    for content in files:
        try:
            with Image.open(io.BytesIO(content)) as opened:
                opened.verify()
        except OSError:
            answers.append({"errors": ["It is no image."]})
            continue
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        state.uploaded[digest] = content
        answers.append({"hash": digest})
    return answers


def images_add(state: PlatformState, payload: Json) -> list[Json]:
    """All of them, or none where a name is taken."""
    there = {image.name: image.id for image in state.images_of(payload["datasetId"])}
    names = [item.get("title") or item["name"] for item in payload["images"]]
    if taken := [{"name": name, "id": there[name]} for name in names if name in there]:
        refused = Refused(f"Image {taken[0]['name']!r} already exists.", kind="NONUNIQUE")
        refused.errors = taken
        raise refused
    added = []
    for item, name in zip(payload["images"], names, strict=True):
        source, digest = item.get("imageId"), item.get("hash")
        content = state.image(source).content if source else state.content_of(digest)
        if content is None:
            raise Refused(f"There is no image with hash {digest!r}.")
        image = state.add_image(payload["datasetId"], name, content)
        image.meta = item.get("meta", {})
        added.append(image_json(state, image))
    return added


def project_settings_update(state: PlatformState, payload: Json) -> Json:
    state.project(payload["id"]).settings = payload["settings"]
    return DONE


def project_info_edit(state: PlatformState, payload: Json) -> Json:
    project = state.project(payload["id"])
    project.custom_data = copy.deepcopy(payload["customData"])
    return project_json(state, project)


def figures_remove(state: PlatformState, payload: Json) -> Json:
    state.remove_figures(payload["figureIds"])
    return DONE


def image_tag_remove(state: PlatformState, payload: Json) -> Json:
    tags = state.image(payload["imageId"]).annotation["tags"]
    tags[:] = [tag for tag in tags if tag["id"] != payload["id"]]
    return DONE


def annotations_add(state: PlatformState, payload: Json) -> Json:
    """Replaces the annotations of the images; all of them or, where one does not fit, none."""
    for item in payload["annotations"]:
        image = state.image(item["imageId"])
        check_annotation(item["annotation"], state.project_of(image).meta, image.size_wh)
    for item in payload["annotations"]:
        state.set_annotation(state.image(item["imageId"]), item["annotation"])
    return DONE


def figure_tag_add(state: PlatformState, payload: Json) -> Json:
    image, figure = state.figure(payload["figureId"])
    return add_tag(state, state.project_of(image), figure["tags"], payload, "objectsOnly")


def figure_tag_remove(state: PlatformState, payload: Json) -> Json:
    tags = state.figure(payload["figureId"])[1]["tags"]
    tags[:] = [tag for tag in tags if tag["id"] != payload["id"]]
    return DONE


def figures_tags_add(state: PlatformState, payload: Json) -> list[Json]:
    project = state.project(payload["projectId"])
    return [
        add_tag(state, project, state.figure(item["figureId"])[1]["tags"], item, "objectsOnly")
        for item in payload["tags"]
    ]


def add_tag(
    state: PlatformState, project: Project, tags: list[Json], payload: Json, only: str
) -> Json:
    meta = next((item for item in project.meta["tags"] if item["id"] == payload["tagId"]), None)
    if meta is None:
        raise Refused(f"Tag {payload['tagId']} is not in the project.", status=404)
    check_tag(payload.get("value"), meta, only)
    tag = {"id": state.new_id(), "tagId": meta["id"], "name": meta["name"], "createdAt": MOMENT}
    if payload.get("value") is not None:
        tag["value"] = payload["value"]
    tags.append(tag)
    return {**tag, "figureId": payload.get("figureId")}


METHODS: dict[str, Callable[[PlatformState, Any], Any]] = {
    **CLIENT_METHODS,
    "instance.version": lambda state, asked: {"version": "6.99.0"},
    "tasks.data.set": task_fields_set,
    "tasks.data.get": lambda state, asked: {
        "result": {name: state.task_fields.get(name) for name in asked["fields"]}
    },
    "tasks.run.app": lambda state, asked: [{"taskId": asked["agentId"]}],
    "workspaces.info": workspace_json,
    "ecosystem.list": modules_listed,
    "file-storage.list": lambda state, asked: [
        file.to_json()
        for file in state.files_in(asked["teamId"], asked["path"], recursive=asked["recursive"])
    ],
    "file-storage.download": lambda state, asked: state.file(asked["teamId"], asked["path"]),
    "file-storage.bulk.upload": lambda state, asked: [
        state.add_file(asked["teamId"], folder + name, content).to_json()
        for name, folder, content in asked["files"]
    ],
    "images.info": lambda state, asked: image_json(state, state.image(asked["id"])),
    "images.list": lambda state, asked: page(
        [image_json(state, one) for one in state.images_of(state.dataset(asked["datasetId"]).id)],
        asked,
    ),
    "images.download": lambda state, asked: state.image(asked["id"]),
    "images.bulk.download": lambda state, asked: Parts(
        {key: state.image(key).content for key in asked["imageIds"]}
    ),
    "images.bulk.add": images_add,
    "images.bulk.upload": images_upload,
    "images.internal.hashes.list": lambda state, asked: [
        digest for digest in asked if state.content_of(digest) is not None
    ],
    "datasets.info": lambda state, asked: dataset_json(state, state.dataset(asked["id"])),
    "datasets.list": lambda state, asked: page(
        [
            dataset_json(state, row)
            for row in state.datasets_of(state.project(asked["projectId"]).id)
        ],
        asked,
    ),
    "datasets.add": lambda state, asked: dataset_json(
        state, state.add_dataset(asked["projectId"], asked["name"], asked.get("parentId"))
    ),
    "projects.info": lambda state, asked: project_json(state, state.project(asked["id"])),
    "projects.list": lambda state, asked: page(
        [project_json(state, project) for project in state.projects.values()], asked
    ),
    "projects.add": lambda state, asked: project_json(state, state.add_project(asked["name"])),
    "projects.meta": lambda state, asked: state.project(asked["id"]).meta,
    "projects.meta.update": lambda state, asked: state.set_meta(
        state.project(asked["id"]), asked["meta"]
    ),
    "projects.settings.update": project_settings_update,
    "projects.editInfo": project_info_edit,
    "figures.bulk.remove": figures_remove,
    "image-tags.remove-from-image": image_tag_remove,
    "annotations.info": lambda state, asked: annotation_json(state.image(asked["imageId"])),
    "annotations.bulk.info": lambda state, asked: [
        annotation_json(state.image(key)) for key in asked["imageIds"]
    ],
    "annotations.bulk.add": annotations_add,
    "figures.tags.list": lambda state, asked: state.figure(int(asked["id"]))[1]["tags"],
    "object-tags.add-to-object": figure_tag_add,
    "object-tags.remove-from-figure": figure_tag_remove,
    "figures.tags.bulk.add": figures_tags_add,
    **PRODUCTION_METHODS,
}
METHODS |= VIDEO_METHODS
