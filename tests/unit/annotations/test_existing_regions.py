from __future__ import annotations

import numpy as np
import pytest

from florence2.records import Region
from serve.platform.existing_objects import LabelRegion, regions_from_annotation
from serve.sdk import sly


def points(*pairs):
    return [sly.PointLocation(row, column) for row, column in pairs]


@pytest.mark.parametrize(
    ("geometry", "box"),
    [
        pytest.param(sly.Rectangle(2, 3, 11, 13), (3, 2, 14, 12), id="rectangle"),
        pytest.param(sly.Polygon(points((2, 3), (2, 9), (7, 9))), (3, 2, 10, 8), id="polygon"),
        pytest.param(
            sly.Bitmap(np.ones((4, 5), bool), sly.PointLocation(10, 20)), (20, 10, 25, 14),
            id="bitmap",
        ),
        pytest.param(sly.Polyline(points((1, 1), (5, 9))), (1, 1, 10, 6), id="line"),
        pytest.param(sly.Point(4, 6), (6, 4, 7, 5), id="a point is one pixel"),
    ],
)  # fmt: skip
def test_the_region_of_every_shape_is_its_outer_box(geometry, box):
    label = sly.Label(geometry, sly.ObjClass("x", type(geometry)))
    (found,) = regions_from_annotation(sly.Annotation((40, 60), [label]))
    assert found == LabelRegion(0, None, Region(box))


def test_regions_name_their_label_and_the_platforms_figure():
    meta = sly.ProjectMeta([sly.ObjClass("car", sly.Rectangle)])
    stored = [
        {
            "id": 70 + n, "classTitle": "car", "tags": [], "geometryType": "rectangle",
            "points": {"exterior": [[n, n], [n + 9, n + 9]], "interior": []},
        }
        for n in range(2)
    ]  # fmt: skip
    annotation = sly.Annotation.from_json(
        {"size": {"width": 60, "height": 40}, "tags": [], "objects": stored, "description": ""},
        meta,
    )
    found = regions_from_annotation(annotation)
    assert [(one.label_index, one.figure_id) for one in found] == [(0, 70), (1, 71)]
    assert found[1].region == Region((1.0, 1.0, 11.0, 11.0))


def test_a_shape_without_a_place_is_left_out_and_no_size_cuts_nothing_off():
    unknown = sly.Label(
        sly.AnyGeometry({"points": []}, "spiral"), sly.ObjClass("x", sly.AnyGeometry)
    )
    known = sly.Label(sly.Rectangle(0, 0, 4000, 4), sly.ObjClass("x", sly.Rectangle))
    linked = sly.Annotation((None, None), [unknown, known])
    assert regions_from_annotation(linked) == [LabelRegion(1, None, Region((0, 0, 5, 4001)))]
