"""What the double keeps comes back to the SDK's own API client, and it refuses what does not fit.

That it answers, passes requests on and breaks on demand shows in every other test of this folder.
"""

from __future__ import annotations

import numpy as np
import pytest
from contract_calls import annotation_of, meta_of
from platform_state import TEAM_ID
from requests.exceptions import HTTPError

from serve.sdk import sly


def test_a_labelers_object_comes_back_in_pixels_with_its_tag(api, seeded):
    annotation = annotation_of(api, seeded.labeled_id)
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
    (back,) = annotation_of(api, image_id).labels
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
    assert len(annotation_of(api, image_id).labels) == 3


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
    (label,) = annotation_of(api, seeded.labeled_id).labels
    api.advanced.add_tag_to_object(tag_id, label.geometry.sly_id, "whole")
    (label,) = annotation_of(api, seeded.labeled_id).labels
    assert {tag.name: tag.value for tag in label.tags} == {"reviewed": None, "state": "whole"}
    with pytest.raises(HTTPError, match="its value is 'odd'"):
        api.advanced.add_tag_to_object(tag_id, label.geometry.sly_id, "odd")


def test_a_file_of_the_team_comes_back_as_it_was_and_is_listed(api, platform, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"first")
    sent = api.file.upload(TEAM_ID, str(tmp_path / "a.txt"), "/folder/inner/a.txt")
    api.file.download(TEAM_ID, "/folder/inner/a.txt", str(tmp_path / "back.txt"))
    assert (tmp_path / "back.txt").read_bytes() == b"first"
    assert (sent.sizeb, sent.hash) == (5, sly.fs.get_file_hash(str(tmp_path / "a.txt")))
    assert api.file.get_info_by_path(TEAM_ID, "/folder/inner/a.txt").id == sent.id
    assert api.file.dir_exists(TEAM_ID, "/folder/")
    assert [api.file.list(TEAM_ID, "/folder", recursive=deep) == [] for deep in (0, 1)] == [1, 0]


MISPLACED = {
    "an empty part": (TEAM_ID, "/folder//inner/a.txt", "has no empty parts"),
    "out of its folder": (TEAM_ID, "/folder/../a.txt", "has no empty parts"),
    "another team": (99, "/folder/a.txt", "not one of this account"),
}


@pytest.mark.parametrize(("team_id", "path", "sentence"), MISPLACED.values(), ids=MISPLACED)
def test_a_file_without_a_place_is_refused(api, platform, tmp_path, team_id, path, sentence):
    (tmp_path / "a.txt").write_bytes(b"first")
    with pytest.raises(HTTPError, match=sentence):
        api.file.upload(team_id, str(tmp_path / "a.txt"), path)
    assert platform.state.files == {}
