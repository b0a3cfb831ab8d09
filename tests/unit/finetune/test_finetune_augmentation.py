"""Boxes and outlines follow the image; what is written is not mirrored."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from florence2.errors import RequestError
from florence2.finetune.augmentation import (
    Augmentation,
    clipped_ring,
    cropped,
    mirrored,
    parse_augmentations,
)
from florence2.labeled.records import LabeledImage, LabeledObject, WantedAnswer

SIZE = (200, 100)


def painted(*things):
    """A picture whose pixels are 255 where a thing's box is."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    for thing in things:
        x1, y1, x2, y2 = map(int, thing.box_xyxy)
        pixels[y1:y2, x1:x2] = 255
    return Image.fromarray(pixels), LabeledImage("x.png", "x.png", SIZE, things)


def thing(*box, **texts):
    x1, y1, x2, y2 = map(float, box)
    return LabeledObject("box", (x1, y1, x2, y2), ((x1, y1, x2, y1, x2, y2, x1, y2),), texts)


def bright(picture):
    """The box around what was painted."""
    rows, columns = np.nonzero(np.asarray(picture)[..., 0] > 100)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize(
    "change",
    [
        mirrored,
        lambda *given: cropped(*given, (10, 5, 150, 90)),
        lambda *g: mirrored(*mirrored(*g)),
    ],
)
def test_labels_are_where_the_pixels_went(change):
    picture, labels = change(*painted(thing(20, 10, 60, 40)))
    [moved] = labels.objects
    assert labels.size_wh == picture.size
    assert moved.box_xyxy == pytest.approx(bright(picture))
    assert (min(moved.rings_xy[0][0::2]), max(moved.rings_xy[0][1::2])) == pytest.approx(
        (moved.box_xyxy[0], moved.box_xyxy[3])
    )


def test_a_thing_is_cut_at_the_edge_and_forgotten_where_little_is_left():
    half, sliver, gone = thing(0, 0, 40, 40), thing(150, 0, 190, 40), thing(190, 90, 200, 100)
    _, labels = cropped(*painted(half, sliver, gone), (20, 0, 160, 100))
    assert [one.box_xyxy for one in labels.objects] == [(0, 0, 20, 40)]
    assert labels.objects[0].rings_xy == ((0, 0, 20, 0, 20, 40, 0, 40),)


@pytest.mark.parametrize(
    ("ring", "expected"),
    [
        ((10, 10, 50, 10, 50, 50), (10, 10, 50, 10, 50, 50)),
        ((-50, 50, 50, -50, 150, 50, 50, 150), (0, 0, 100, 0, 100, 100, 0, 100)),
        ((200, 200, 300, 200, 300, 300), ()),
    ],
)
def test_outlines_end_where_the_image_does(ring, expected):
    found = clipped_ring(tuple(map(float, ring)), (100, 100))
    corners = {tuple(np.round(point, 6)) for point in np.reshape(found, (-1, 2))}
    assert corners == {tuple(point) for point in np.reshape(expected, (-1, 2)).astype(float)}


CAPTION_TAGS = frozenset({"caption"})


def places(image, kinds=("flip", "crop", "colour"), has_text=False, seeds=range(40)):
    """Every place that the first thing of an image comes to."""
    way = Augmentation(kinds, has_text, CAPTION_TAGS)
    picture = painted(*image.objects)[0]
    changed = [way.apply(picture, image, np.random.default_rng(seed)) for seed in seeds]
    return {labels.objects[0].box_xyxy for _, labels in changed if labels.objects}


@pytest.mark.parametrize(
    ("image", "has_text", "moves"),
    [
        (LabeledImage("x", "x", SIZE, (thing(80, 40, 120, 60),)), True, True),
        (LabeledImage("x", "x", SIZE, (thing(80, 40, 120, 60, text="STOP"),)), True, False),
        (LabeledImage("x", "x", SIZE, (thing(80, 40, 120, 60, text="STOP"),)), False, True),
        (
            LabeledImage("x", "x", SIZE, (thing(80, 40, 120, 60),), {"caption": "left"}),
            False,
            False,
        ),
        # A person's own tag, or a sentence that no task of this training asks for.
        (LabeledImage("x", "x", SIZE, (thing(80, 40, 120, 60),), {"split": "val"}), False, True),
        (
            LabeledImage("x", "x", SIZE, (thing(80, 40, 120, 60),), {"detailed_caption": "left"}),
            False,
            True,
        ),
        (
            LabeledImage(
                "x", "x", SIZE, (thing(80, 40, 120, 60),), {}, "", (WantedAnswer("a", "b"),)
            ),
            False,
            False,
        ),
    ],
)
def test_an_image_moves_unless_its_answers_would_become_wrong(image, has_text, moves):
    found = places(image, has_text=has_text)
    assert (len(found) > 10) == moves
    if not moves:
        assert found == {(80.0, 40.0, 120.0, 60.0)}


def test_colours_change_and_places_do_not():
    picture, image = painted(thing(80, 40, 120, 60))
    grey = Image.fromarray(np.asarray(picture) // 2)
    changed, labels = Augmentation(("colour",)).apply(grey, image, np.random.default_rng(1))
    assert labels == image
    assert np.abs(np.asarray(changed).astype(int) - np.asarray(grey)).max() > 5


@pytest.mark.parametrize(
    ("text", "kinds"),
    [("flip,crop,colour", ("flip", "crop", "colour")), ("colour, flip", ("flip", "colour")),
     ("none", ()), ("", ())],
)  # fmt: skip
def test_augmentations_are_named(text, kinds):
    assert parse_augmentations(text) == kinds


def test_an_unknown_augmentation_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match=r"Unknown augmentation 'rotate'.*flip, crop, colour"):
        parse_augmentations("flip,rotate")
