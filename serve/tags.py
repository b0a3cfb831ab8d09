"""The tags of the app's annotations: their names and metas, and values that always leave safely."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from florence2.records import Result
from florence2.tasks import find_task
from serve.predict.geometry import is_finite
from serve.predict.naming import clean_text
from serve.sdk import sly

IMAGE_TEXT_TAGS: Final = {
    "<CAPTION>": "caption",
    "<DETAILED_CAPTION>": "caption",
    "<MORE_DETAILED_CAPTION>": "caption",
    "<OCR>": "ocr_text",
}
REGION_TEXT_TAGS: Final = {
    "<REGION_TO_CATEGORY>": "category",
    "<REGION_TO_DESCRIPTION>": "description",
    "<REGION_TO_OCR>": "text",
}

_STRING, _ON_OBJECTS = sly.TagValueType.ANY_STRING, sly.TagApplicableTo.OBJECTS_ONLY
_ON_IMAGES: Final = sly.TagApplicableTo.IMAGES_ONLY


def _tag_meta(name: str, value_type: str, on: str, color: list[int]) -> sly.TagMeta:
    return sly.TagMeta(name, value_type, color=color, applicable_to=on)


TAG_METAS: Final[dict[str, sly.TagMeta]] = {
    meta.name: meta
    for meta in (
        _tag_meta("confidence", sly.TagValueType.ANY_NUMBER, _ON_OBJECTS, [90, 140, 220]),
        _tag_meta("text", _STRING, _ON_OBJECTS, [220, 140, 60]),
        _tag_meta("description", _STRING, _ON_OBJECTS, [120, 180, 90]),
        _tag_meta("category", _STRING, _ON_OBJECTS, [180, 100, 200]),
        _tag_meta("caption", _STRING, _ON_IMAGES, [200, 90, 110]),
        _tag_meta("ocr_text", _STRING, _ON_IMAGES, [80, 170, 170]),
    )
}


def object_tags(score: float | None, texts: Iterable[tuple[str, str]]) -> list[sly.Tag]:
    """The confidence, where it is known, and every text that is not empty.

    A score is a plain float: the SDK refuses numpy's, and JSON has no NaN.
    """
    tags = [sly.Tag(TAG_METAS[name], text) for name, said in texts if (text := clean_text(said))]
    if score is not None and is_finite([score]):
        tags.insert(0, sly.Tag(TAG_METAS["confidence"], round(float(score), 4)))
    return tags


def image_tags(results: Iterable[Result]) -> list[sly.Tag]:
    """Captions and read text of the whole image; two prompts with one caption give one tag."""
    texts: dict[tuple[str, str], None] = {}
    for result in results:
        name = IMAGE_TEXT_TAGS.get(find_task(result.task.split("+", 1)[0]).token)
        if name and (text := clean_text(result.text or "")):
            texts[name, text] = None
    return [sly.Tag(TAG_METAS[name], text) for name, text in texts]
