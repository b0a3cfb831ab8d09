from __future__ import annotations

import math
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence2.records import Box, Polygon, Quad, Result, Text, Timings
from serve.predict.tiling import TileResult, merge_tiles, moved, plan_tiles

# Two tiles of 100 by 100 that share the strip from 80 to 100; the image is 180 by 100.
LEFT, RIGHT, WHOLE = (0, 0, 100, 100), (80, 0, 180, 100), (0, 0, 180, 100)


def tile(tile_xyxy, *objects, text=None, task="<OD>", **others):
    result = Result(task, (180, 100), tuple(objects), text, "", (), False, **others)
    return TileResult(result, tile_xyxy)


def car(x1, y1, x2, y2, score=0.5, label="car"):
    return Box((float(x1), float(y1), float(x2), float(y2)), label, score)


def merged(*tiles):
    return list(merge_tiles(tiles).objects)


@pytest.mark.parametrize(
    ("left", "right", "objects"),
    [
        pytest.param(
            car(85, 10, 95, 30, 0.5), car(86, 10, 95, 31, 0.7), [car(86, 10, 95, 31, 0.7)],
            id="seen whole twice: the surer",
        ),
        pytest.param(
            car(60, 10, 96, 30, 0.5), car(80, 10, 96, 30, 0.7), [car(60, 10, 96, 30, 0.7)],
            id="a piece of what the other tile sees whole goes, its score stays",
        ),
        pytest.param(
            car(40, 10, 100, 30, 0.5), car(80, 10, 130, 30, 0.7), [car(40, 10, 130, 30, 0.7)],
            id="two pieces are joined",
        ),
        pytest.param(
            car(40, 10, 99, 30), car(82, 12, 130, 33), [car(40, 10, 130, 33)],
            id="a few pixels from the edge",
        ),
        pytest.param(
            car(40, 10, 90, 30), car(80, 10, 130, 30), [car(40, 10, 90, 30), car(80, 10, 130, 30)],
            id="the left one ends before the edge",
        ),
        pytest.param(
            car(40, 10, 100, 30), car(80, 10, 130, 30, label="van"),
            [car(40, 10, 100, 30), car(80, 10, 130, 30, label="van")], id="two classes",
        ),
        pytest.param(
            car(40, 10, 100, 30), car(80, 21, 130, 41),
            [car(40, 10, 100, 30), car(80, 21, 130, 41)],
            id="less than half of the edge in common",
        ),
        pytest.param(
            car(40, 10, 100, 30), car(80, 20, 130, 40), [car(40, 10, 130, 40)],
            id="just half of the edge in common",
        ),
        pytest.param(
            car(40, 10, 100, 90), car(80, 10, 130, 40),
            [car(40, 10, 100, 90), car(80, 10, 130, 40)],
            id="a small one beside a large one",
        ),
        pytest.param(
            car(90, 10, 100, 30), car(80, 10, 88, 30), [car(90, 10, 100, 30), car(80, 10, 88, 30)],
            id="two small ones within the strip",
        ),
        pytest.param(
            car(90, 8, 100, 30, 0.9), car(80, 12, 130, 30), [car(80, 12, 130, 30, 0.9)],
            id="a piece within the strip adds nothing to one that fills it",
        ),
        pytest.param(
            car(40, 10, 100, 30, None), car(80, 10, 130, 30, 0.2), [car(40, 10, 130, 30, 0.2)],
            id="one has no score",
        ),
        pytest.param(
            car(40, 10, 100, 30, None), car(80, 10, 130, 30, None), [car(40, 10, 130, 30, None)],
            id="none has a score",
        ),
        pytest.param(
            car(20, 50, 100, 98, 0.9), car(84, 60, 96, 70, 0.1),
            [car(20, 50, 100, 98, 0.9), car(84, 60, 96, 70, 0.1)],
            id="a whole one within a piece is another object",
        ),
    ],
)  # fmt: skip
def test_what_two_tiles_saw_becomes(left, right, objects):
    assert merged(tile(LEFT, left), tile(RIGHT, right)) == objects


