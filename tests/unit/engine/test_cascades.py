"""Cascades: nothing found is lost, nothing given is ignored, one odd region stops nothing."""

from __future__ import annotations

from dataclasses import replace

from engine_tools import picture

from florence2.engine.ask import join_region_answers, regions_of
from florence2.records import Box, Polygon, Quad, Region, Result, Text
from florence2.tasks import find_task

CAR = Box((10.0, 20.0, 60.0, 90.0), "car", 0.9)
LINE = Polygon(((5.0, 5.0, 5.0, 30.0, 5.0, 60.0),), "a line", 0.8)
SIGN = Quad((1.0, 2.0, 9.0, 2.0, 9.0, 7.0, 1.0, 7.0), "STOP", 0.7)
DESCRIBE = find_task("<REGION_TO_DESCRIPTION>")
SEGMENT = find_task("<REGION_TO_SEGMENTATION>")


def result(*objects, text=None):
    return Result("<OD>", (100, 100), objects, text, "", (), truncated=False)


def described(text):
    return result(Text(text, 0.1), text=text)


def test_every_detected_box_stays_with_its_own_score_even_without_a_description():
    before = result(CAR, SIGN)
    joined = join_region_answers(
        DESCRIBE, "both", before, regions_of(before), [described(""), described("a stop sign")]
    )
    assert joined.objects == (
        Box(CAR.box_xyxy, "", 0.9),
        Box((1.0, 2.0, 9.0, 7.0), "a stop sign", 0.7),
    )


def test_a_region_without_area_is_kept_with_a_note_and_not_asked_about():
    before = result(LINE, CAR)
    asked = regions_of(before)
    assert [one.region for one in asked] == [None, Region(CAR.box_xyxy)]
    joined = join_region_answers(DESCRIBE, "both", before, asked, [described("a red car")])
    assert [found.label for found in joined.objects] == ["", "a red car"]
    assert joined.notes == ("object 1 ('a line') is under a pixel and was not asked about",)


def test_a_polygon_has_the_label_of_its_region_and_its_own_score():
    before = result(LINE, CAR)
    outline = Polygon(((1.0, 1.0, 9.0, 1.0, 9.0, 9.0),), "", 0.4)
    joined = join_region_answers(SEGMENT, "both", before, regions_of(before), [result(outline)])
    assert joined.objects == (replace(outline, label="car"),)


def test_a_cascade_asks_about_every_detected_box_and_keeps_its_score(demo):
    image = picture(14)
    joined = demo.run("<OD>+<REGION_TO_DESCRIPTION>", image, max_new_tokens=24)
    detection, *described = joined.steps
    assert len(described) == len(detection.objects) > 0
    for found, box, step in zip(joined.objects, detection.objects, described, strict=True):
        assert (found.box_xyxy, found.score) == (box.box_xyxy, box.score)
        alone = demo.run("<REGION_TO_DESCRIPTION>", image, region=box.box_xyxy, max_new_tokens=24)
        assert alone.token_ids == step.token_ids


def test_an_outline_without_points_has_no_region():
    empty = Polygon(rings_xy=(), label="cat", score=None)
    result = Result("<OD>", (10, 10), (empty,), None, "", (), truncated=False)
    assert [asked.region for asked in regions_of(result)] == [None]
