"""Methods about annotations, their figures and tags."""

from __future__ import annotations

import copy

from platform_checks import Refused, check_annotation, check_figure, check_tag
from platform_methods import method, page
from platform_state import MOMENT, Json, PlatformState, Project, StoredImage


@method("annotations.info")
def annotation_info(state: PlatformState, payload: Json) -> Json:
    return _annotation_json(state.image(payload["imageId"]))


@method("annotations.bulk.info")
def annotations_info(state: PlatformState, payload: Json) -> list[Json]:
    return [_annotation_json(state.image(key)) for key in payload["imageIds"]]


def _annotation_json(image: StoredImage) -> Json:
    annotation = copy.deepcopy(image.annotation)
    row = {"imageId": image.id, "imageName": image.name, "annotation": annotation}
    return {**row, "datasetId": image.dataset_id, "createdAt": MOMENT, "updatedAt": MOMENT}


@method("annotations.bulk.add")
def annotations_add(state: PlatformState, payload: Json) -> Json:
    """Replaces the annotations of the images; all of them or, where one does not fit, none."""
    for item in payload["annotations"]:
        image = state.image(item["imageId"])
        check_annotation(item["annotation"], state.project_of(image).meta, image.size_wh)
    for item in payload["annotations"]:
        state.set_annotation(state.image(item["imageId"]), item["annotation"])
    return {"success": True}


@method("annotations.bulk.copy")
def annotations_copy(state: PlatformState, payload: Json) -> Json:
    for source_id, target_id in zip(payload["srcImageIds"], payload["destImageIds"], strict=True):
        annotation, target = state.image(source_id).annotation, state.image(target_id)
        state.set_annotation(target, annotation)
    return {"success": True}


@method("figures.bulk.add")
def figures_add(state: PlatformState, payload: Json) -> list[Json]:
    added = []
    for figure in copy.deepcopy(payload["figures"]):
        image = state.image(figure.get("entityId") or payload.get("entityId"))
        meta = state.project_of(image).meta
        titles = {item["id"]: item["title"] for item in meta["classes"]}
        figure.update(figure.pop("geometry", {}))
        figure["classTitle"] = titles.get(figure.get("classId"), figure.get("classTitle"))
        check_figure(figure, meta, image.size_wh)
        kept = state.with_ids(meta, [figure], image)
        image.annotation["objects"] += kept
        added += [{"id": item["id"]} for item in kept]
    return added


@method("figures.list")
def figures_list(state: PlatformState, payload: Json) -> Json:
    images = state.images_of(payload["datasetId"])
    return page([figure for image in images for figure in image.annotation["objects"]], payload)


@method("figures.info")
def figure_info(state: PlatformState, payload: Json) -> Json:
    return copy.deepcopy(state.figure(int(payload["id"]))[1])


@method("figures.tags.list")
def figure_tags(state: PlatformState, payload: Json) -> list[Json]:
    return copy.deepcopy(state.figure(int(payload["id"]))[1]["tags"])


@method("object-tags.add-to-object")
def figure_tag_add(state: PlatformState, payload: Json) -> Json:
    image, figure = state.figure(payload["figureId"])
    return _add_tag(state, state.project_of(image), figure["tags"], payload, "objectsOnly")


@method("object-tags.remove-from-figure")
def figure_tag_remove(state: PlatformState, payload: Json) -> Json:
    tags = state.figure(payload["figureId"])[1]["tags"]
    tags[:] = [tag for tag in tags if tag["id"] != payload["id"]]
    return {"success": True}


@method("figures.tags.bulk.add")
def figures_tags_add(state: PlatformState, payload: Json) -> list[Json]:
    project, added = state.project(payload["projectId"]), []
    for item in payload["tags"]:
        figure = state.figure(item["figureId"])[1]
        added.append(_add_tag(state, project, figure["tags"], item, "objectsOnly"))
    return added


@method("image-tags.bulk.add-to-image")
def image_tags_add(state: PlatformState, payload: Json) -> Json:
    for key in payload["ids"]:
        image = state.image(key)
        tags = image.annotation["tags"]
        _add_tag(state, state.project_of(image), tags, payload, "imagesOnly")
    return {"success": True}


@method("tags.entities.bulk.add")
def entity_tags_add(state: PlatformState, payload: Json) -> list[Json]:
    project, added = state.project(payload["projectId"]), []
    for item in payload["tags"]:
        tags = state.image(item["entityId"]).annotation["tags"]
        added.append(_add_tag(state, project, tags, item, "imagesOnly"))
    return added


def _add_tag(
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
