"""Runs that write to the platform: every upload mode, and a platform that fails in the middle."""

from __future__ import annotations

import pytest
from contract_calls import annotation_of, assert_refused, meta_of
from platform_seed import DATASETS

from serve.sdk import sly


@pytest.fixture
def run(app, seeded):
    """A project's run that is waited for: its progress at the end, and its results."""

    def start(path="inference_project_id_async", **state):
        return app.done(path, {"projectId": seeded.project_id, **state})

    return start


def boxes(annotation):
    return sorted(
        (label.obj_class.name, label.geometry.left, label.geometry.top, label.geometry.right)
        for label in annotation.labels
    )


def test_append_keeps_what_a_labeler_drew(run, api, seeded):
    [before] = annotation_of(api, seeded.labeled_id).labels

    progress, results = run(upload_mode="append")

    assert (progress["stage"], progress["exception"]) == ("Finished", None)
    assert {one["image_id"] for one in results} == set(seeded.image_ids.values())
    assert all(one["annotation"] is None for one in results)
    annotation = annotation_of(api, seeded.labeled_id)
    assert len(annotation.labels) == 1 + 3
    kept = [label for label in annotation.labels if label.tags.get("reviewed") is not None]
    assert [label.geometry.to_json()["points"] for label in kept] == [
        before.geometry.to_json()["points"]
    ]


def test_replace_leaves_only_what_the_model_found(run, api, seeded):
    progress, _ = run(upload_mode="replace")
    assert progress["exception"] is None
    annotation = annotation_of(api, seeded.labeled_id)
    assert sorted(label.obj_class.name for label in annotation.labels) == ["car", "car", "moon"]
    assert all(label.tags.get("confidence") is not None for label in annotation.labels)
    assert all(label.tags.get("reviewed") is None for label in annotation.labels)


def test_a_second_merge_adds_nothing(run, api, seeded):
    run(upload_mode="iou_merge")
    first = {key: boxes(annotation_of(api, key)) for key in seeded.image_ids.values()}
    progress, _ = run(upload_mode="iou_merge")
    assert progress["exception"] is None
    assert {key: boxes(annotation_of(api, key)) for key in seeded.image_ids.values()} == first
    assert len(first[seeded.labeled_id]) == 4


def test_create_puts_copies_into_a_project_of_their_own(run, api, platform, seeded):
    before = {project.id for project in platform.state.projects.values()}

    progress, _ = run(upload_mode="create")

    assert progress["exception"] is None
    [created] = set(platform.state.projects) - before
    datasets = api.dataset.get_list(created)
    assert {row.name for row in datasets} == set(DATASETS)
    copies = [image for row in datasets for image in api.image.get_list(row.id)]
    assert sorted(image.name for image in copies) == sorted(seeded.image_ids)
    assert all(image.labels_count for image in copies)
    assert len(annotation_of(api, seeded.labeled_id).labels) == 1


def test_uploaded_boxes_are_those_that_are_returned(run, app, api, seeded):
    image_id = seeded.image_ids["scene_street.jpg"]
    returned = app.post("inference_image_id", {"image_id": image_id}).json()["annotation"]
    run("inference_batch_ids_async", image_ids=[image_id], upload_mode="replace")
    corners = sorted(
        (item["classTitle"], *item["points"]["exterior"][0], item["points"]["exterior"][1][0])
        for item in returned["objects"]
    )
    assert boxes(annotation_of(api, image_id)) == corners


def test_a_tag_that_the_project_has_with_another_meaning_gets_another_name(run, api, seeded):
    meta = meta_of(api, seeded.project_id)
    other = sly.TagMeta("confidence", sly.TagValueType.ANY_STRING)
    api.project.update_meta(seeded.project_id, meta.add_tag_meta(other))

    progress, _ = run(upload_mode="append")

    assert progress["exception"] is None
    found = [
        tag.meta.name
        for label in annotation_of(api, seeded.labeled_id).labels
        for tag in label.tags
        if tag.meta.name.startswith("confidence")
    ]
    assert found == ["confidence_nn"] * 3


def test_a_class_that_the_project_has_in_another_shape_gets_another_name(run, api, seeded):
    meta = meta_of(api, seeded.project_id)
    api.project.update_meta(
        seeded.project_id, meta.add_obj_class(sly.ObjClass("moon", sly.Polygon))
    )
    progress, _ = run(upload_mode="append", model_prediction_suffix="_model")
    assert progress["exception"] is None
    names = {label.obj_class.name for label in annotation_of(api, seeded.labeled_id).labels}
    assert names == {"car", "moon_model"}


def test_the_last_upload_that_fails_is_an_error_of_the_run(run, platform, seeded):
    # Ten times, because that is how often the SDK's client tries.
    platform.faults.fail("annotations.bulk.add", call=1, times=40, status=500)
    image_id = seeded.image_ids["scene_home.jpg"]
    progress, results = run("inference_batch_ids_async", image_ids=[image_id], upload_mode="append")
    assert progress["stage"] == "Error"
    assert str(image_id) in progress["exception"]["message"]
    assert [one for one in results if "error" not in one] == []
    assert platform.state.image(image_id).annotation["objects"] == []


def test_a_refused_upload_costs_only_its_own_image(run, api, platform, seeded):
    platform.faults.fail("annotations.bulk.add", call=1, times=2, status=400)
    progress, results = run(upload_mode="append", batch_size=2)
    assert progress["stage"] == "Error"
    failed = [one["image_id"] for one in results if one.get("error")]
    assert len(failed) == 1
    assert str(failed[0]) in progress["exception"]["message"]
    done = set(seeded.image_ids.values()) - set(failed)
    assert all(boxes(annotation_of(api, image_id)) for image_id in done)


def test_a_damaged_image_costs_only_itself(run, api, platform, seeded):
    damaged = seeded.image_ids["scene_street.jpg"]
    platform.faults.damage(damaged)

    progress, results = run(upload_mode="replace")

    assert progress["stage"] == "Error"
    assert str(damaged) in progress["exception"]["message"]
    [failed] = [one for one in results if one.get("error")]
    assert (failed["image_id"], failed["error"]["code"]) == (damaged, "bad_image")
    others = set(seeded.image_ids.values()) - {damaged}
    assert all(annotation_of(api, image_id).labels for image_id in others)


def test_a_damaged_image_alone_is_refused(app, platform, seeded):
    platform.faults.damage(seeded.labeled_id)
    assert_refused(app.post("inference_image_id", {"image_id": seeded.labeled_id}), 400)


def test_images_that_download_on_the_second_try_are_labeled(run, platform, seeded):
    platform.faults.fail("images.bulk.download", call=1, times=1, status=503)
    progress, results = run()
    assert progress["exception"] is None
    assert all(one["annotation"]["objects"] for one in results)


@pytest.mark.parametrize("mode", ["overwrite", 5, ["append"]])
def test_an_upload_mode_that_does_not_exist_changes_nothing(app, platform, seeded, mode):
    answer = app.post("inference_image_id", {"image_id": seeded.labeled_id, "upload_mode": mode})
    assert_refused(answer, 400, says="upload_mode")
    assert platform.count("annotations.bulk.add") == 0