def test_tiles_that_only_touch_join_too():
    first, second = (0, 0, 100, 100), (100, 0, 200, 100)
    found = merged(tile(first, car(70, 10, 99.9, 30)), tile(second, car(100.1, 10, 130, 30)))
    assert found == [car(70, 10, 130, 30)]


def test_an_object_over_three_tiles_and_one_over_four_are_one_each():
    row = [(x, 0, x + 100, 100) for x in (0, 80, 160)]
    pieces = [car(50, 10, 100, 30), car(80, 10, 180, 30), car(160, 10, 220, 30)]
    assert merged(*(tile(*pair) for pair in zip(row, pieces, strict=True))) == [
        car(50, 10, 220, 30)
    ]
    square = plan_tiles((180, 180), (100, 100), (20, 20))
    pieces = [
        car(max(x1, 50), max(y1, 60), min(x2, 130), min(y2, 120)) for x1, y1, x2, y2 in square
    ]
    assert merged(*(tile(*pair) for pair in zip(square, pieces, strict=True))) == [
        car(50, 60, 130, 120)
    ]


def test_an_object_along_a_hundred_tiles_is_one_and_its_neighbour_another():
    tiles = [(80 * n, row, 80 * n + 100, row + 100) for n in range(100) for row in (0, 100)]
    seen = [tile(one, car(one[0], one[1] + 10, one[2], one[1] + 30)) for one in tiles]
    assert merged(*seen) == [car(0, 10, 8020, 30), car(0, 110, 8020, 130)]


def test_a_pass_over_the_whole_image_takes_the_place_of_the_pieces():
    whole = tile(WHOLE, car(40, 10, 130, 30, 0.4), text="a road")
    pieces = tile(LEFT, car(40, 10, 100, 30, 0.9)), tile(RIGHT, car(80, 10, 131, 30, 0.5))
    assert merged(whole, *pieces) == merged(*pieces, whole) == [car(40, 10, 130, 30, 0.9)]
    assert merged(whole, pieces[1]) == [car(40, 10, 130, 30, 0.5)]


def test_a_joined_object_that_goes_on_is_still_a_piece_of_the_whole():
    row = [(x, 0, x + 100, 100) for x in (0, 80, 160)]
    pieces = [tile(row[0], car(10, 10, 100, 30)), tile(row[1], car(80, 10, 180, 30))]
    assert merged(*pieces, tile(row[2])) == [car(10, 10, 180, 30)]
    whole = tile((0, 0, 260, 100), car(10, 10, 205, 31, 0.2))
    assert merged(whole, *pieces, tile(row[2])) == [car(10, 10, 205, 31, 0.5)]


def test_the_edges_of_a_rectangle_within_the_image_are_no_cuts():
    area = [(300, 200, 400, 300), (380, 200, 480, 300)]
    found = merged(tile(area[0], car(300, 210, 330, 240)), tile(area[1]))
    again = merged(
        tile(area[0], car(300, 210, 330, 240)), tile(area[1]), tile((300, 200, 480, 300))
    )
    assert found == again == [car(300, 210, 330, 240)]


