"""An object that was pointed at becomes the prompt for the whole image."""

import pytest
from platform_fakes import FakePlatform, fails_for

from florence2.errors import RequestError
from florence2.records import Failure, Result, Text
from serve.platform.failures import FailedImageError
from serve.platform.reference import BadReferenceError, resolve_reference
from serve.settings import Reference, Settings

BOX = (1.0, 2.0, 30.0, 20.0)


def result(text, objects=()):
    return Result("<REGION_TO_CATEGORY>", (60, 40), tuple(objects), text, "", (), False)


class Model:
    """Says the same about every question, and keeps the questions."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, asks):
        self.asked += asks
        return [self.answer for _ in asks]


def settings(image_id=None, class_name="object", **others):
    reference = Reference(image_id=image_id, box_xyxy=BOX, class_name=class_name)
    return Settings(reference=reference, **others)


@pytest.mark.parametrize(
    ("class_name", "expected"),
    [("object", "red car"), ("", "red car"), ("vehicle", "vehicle"), (" vehicle ", "vehicle")],
)
def test_the_category_is_looked_for_under_the_class_asked_for(class_name, expected):
    model = Model(result(" red\n car "))
    found = resolve_reference(settings(class_name=class_name), None, model, b"image")
    assert found.task_prompt == "<CAPTION_TO_PHRASE_GROUNDING>"
    assert found.mapping == {expected: ("red car",)}
    assert (found.text, found.reference) == (None, None)
    [ask] = model.asked
    assert (ask.task, ask.region.box_xyxy, ask.image) == ("<REGION_TO_CATEGORY>", BOX, b"image")


def test_other_settings_stay_and_a_category_told_as_an_object_counts_too():
    model = Model(result(None, [Text("car", 0.5)]))
    given = settings(num_beams=1, confidence_threshold=0.4)
    found = resolve_reference(given, None, model, b"image")
    assert found.mapping == {"car": ("car",)}
    assert (found.num_beams, found.confidence_threshold) == (1, 0.4)


def test_the_image_of_the_reference_is_downloaded():
    platform, model = FakePlatform(ids=[5]), Model(result("car"))
    resolve_reference(settings(image_id=5), platform, model, b"another")
    assert model.asked[0].image == platform.content[5]


def test_without_a_reference_nothing_is_asked():
    model, plain = Model(None), Settings()
    assert resolve_reference(plain, None, model, b"image") is plain
    assert model.asked == []


@pytest.mark.parametrize("text", ["", "  \n ", None])
def test_a_box_without_a_category_is_refused_with_what_to_do(text):
    with pytest.raises(BadReferenceError, match=r"\[1, 2, 30, 20\].*draw the box"):
        resolve_reference(settings(), None, Model(result(text)), b"image")


BROKEN = FakePlatform(ids=[5])
BROKEN.download_fault = fails_for(5)
FAULTS = {
    "no such image": (5, FakePlatform(), b"image", None, RequestError, "not_found"),
    "no platform": (5, None, b"image", None, RequestError, "bad_request"),
    "no download": (5, BROKEN, b"image", None, FailedImageError, "download_failed"),
    "no image at all": (None, None, None, None, RequestError, "bad_request"),
    "a damaged image": (
        None,
        None,
        b"image",
        Failure("bad_image", "Damaged."),
        FailedImageError,
        "bad_image",
    ),
    "a box outside the image": (
        None,
        None,
        b"image",
        Failure("bad_region", "Outside."),
        BadReferenceError,
        "bad_region",
    ),
}


@pytest.mark.parametrize(
    ("image_id", "api", "image", "answer", "error", "code"), FAULTS.values(), ids=FAULTS
)
def test_what_goes_wrong_is_an_error_with_its_code(image_id, api, image, answer, error, code):
    with pytest.raises(error) as caught:
        resolve_reference(settings(image_id), api, Model(answer), image)
    assert caught.value.code == code
