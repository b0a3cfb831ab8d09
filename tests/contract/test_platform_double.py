"""The SDK's own API client works against the double, and the double refuses what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import requests
from platform_double import SESSION_TOKEN, TASK_ID, PlatformDouble
from platform_seed import DATASETS, IMAGES
from requests.exceptions import HTTPError, RetryError

from serve.sdk import sly


def meta_of(api, project_id):
    return sly.ProjectMeta.from_json(api.project.get_meta(project_id))


def annotation_of(api, image_id, project_id):
    json = api.annotation.download(image_id).annotation
    return sly.Annotation.from_json(json, meta_of(api, project_id))


def test_projects_datasets_and_images_are_found_by_id_and_by_list(api, seeded):
    project = api.project.get_info_by_id(seeded.project_id)
    datasets = api.dataset.get_list(seeded.project_id, recursive=True)
    images = [image for row in datasets for image in api.image.get_list(row.id)]
    assert (project.name, project.type) == ("street", "images")
    assert [row.name for row in datasets] == list(DATASETS)
    assert {image.name: image.id for image in images} == seeded.image_ids
    found = api.image.get_info_by_id_batch([image.id for image in images])
    assert [image.name for image in found] == [image.name for image in images]


def test_what_is_not_there_is_none(api, seeded):
    assert api.image.get_info_by_id(1) is None
    assert api.dataset.get_info_by_id(1) is None
    assert api.project.get_info_by_id(1) is None


def test_an_image_downloads_alone_and_in_a_batch_as_the_same_pixels(api, seeded):
    ids = seeded.in_dataset("outside")
    dataset_id = seeded.dataset_ids["outside"]
    alone = [api.image.download_np(key) for key in ids]
    together = api.image.download_nps(dataset_id, ids)
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))
    expected = sly.image.read(str(IMAGES / "scene_city.jpg"))
    assert np.array_equal(alone[0], expected)


def test_a_labelers_object_comes_back_in_pixels_with_its_tag(api, seeded):
    annotation = annotation_of(api, seeded.labeled_id, seeded.project_id)
    (label,) = annotation.labels
    assert label.obj_class.name == "car"
    box = label.geometry
    assert (box.left, box.top, box.right, box.bottom) == (10, 20, 59, 49)
    assert [tag.name for tag in label.tags] == ["reviewed"]
    assert label.geometry.sly_id is not None


def test_meta_is_updated_and_what_was_there_keeps_its_id(api, seeded):
    before = meta_of(api, seeded.project_id)
    after = api.project.update_meta(
        seeded.project_id, before.add_obj_class(sly.ObjClass("tree", sly.Rectangle))
    )
    assert after.get_obj_class("car").sly_id == before.get_obj_class("car").sly_id
    assert after.get_obj_class("tree").sly_id not in (None, after.get_obj_class("car").sly_id)


def empty_image(api, seeded):
    """An image without labels: its id, the project's meta, and what uploads labels to it."""
    image_id = seeded.image_ids["scene_home.jpg"]
    size_hw = api.image.download_np(image_id).shape[:2]

    def upload(*labels):
        api.annotation.upload_ann(image_id, sly.Annotation(size_hw, list(labels)))

    return image_id, meta_of(api, seeded.project_id), upload