@pytest.mark.parametrize(
    ("whole", "left", "right", "labels"),
    [
        pytest.param(
            [car(40, 10, 130, 40)], [car(60, 25, 100, 40, label="wheel")],
            [car(80, 10, 130, 40, label="truck")], ["car"],
            id="fragments of one seen whole go, whatever their name",
        ),
        pytest.param(
            [car(40, 10, 130, 40)], [car(50, 20, 70, 40, label="wheel")],
            [car(110, 20, 128, 40, label="wheel")], ["car", "wheel", "wheel"],
            id="whole ones inside a whole one stay",
        ),
        pytest.param(
            [car(40, 10, 130, 40)], [car(60, 12, 100, 39, label="truck")],
            [car(80, 12, 125, 39, label="truck")], ["car"],
            id="joined from pieces, where one tile saw another whole",
        ),
        pytest.param(
            [car(0, 0, 180, 100, label="house")], [car(60, 30, 100, 60, label="person")],
            [car(80, 30, 120, 60, label="person")], ["house", "person"],
            id="cut by every tile, joined, and small before a large whole one",
        ),
        pytest.param(
            [], [car(60, 30, 100, 60, label="person")], [car(80, 28, 120, 60, label="cat")],
            ["person", "cat"],
            id="cut by every tile and seen whole by none",
        ),
        pytest.param(
            [car(40, 10, 130, 40)], [car(0, 20, 60, 38, label="sign")],
            [car(120, 20, 180, 38, label="sign")], ["car", "sign", "sign"],
            id="cut by the edge of the image only",
        ),
        pytest.param(
            [car(40, 10, 130, 40)], [car(90, 30, 100, 80, label="person")], [],
            ["car", "person"], id="mostly outside of the whole one",
        ),
        pytest.param(
            [Polygon(((40.0, 10.0, 130.0, 10.0, 130.0, 40.0, 40.0, 40.0),), "car", 0.5)],
            [Polygon(((60.0, 25.0, 100.0, 25.0, 100.0, 40.0),), "wheel", 0.5)], [], ["car"],
            id="outlines",
        ),
    ],
)  # fmt: skip
def test_names_of_what_stays_beside_an_object_seen_whole(whole, left, right, labels):
    tiles = tile(LEFT, *left), tile(RIGHT, *right)
    for order in ([tile(WHOLE, *whole), *tiles], [*tiles, tile(WHOLE, *whole)]):
        assert sorted(shape.label for shape in merged(*order)) == sorted(labels)


def test_the_tile_that_sees_the_whole_object_may_be_one_of_many():
    left = tile(LEFT, car(70, 10, 98, 40, label="truck"))
    assert merged(left, tile(RIGHT, car(84, 10, 130, 40))) == [
        car(70, 10, 98, 40, label="truck"), car(84, 10, 130, 40)
    ]  # fmt: skip
    right = tile(RIGHT, car(81, 12, 96, 38, label="truck"))
    assert merged(tile(LEFT, car(60, 10, 96, 40)), right) == [car(60, 10, 96, 40)]


def test_a_whole_object_that_the_user_will_not_see_takes_nothings_place():
    tiles = [
        tile(WHOLE, car(40, 10, 130, 40, 0.1)),
        tile(LEFT, car(60, 25, 100, 40, 0.9, label="truck")),
        tile(RIGHT),
    ]
    shown = merge_tiles(tiles, lambda shape: shape.score >= 0.1).objects
    assert [shape.label for shape in shown] == ["car"]
    assert shown[0].score == 0.1
    unseen = merge_tiles(tiles, lambda shape: shape.score >= 0.3).objects
    assert [shape.label for shape in unseen] == ["car", "truck"]


def test_what_one_tile_saw_twice_stays():
    twins = car(10, 10, 40, 40, 0.9), car(10, 10, 40, 41, 0.8)
    assert merged(tile(LEFT, *twins), tile(RIGHT)) == [*twins]


def test_pieces_of_an_outline_become_rings_of_one_object():
    left = Polygon(((50.0, 10.0, 100.0, 10.0, 100.0, 30.0),), "car", 0.4)
    right = Polygon(((80.0, 10.0, 130.0, 10.0, 80.0, 30.0),), "car", 0.6)
    assert merged(tile(LEFT, left), tile(RIGHT, right)) == [
        Polygon((*left.rings_xy, *right.rings_xy), "car", 0.6)
    ]
    assert merged(tile(LEFT, left), tile(RIGHT, car(80, 10, 130, 30))) == [
        left, car(80, 10, 130, 30)
    ]  # fmt: skip


