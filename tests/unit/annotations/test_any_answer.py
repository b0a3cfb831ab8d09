from __future__ import annotations

import json
import math

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from florence2.records import Box, Polygon, Quad, Region, Result, Text
from florence2.tasks import TASKS, OutputKind, TaskInput
from serve.model_service import ModelMeta
from serve.naming import MAX_CLASS_NAME
from serve.predict.annotations import (
    IMAGE_TEXT_TAGS,
    REGION_TEXT_TAGS,
    TAG_METAS,
    Answered,
    LabelRules,
    annotation_from_answers,
)
from serve.predict.geometry import ring_area
from serve.sdk import sly

WIDTH, HEIGHT = 64, 48

coordinate = st.floats(-30, 100) | st.floats() | st.integers(-5, 70).map(float)
score = st.none() | st.floats() | st.floats(0, 1).map(np.float32)
name = st.sampled_from(["cat", "object", "text", "cat (polygon)", "", "\n"]) | st.text()
box = st.tuples(*[coordinate] * 4)
ring = st.lists(coordinate, max_size=14).map(lambda ring: tuple(ring[: len(ring) // 2 * 2]))
located = st.one_of(
    st.builds(Box, box, name, score),
    st.builds(Quad, st.tuples(*[coordinate] * 8), name, score),
    st.builds(Polygon, st.lists(ring, max_size=3).map(tuple), name, score),
    st.builds(Text, name, score),
)
tasks = [task.token for task in TASKS]
cascades = [
    "<OD>+<REGION_TO_DESCRIPTION>",
    "<DENSE_REGION_CAPTION>+<REGION_TO_SEGMENTATION>",
    "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>",
]


def a_result(task, objects, text, steps=()):
    return Result(task, (WIDTH, HEIGHT), tuple(objects), text, "", (), False, (), tuple(steps))


step = st.builds(a_result, st.sampled_from(tasks), st.lists(located, max_size=4), st.none() | name)
results = st.builds(
    a_result,
    st.sampled_from([*tasks, *cascades]),
    st.lists(located, max_size=8),
    st.none() | name,
    st.lists(step, max_size=4),
)
answers = st.lists(
    st.builds(
        Answered, results, st.none() | name, st.none() | name, st.none() | st.builds(Region, box)
    ),
    max_size=4,
)
share = st.floats(0, 1)
rules = st.builds(
    LabelRules,
    st.dictionaries(name, name, max_size=3),
    share,
    st.dictionaries(name, share, max_size=3),
    st.dictionaries(name, st.tuples(st.tuples(share, share)), max_size=3),
    st.none() | st.frozensets(name, max_size=4),
    st.text(max_size=60),
    st.sampled_from(["polygon", "bitmap"]),
    share,
    st.booleans(),
    st.none() | share,
    st.none() | share,
    st.booleans(),
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(answers, rules)
def test_every_answer_gives_an_annotation_that_clients_can_read(answered, label_rules):
    annotation, located = annotation_from_answers(answered, label_rules, (WIDTH, HEIGHT))
    assert len(located) == len(annotation.labels)
    assert None not in located
    meta = ModelMeta()
    meta.learn(annotation)
    stored = json.loads(json.dumps(annotation.to_json(), allow_nan=False))
    read = sly.Annotation.from_json(stored, meta.snapshot())
    assert read.to_json() == stored
    shapes = {}
    for label in read.labels:
        kind = label.geometry.geometry_name()
        assert shapes.setdefault(label.obj_class.name, kind) == kind
        assert 0 < len(label.obj_class.name) <= MAX_CLASS_NAME
        outer = label.geometry.to_bbox()
        assert 0 <= outer.top <= outer.bottom < HEIGHT
        assert 0 <= outer.left <= outer.right < WIDTH
        if isinstance(label.geometry, sly.Polygon):
            assert ring_area([(p.row, p.col) for p in label.geometry.exterior]) > 0
        for tag in label.tags:
            is_number = type(tag.value) is float and math.isfinite(tag.value)
            assert is_number if tag.name == "confidence" else type(tag.value) is str and tag.value
    assert all(type(tag.value) is str and tag.value for tag in read.img_tags)
    fixed = ModelMeta().snapshot()
    for label in annotation.labels:
        known = fixed.get_obj_class(label.obj_class.name)
        assert known is None or known.geometry_type is type(label.geometry)


pixel = st.tuples(st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1))


@given(pixel, pixel, pixel)
def test_an_outline_is_a_label_exactly_where_it_has_an_area(first, second, third):
    doubled = (second[0] - first[0]) * (third[1] - first[1])
    doubled -= (third[0] - first[0]) * (second[1] - first[1])
    shape = Polygon(((*first, *second, *third),), "x", 0.5)
    answer = a_result("<REGION_TO_SEGMENTATION>", [shape], None)
    for geometry in ("polygon", "bitmap"):
        rules = LabelRules(geometry=geometry)
        annotation, _ = annotation_from_answers([Answered(answer)], rules, (WIDTH, HEIGHT))
        assert len(annotation.labels) == (doubled != 0)


def test_no_task_answers_with_a_text_that_has_no_tag():
    for task in TASKS:
        if task.output is OutputKind.TEXT:
            names = REGION_TEXT_TAGS if task.takes is TaskInput.REGION else IMAGE_TEXT_TAGS
            assert names[task.token] in TAG_METAS