GEOMETRIES = [
    sly.Rectangle(0, 0, 9, 9),
    sly.Polygon([(0, 0), (0, 8), (7, 3)]),
    sly.Bitmap(np.ones((5, 6), bool), sly.PointLocation(2, 3)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.geometry_name())
def test_an_uploaded_label_comes_back_as_it_was(api, seeded, geometry):
    image_id, meta, upload = empty_image(api, seeded)
    tag = sly.Tag(meta.get_tag_meta("remark"), "left")
    upload(sly.Label(geometry, meta.get_obj_class("anything"), [tag]))
    (back,) = annotation_of(api, image_id, seeded.project_id).labels
    key = "bitmap" if isinstance(geometry, sly.Bitmap) else "points"
    assert back.geometry.to_json()[key] == geometry.to_json()[key]
    assert back.tags.get("remark").value == "left"


def test_a_label_may_end_at_the_last_pixel(api, seeded):
    image_id, meta, upload = empty_image(api, seeded)
    height, width = api.image.download_np(image_id).shape[:2]
    shapes = [
        sly.Rectangle(0, 0, height - 1, width - 1),
        sly.Bitmap(np.ones((height, width), bool)),
        sly.Polygon([(0, 0), (0, width - 1), (height - 1, width - 1)]),
    ]
    upload(*[sly.Label(shape, meta.get_obj_class("anything")) for shape in shapes])
    assert len(annotation_of(api, image_id, seeded.project_id).labels) == 3


def rectangle(*corners):
    return {"points": {"exterior": corners, "interior": []}}


MISFITS = {
    "class": ({"classTitle": "cat"}, "Class 'cat' is not in the project"),
    "geometry": ({"classTitle": "outline"}, "holds polygon, not rectangle"),
    "tag": ({"tags": [{"name": "new"}]}, "Tag 'new' is not in the project"),
    "value": ({"tags": [{"name": "state", "value": "bent"}]}, "its value is 'bent'"),
    "outside": (rectangle([0, 0], [99999, 5]), "outside the image"),
    "negative": (rectangle([-5, 0], [9, 5]), "outside the image"),
}


@pytest.mark.parametrize(("changes", "sentence"), MISFITS.values(), ids=MISFITS)
def test_an_annotation_that_does_not_fit_is_refused_and_nothing_changes(
    api, platform, seeded, changes, sentence
):
    image = platform.state.image(seeded.labeled_id)
    before = image.annotation
    size = dict(zip(("width", "height"), image.size_wh, strict=True))
    figure = {"classTitle": "car", "geometryType": "rectangle", "shape": "rectangle"}
    figure |= {"description": "", "tags": [], **rectangle([1, 1], [5, 5]), **changes}
    with pytest.raises(HTTPError, match=sentence):
        api.annotation.upload_jsons([image.id], [{"size": size, "tags": [], "objects": [figure]}])
    assert image.annotation is before


def test_a_nameless_class_is_refused(api, seeded):
    meta = meta_of(api, seeded.project_id).add_obj_class(sly.ObjClass("  ", sly.Rectangle))
    with pytest.raises(HTTPError, match="A name is a text"):
        api.project.update_meta(seeded.project_id, meta)


def test_a_tag_is_added_to_an_object_that_is_there(api, seeded):
    tag_id = meta_of(api, seeded.project_id).get_tag_meta("state").sly_id
    (label,) = annotation_of(api, seeded.labeled_id, seeded.project_id).labels
    api.advanced.add_tag_to_object(tag_id, label.geometry.sly_id, "whole")
    (label,) = annotation_of(api, seeded.labeled_id, seeded.project_id).labels
    assert {tag.name: tag.value for tag in label.tags} == {"reviewed": None, "state": "whole"}
    with pytest.raises(HTTPError, match="its value is 'odd'"):
        api.advanced.add_tag_to_object(tag_id, label.geometry.sly_id, "odd")


def test_the_call_that_is_to_fail_fails_and_the_next_does_not(api, platform, seeded):
    platform.faults.fail("images.info", call=2, status=500)

    assert api.image.get_info_by_id(seeded.labeled_id) is not None
    with pytest.raises((HTTPError, RetryError)):
        api.image.get_info_by_id(seeded.labeled_id)
    assert api.image.get_info_by_id(seeded.labeled_id) is not None
    assert platform.count("images.info") == 3


def test_a_damaged_image_arrives_cut_in_half(api, platform, seeded):
    whole = platform.state.image(seeded.labeled_id).content
    platform.faults.damage(seeded.labeled_id)
    assert api.image._download(seeded.labeled_id).content == whole[: len(whole) // 2]


def test_an_unknown_token_is_refused(platform, seeded, api):
    stranger = sly.Api(platform.address, "another-token", retry_count=1)
    with pytest.raises(HTTPError, match="403"):
        stranger.image.get_info_by_id(seeded.labeled_id)


@pytest.fixture
def echo(platform):
    """An app that is only another double: what reaches it is in its log of calls."""
    app = PlatformDouble()
    app.start()
    before, platform.app_url = platform.app_url, app.address + "/public/api/v3"
    yield app
    platform.app_url = before
    app.stop()


def test_requests_to_the_task_reach_the_app_with_token_and_address(api, platform, echo):
    with pytest.raises(HTTPError, match="403"):
        api.task.send_request(TASK_ID, "instance.version", {"a": 1}, raise_error=True)

    (call,) = echo.calls
    assert call.method == "instance.version"
    assert call.payload["state"] == {"a": 1}
    assert call.payload["server_address"] == platform.address
    assert call.payload["api_token"] == api.token


def test_requests_to_the_session_reach_the_app_as_they_are(api, platform, echo):
    answer = requests.post(
        f"{platform.address}/net/{SESSION_TOKEN}/instance.version",
        json={"b": [2]},
        headers={"x-api-key": api.token},
        timeout=10,
    )
    assert answer.json() == {"version": "6.99.0"}
    assert echo.calls[0].payload == {"b": [2]}
