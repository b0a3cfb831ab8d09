"""Methods about projects, datasets and images."""

from __future__ import annotations

import copy
from typing import Any

from platform_checks import Refused
from platform_methods import Parts, method, page
from platform_state import (
    MOMENT,
    TEAM_ID,
    WORKSPACE_ID,
    Dataset,
    Json,
    PlatformState,
    Project,
    StoredImage,
)


@method("images.info")
def image_info(state: PlatformState, payload: Json) -> Json:
    return _image_json(state, state.image(payload["id"]))


@method("images.list")
def image_list(state: PlatformState, payload: Json) -> Json:
    rows = state.images_of(state.dataset(payload["datasetId"]).id)
    return page([_image_json(state, image) for image in rows], payload)


@method("images.download")
def image_download(state: PlatformState, payload: Json) -> StoredImage:
    return state.image(payload["id"])


@method("images.bulk.download")
def images_download(state: PlatformState, payload: Json) -> Parts:
    return Parts({key: state.image(key).content for key in payload["imageIds"]})


@method("images.internal.hashes.list")
def known_hashes(state: PlatformState, payload: Any) -> list[str]:
    known = {image.hash for image in state.images.values()} | set(state.uploaded)
    return [digest for digest in payload if digest in known]


@method("images.bulk.add")
def images_add(state: PlatformState, payload: Json) -> list[Json]:
    by_hash = {image.hash: image.content for image in state.images.values()} | state.uploaded
    added = []
    for item in payload["images"]:
        source, digest = item.get("imageId"), item.get("hash")
        content = state.image(source).content if source else by_hash.get(digest)
        if content is None:
            raise Refused(f"No image with hash {digest!r} was uploaded.")
        image = state.add_image(payload["datasetId"], item.get("title") or item["name"], content)
        image.meta = item.get("meta", {})
        added.append(_image_json(state, image))
    return added


def _image_json(state: PlatformState, image: StoredImage) -> Json:
    return image.to_json(state.project_of(image).id)


@method("datasets.info")
def dataset_info(state: PlatformState, payload: Json) -> Json:
    return _dataset_json(state, state.dataset(payload["id"]))


@method("datasets.list")
def dataset_list(state: PlatformState, payload: Json) -> Json:
    rows = state.datasets_of(state.project(payload["projectId"]).id)
    return page([_dataset_json(state, row) for row in rows], payload)


@method("datasets.add")
def dataset_add(state: PlatformState, payload: Json) -> Json:
    row = state.add_dataset(payload["projectId"], payload["name"], payload.get("parentId"))
    return _dataset_json(state, row)


def _dataset_json(state: PlatformState, row: Dataset) -> Json:
    count = len(state.images_of(row.id))
    return {
        "id": row.id,
        "name": row.name,
        "description": "",
        "projectId": row.project_id,
        "parentId": row.parent_id,
        "imagesCount": count,
        "itemsCount": count,
        "teamId": TEAM_ID,
        "workspaceId": WORKSPACE_ID,
        "createdAt": MOMENT,
        "updatedAt": MOMENT,
    }


@method("projects.info")
def project_info(state: PlatformState, payload: Json) -> Json:
    return _project_json(state, state.project(payload["id"]))


@method("projects.list")
def project_list(state: PlatformState, payload: Json) -> Json:
    return page([_project_json(state, project) for project in state.projects.values()], payload)


@method("projects.add")
def project_add(state: PlatformState, payload: Json) -> Json:
    return _project_json(state, state.add_project(payload["name"]))


@method("projects.meta")
def project_meta(state: PlatformState, payload: Json) -> Json:
    return copy.deepcopy(state.project(payload["id"]).meta)


@method("projects.meta.update")
def project_meta_update(state: PlatformState, payload: Json) -> Json:
    return copy.deepcopy(state.set_meta(state.project(payload["id"]), payload["meta"]))


@method("projects.settings.update")
def project_settings_update(state: PlatformState, payload: Json) -> Json:
    state.project(payload["id"]).settings = payload["settings"]
    return {"success": True}


def _project_json(state: PlatformState, project: Project) -> Json:
    datasets = state.datasets_of(project.id)
    count = sum(len(state.images_of(row.id)) for row in datasets)
    return {
        "id": project.id,
        "name": project.name,
        "description": "",
        "type": project.type,
        "teamId": TEAM_ID,
        "workspaceId": WORKSPACE_ID,
        "datasetsCount": len(datasets),
        "imagesCount": count,
        "itemsCount": count,
        "settings": project.settings,
        "createdAt": MOMENT,
        "updatedAt": MOMENT,
    }
