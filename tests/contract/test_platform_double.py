"""The SDK's own API client works against the double, and the double refuses what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import requests
from platform_double import SESSION_TOKEN, TASK_ID
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


def test_a_new_image_is_uploaded_and_an_old_one_copied(api, seeded):
    dataset = api.dataset.create(seeded.project_id, "fresh")
    uploaded = api.image.upload_path(dataset.id, "bread.jpg", str(IMAGES / "scene_bread.jpg"))
    source = api.image.get_info_by_id(seeded.labeled_id)
    copied = api.image.copy_batch_optimized(
        source.dataset_id, [source], dataset.id, with_annotations=True
    )

    height, width = sly.image.read(str(IMAGES / "scene_bread.jpg")).shape[:2]
    assert (uploaded.width, uploaded.height) == (width, height)
    images = api.image.get_list(dataset.id)
    assert [image.name for image in images] == ["bread.jpg", "scene_city.jpg"]
    assert len(annotation_of(api, copied[0].id, seeded.project_id).labels) == 1


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


@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param(sly.Rectangle(0, 0, 9, 9), id="rectangle"),
        pytest.param(sly.Polygon([(0, 0), (0, 8), (7, 3)]), id="polygon"),
        pytest.param(sly.Bitmap(np.ones((5, 6), bool), sly.PointLocation(2, 3)), id="bitmap"),
    ],
)
def test_an_uploaded_label_comes_back_as_it_was(api, seeded, geometry):
    meta = meta_of(api, seeded.project_id)
    image_id = seeded.image_ids["scene_home.jpg"]
    height, width = api.image.download_np(image_id).shape[:2]
    label = sly.Label(
        geometry, meta.get_obj_class("anything"), [sly.Tag(meta.get_tag_meta("remark"), "left")]
    )

    api.annotation.upload_ann(image_id, sly.Annotation((height, width), [label]))

    (back,) = annotation_of(api, image_id, seeded.project_id).labels
    assert back.geometry.to_json()[_data_key(geometry)] == geometry.to_json()[_data_key(geometry)]
    assert back.tags.get("remark").value == "left"


def _data_key(geometry):
    return "bitmap" if isinstance(geometry, sly.Bitmap) else "points"


def test_a_label_may_end_at_the_last_pixel(api, seeded):
    meta = meta_of(api, seeded.project_id)
    image_id = seeded.image_ids["scene_home.jpg"]
    height, width = api.image.download_np(image_id).shape[:2]
    shapes = [
        sly.Rectangle(0, 0, height - 1, width - 1),
        sly.Bitmap(np.ones((height, width), bool)),
        sly.Polygon([(0, 0), (0, width - 1), (height - 1, width - 1)]),
    ]
    labels = [sly.Label(shape, meta.get_obj_class("anything")) for shape in shapes]

    api.annotation.upload_ann(image_id, sly.Annotation((height, width), labels))

    assert len(annotation_of(api, image_id, seeded.project_id).labels) == 3


def object_json(**changes):
    points = {"exterior": [[1, 1], [5, 5]], "interior": []}
    shape = {"geometryType": "rectangle", "shape": "rectangle", "points": points}
    return {"classTitle": "car", "description": "", "tags": [], **shape, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        pytest.param({"classTitle": "cat"}, "Class 'cat' is not in the project", id="class"),
        pytest.param({"classTitle": "outline"}, "holds polygon, not rectangle", id="geometry"),
        pytest.param({"tags": [{"name": "new"}]}, "Tag 'new' is not in the project", id="tag"),
        pytest.param(
            {"tags": [{"name": "state", "value": "bent"}]}, "its value is 'bent'", id="value"
        ),
        pytest.param(
            {"points": {"exterior": [[0, 0], [99999, 5]], "interior": []}},
            "outside the image",
            id="outside",
        ),
        pytest.param(
            {"points": {"exterior": [[-5, 0], [9, 5]], "interior": []}},
            "outside the image",
            id="negative",
        ),
    ],
)
def test_an_annotation_that_does_not_fit_is_refused_and_nothing_changes(
    api, platform, seeded, changes, sentence
):
    image = platform.state.image(seeded.labeled_id)
    before = image.annotation
    width, height = image.size_wh
    size = {"width": width, "height": height}

    with pytest.raises(HTTPError, match=sentence):
        api.annotation.upload_jsons(
            [image.id], [{"size": size, "tags": [], "objects": [object_json(**changes)]}]
        )

    assert image.annotation is before


def test_a_nameless_class_is_refused(api, seeded):
    meta = meta_of(api, seeded.project_id)
    with pytest.raises(HTTPError, match="A name is a text"):
        api.project.update_meta(
            seeded.project_id, meta.add_obj_class(sly.ObjClass("  ", sly.Rectangle))
        )


def test_a_tag_is_added_to_an_object_that_is_there(api, seeded):
    meta = meta_of(api, seeded.project_id)
    (label,) = annotation_of(api, seeded.labeled_id, seeded.project_id).labels

    api.advanced.add_tag_to_object(
        meta.get_tag_meta("state").sly_id, label.geometry.sly_id, "whole"
    )

    (label,) = annotation_of(api, seeded.labeled_id, seeded.project_id).labels
    assert {tag.name: tag.value for tag in label.tags} == {"reviewed": None, "state": "whole"}
    with pytest.raises(HTTPError, match="its value is 'odd'"):
        api.advanced.add_tag_to_object(
            meta.get_tag_meta("state").sly_id, label.geometry.sly_id, "odd"
        )


def test_labels_are_appended_to_those_that_are_there(api, seeded):
    meta = meta_of(api, seeded.project_id)
    label = sly.Label(sly.Rectangle(1, 2, 3, 4), meta.get_obj_class("car"))

    api.annotation.append_labels(seeded.labeled_id, [label])

    assert len(annotation_of(api, seeded.labeled_id, seeded.project_id).labels) == 2


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
    from platform_double import PlatformDouble

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
