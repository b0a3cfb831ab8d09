"""Tags whose names a project uses for something else."""

import pytest
from platform_fakes import annotation, rectangle

from serve.platform.upload import compatible_tag_meta, with_compatible_tags
from serve.predict.annotations import TAG_METAS
from serve.sdk import sly

Type = sly.TagValueType
ON_OBJECTS, ON_IMAGES = sly.TagApplicableTo.OBJECTS_ONLY, sly.TagApplicableTo.IMAGES_ONLY
CONFIDENCE, TEXT = TAG_METAS["confidence"], TAG_METAS["text"]
AS_TEXT = sly.TagMeta("confidence", Type.ANY_STRING)


def project(*metas):
    return sly.ProjectMeta(tag_metas=list(metas))


def sure(value=0.5):
    return sly.Tag(CONFIDENCE, value)


@pytest.mark.parametrize(
    ("metas", "expected"),
    [
        pytest.param([], "confidence", id="a free name"),
        pytest.param([sly.TagMeta("confidence", Type.ANY_NUMBER)], "confidence", id="the same"),
        pytest.param([AS_TEXT], "confidence_nn", id="text instead of a number"),
        pytest.param(
            [sly.TagMeta("confidence", Type.ANY_NUMBER, applicable_to=ON_IMAGES)],
            "confidence_nn",
            id="only on images",
        ),
        pytest.param(
            [sly.TagMeta("confidence", Type.ANY_NUMBER, applicable_classes=["dog"])],
            "confidence_nn",
            id="only on some classes",
        ),
        pytest.param(
            [AS_TEXT, sly.TagMeta("confidence_nn", Type.NONE)],
            "confidence_nn_2",
            id="the other name is taken too",
        ),
        pytest.param(
            [AS_TEXT, sly.TagMeta("confidence_nn", Type.ANY_NUMBER)],
            "confidence_nn",
            id="the other name is ours from before",
        ),
    ],
)
def test_the_name_is_the_first_that_fits(metas, expected):
    fitting = compatible_tag_meta(CONFIDENCE, project(*metas))
    assert fitting.name == expected
    assert fitting.value_type == Type.ANY_NUMBER


def test_the_sdk_leaves_a_number_under_a_tag_of_texts_and_this_does_not():
    ours = annotation(rectangle(tags=[sure()]))
    update = sly.nn.inference.inference.update_meta_and_ann
    _, theirs, _ = update(project(AS_TEXT), ours)
    assert theirs.labels[0].tags.get("confidence") is not None, "the defect is gone from the SDK"

    fitted = with_compatible_tags(ours, project(AS_TEXT))
    meta, uploaded, _ = update(project(AS_TEXT), fitted)
    [tag] = uploaded.labels[0].tags
    assert (tag.name, tag.value) == ("confidence_nn", 0.5)
    assert meta.get_tag_meta("confidence_nn").value_type == Type.ANY_NUMBER


def test_an_annotation_that_fits_is_left_as_it_is():
    ours = annotation(rectangle(tags=[sure()]))
    assert with_compatible_tags(ours, project(CONFIDENCE)) is ours


def test_only_the_clashing_tags_are_renamed_on_labels_and_image():
    caption = sly.Tag(TAG_METAS["caption"], "a cat")
    said = sly.Tag(TEXT, "EXIT")
    ours = annotation(rectangle(tags=[sure(), said]), rectangle("dog"), tags=[caption])
    theirs = project(AS_TEXT, sly.TagMeta("caption", Type.NONE))
    fitted = with_compatible_tags(ours, theirs, "_f2")
    assert [tag.name for tag in fitted.labels[0].tags] == ["confidence_f2", "text"]
    assert [tag.name for tag in fitted.img_tags] == ["caption_f2"]
    assert [label.obj_class.name for label in fitted.labels] == ["cat", "dog"]


def test_parts_of_one_object_stay_together():
    label = rectangle(tags=[sure()]).clone(binding_key="one")
    fitted = with_compatible_tags(annotation(label), project(AS_TEXT))
    assert fitted.labels[0].binding_key == "one"
