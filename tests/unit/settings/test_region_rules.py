"""One rule for a region, whichever way it comes: refused or clipped alike."""

from __future__ import annotations

import numpy as np
import pytest

from florence2.engine.ask import as_region, prompt_sentence
from florence2.errors import RequestError
from florence2.images import open_image
from florence2.records import Box, Result
from florence2.tasks import find_task
from serve.labeling.settings import label_settings
from serve.predict.predictor import questions_of
from serve.predict.tiling import views_of
from serve.settings import parse_settings

WIDTH, HEIGHT = SIZE_WH = (200, 100)
TASK = find_task("region_category")


def ask_engine(box):
    return prompt_sentence(TASK, None, as_region(box), SIZE_WH)


def ask_command(box):
    words = ",".join(str(value) for value in box)
    settings = label_settings(task="region_category", region=words)
    [question] = questions_of(settings)
    return prompt_sentence(TASK, None, question.region, SIZE_WH)


def ask_server(**extra):
    settings = parse_settings({"task": "region_category", **extra})
    [question] = questions_of(settings)
    return prompt_sentence(TASK, None, question.region, SIZE_WH)


WAYS = {
    "engine": ask_engine,
    "command": ask_command,
    "server, regions": lambda box: ask_server(regions=[list(box)]),
    "server, rectangle": lambda box: ask_server(rectangle=list(box)),
    "server, words": lambda box: ask_server(region=",".join(map(str, box))),
}

REFUSED = {
    "shares": (0.1, 0.2, 0.9, 0.8),
    "all as shares": (0, 0, 1, 1),
    "flat": (10, 20.2, 100, 20.7),
    "no area": (10, 20, 10, 50),
    "inverted": (100, 20, 10, 50),
    "not a number": (float("nan"), 0, 10, 10),
    "without end": (0, 0, float("inf"), 10),
    "outside": (200, 0, 240, 50),
    "a sliver inside": (-50, 0, 0.5, 50),
}

CLIPPED = {
    "over the corner": ((-10, -10, 100, 100), (0, 0, 100, 100)),
    "over everything": ((-10, -10, 900, 900), (0, 0, 200, 100)),
    "a pixel": ((10, 10, 11, 11), (10, 10, 11, 11)),
    "a pixel's width in floats": ((100.3, 10, 101.3, 90), (100.3, 10, 101.3, 90)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", REFUSED)
def test_a_region_that_is_none_is_refused_in_one_sentence(way, case):
    with pytest.raises(RequestError) as refused:
        WAYS[way](REFUSED[case])
    assert "pixels" in str(refused.value) or "x1 < x2" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CLIPPED)
def test_what_is_over_the_edge_is_clipped(way, case):
    given, inside = CLIPPED[case]
    assert WAYS[way](given) == ask_engine(inside)


@pytest.mark.parametrize("case", REFUSED)
def test_a_rectangle_to_look_at_obeys_the_same_rule(case):
    picture = open_image(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    with pytest.raises(RequestError):
        views_of(picture, parse_settings({"rectangle": list(REFUSED[case])}).rectangle, None)


@pytest.mark.parametrize("points", [[[0.1, 0.2], [0.9, 0.8]], [[0, 0], [1, 0.5]]])
def test_an_sdk_rectangle_of_shares_is_refused(points):
    rectangle = {"points": {"exterior": points, "interior": []}}
    with pytest.raises(RequestError, match="in pixels"):
        parse_settings({"task": "region_category", "regions": [rectangle]})


def test_an_sdk_rectangle_of_one_row_is_a_region():
    rectangle = {"points": {"exterior": [[10, 20], [50, 20]], "interior": []}}
    settings = parse_settings({"task": "region_category", "regions": [rectangle]})
    assert settings.regions == ((10, 20, 51, 21),)


def test_a_cascade_passes_over_what_is_under_a_pixel():
    from florence2.engine.ask import regions_of

    objects = (Box((3.0, 3.0, 3.4, 40.0), "a line", 0.9), Box((3.0, 3.0, 9.0, 40.0), "a bar", 0.9))
    asked = regions_of(Result("<OD>", SIZE_WH, objects, None, "", (), False))
    assert [one.region is None for one in asked] == [True, False]