def test_a_line_of_text_is_kept_whole_and_its_pieces_are_not_joined():
    def line(x1, x2, words, score=0.5):
        return Quad((x1, 10.0, x2, 10.0, x2, 20.0, x1, 20.0), words, score)

    whole, piece = line(50.0, 96.0, "EXIT 12", 0.3), line(81.0, 96.0, "T 12", 0.9)
    right = tile(RIGHT, piece, task="<OCR_WITH_REGION>")
    assert merged(tile(LEFT, whole), right) == [line(50.0, 96.0, "EXIT 12", 0.9)]
    cut = line(30.0, 100.0, "NO PAR"), line(80.0, 140.0, "ARKING")
    assert merged(tile(LEFT, cut[0]), tile(RIGHT, cut[1])) == [*cut]


def test_words_are_those_of_the_whole_image_and_the_rest_is_of_all_tiles():
    def answered(where, words, seconds, *, truncated=False):
        found = tile(
            where,
            Text(words, 0.9),
            text=words,
            notes=("n", words),
            timings_s=Timings(0, 0, seconds),
        )
        result = found.result
        answer = Result(
            result.task, result.size_wh, result.objects, words, words, (len(words),), truncated,
            result.notes, (result,), (-0.1,), (), result.timings_s,
        )  # fmt: skip
        return TileResult(answer, where)

    parts = [answered(LEFT, "left", 2.0, truncated=True), answered(RIGHT, "right", 3.0)]
    result = merge_tiles([*parts, answered(WHOLE, "all of it", 1.0)])
    assert result.objects == (Text("all of it", 0.9),)
    assert (result.text, result.answer) == ("all of it", "left\nright\nall of it")
    assert (result.token_ids, result.log_probs, result.steps) == ((4, 5, 9), (), ())
    assert result.notes == ("n", "left", "right", "all of it")
    assert result.truncated
    assert result.timings_s == Timings(0, 0, 3.0)
    assert merge_tiles(parts).text is None
    assert merge_tiles(parts).objects == ()


def test_objects_without_a_place_go_and_no_objects_are_no_objects():
    assert merged(tile(LEFT, car(math.nan, 1, 2, 3)), tile(RIGHT)) == []


# Objects of a scene far enough from each other, as tiles would see them with perfect eyes.
SCENE_WH = (300, 260)


@st.composite
def scenes(draw):
    boxes = []
    for column in range(3):
        for row in range(3):
            if draw(st.booleans()):
                x1, y1 = (
                    draw(st.integers(0, 30)) + 100 * column,
                    draw(st.integers(0, 30)) + 86 * row,
                )
                width, height = draw(st.integers(12, 60)), draw(st.integers(12, 45))
                boxes.append(car(x1, y1, x1 + width, y1 + height))
    return boxes


def seen_through(window, boxes):
    """The boxes in a window's own pixels, cut where it ends; slivers are not seen."""
    x1, y1, x2, y2 = window
    for box in boxes:
        a, b, c, d = box.box_xyxy
        cut = (max(a, x1) - x1, max(b, y1) - y1, min(c, x2) - x1, min(d, y2) - y1)
        if cut[2] - cut[0] >= 1 and cut[3] - cut[1] >= 1:
            yield Box(cut, box.label, box.score)


@given(scenes(), st.booleans(), st.sampled_from([(120, 110), (90, 100), (300, 90)]))
def test_what_perfect_eyes_see_in_tiles_is_the_scene(boxes, full_image, tile_wh):
    windows = [*plan_tiles(SCENE_WH, tile_wh, (30, 30))]
    if full_image:
        windows.append((0, 0, *SCENE_WH))
    found = [
        TileResult(
            moved(
                Result("<OD>", tile_wh, tuple(seen_through(w, boxes)), None, "", (), False),
                (w[0], w[1]),
                SCENE_WH,
            ),
            w,
        )
        for w in windows
    ]
    result = merge_tiles(found)
    assert result.size_wh == SCENE_WH
    by_place = attrgetter("box_xyxy")
    assert sorted(result.objects, key=by_place) == sorted(boxes, key=by_place)
