"""The methods of ``Florence2``: which task each asks, of an image and of a list."""

from __future__ import annotations

import pytest
from engine_tools import REGION, assert_close, picture

from florence2 import FlorenceError
from florence2.errors import RequestError

METHODS = {
    "caption_image": ((), {"granularity": "detailed"}, "<DETAILED_CAPTION>"),
    "detect_objects": ((), {}, "<OD>"),
    "ground_phrase": (("a car",), {}, "<CAPTION_TO_PHRASE_GROUNDING>"),
    "segment_phrase": (("a car",), {}, "<REFERRING_EXPRESSION_SEGMENTATION>"),
    "ocr_image": ((), {}, "<OCR>"),
    "parse_document": ((), {}, "<OCR_WITH_REGION>"),
    "segment_region": ((REGION,), {}, "<REGION_TO_SEGMENTATION>"),
    "classify_image_region": ((REGION,), {}, "<REGION_TO_CATEGORY>"),
    "caption_image_region": ((REGION,), {}, "<REGION_TO_DESCRIPTION>"),
    "ocr_image_region": ((REGION,), {}, "<REGION_TO_OCR>"),
    "propose_regions": ((), {}, "<REGION_PROPOSAL>"),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_asks_its_task_of_an_image_and_of_a_list(model, method):
    arguments, keywords, task = METHODS[method]
    ability = getattr(model, method)
    single = ability(picture(16), *arguments, **keywords, max_new_tokens=4)
    assert single.task == task
    several = ability([picture(16), picture(17)], *arguments, **keywords, max_new_tokens=4)
    assert [result.task for result in several] == [task, task]
    assert_close(several[0], single)


def test_detecting_named_classes_grounds_them(model):
    result = model.detect_objects(picture(16), classes=["car", "tree"], max_new_tokens=4)
    assert result.task == "<CAPTION_TO_PHRASE_GROUNDING>"
    with pytest.raises(RequestError, match="name at least one"):
        model.detect_objects(picture(16), classes=[])
    with pytest.raises(FlorenceError, match="Unknown labels_mode"):
        model.detect_objects(picture(16), labels_mode="boxes")


def test_a_fine_tunes_own_prompt_goes_through_as_it_is_and_comes_back_as_text(model):
    result = model.run_custom("<DocVQA>", picture(16), "What is the total?", max_new_tokens=6)
    expected = model.engine.checkpoint.vocabulary.answer_text(result.token_ids)
    assert result.task == "<DocVQA>"
    assert result.text == expected
    with pytest.raises(RequestError, match="Unknown task"):
        model.run("<DocVQA>", picture(16), "What is the total?")
    with pytest.raises(RequestError):
        model.run_custom("<OD>", picture(16))
