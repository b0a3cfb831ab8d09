from __future__ import annotations

import threading

import pytest

from serve.model_service import ModelMeta
from serve.predict.annotations import TAG_METAS
from serve.sdk import sly

FIXED = {
    "object": sly.Rectangle,
    "text": sly.Polygon,
    "object (polygon)": sly.Polygon,
    "object (bitmap)": sly.Bitmap,
}
BOX = sly.Rectangle(1, 1, 9, 9)
OUTLINE = sly.Polygon([sly.PointLocation(*p) for p in ((1, 1), (1, 9), (9, 9))])


def annotation(*named):
    labels = [sly.Label(shape, sly.ObjClass(name, type(shape))) for name, shape in named]
    return sly.Annotation((20, 20), labels)


def shapes(meta):
    return {one.name: one.geometry_type for one in meta.snapshot().obj_classes}


def test_the_fixed_classes_and_every_tag_are_there_from_the_start():
    meta = ModelMeta()
    assert shapes(meta) == FIXED
    assert {tag.name: tag for tag in meta.snapshot().tag_metas} == TAG_METAS
    stored = meta.snapshot().to_json()
    assert sly.ProjectMeta.from_json(stored) == meta.snapshot()


def test_classes_of_answers_are_learnt_and_an_earlier_snapshot_stays_what_it_was():
    meta = ModelMeta()
    before = meta.snapshot()
    meta.learn(annotation(("cat", BOX), ("kite", OUTLINE), ("cat", BOX)))
    assert shapes(meta) == {**FIXED, "cat": sly.Rectangle, "kite": sly.Polygon}
    assert before.get_obj_class("cat") is None
    after = meta.snapshot()
    meta.learn(annotation(("cat", BOX)))
    assert meta.snapshot() is after


def test_a_class_in_a_second_shape_becomes_one_of_any_shape_and_stays_that():
    meta = ModelMeta()
    both = [annotation(("cat", BOX)), annotation(("cat", OUTLINE))]
    for one in [*both, both[0]]:
        meta.learn(one)
    assert shapes(meta)["cat"] is sly.AnyGeometry
    for one in both:
        read = sly.Annotation.from_json(one.to_json(), meta.snapshot())
        assert type(read.labels[0].geometry) is type(one.labels[0].geometry)


def test_a_fixed_class_keeps_its_shape_whatever_is_learnt():
    meta = ModelMeta()
    meta.learn(annotation(("object", OUTLINE)))
    meta.learn(annotation(("text", BOX)))
    assert shapes(meta) == FIXED


def test_the_classes_seen_longest_ago_go_first_and_the_fixed_ones_never():
    meta = ModelMeta(max_learnt=3)
    for name in "abcad":
        meta.learn(annotation((name, BOX)))
    assert set(shapes(meta)) == {*FIXED, "a", "c", "d"}
    meta.learn(annotation(*((str(number), BOX) for number in range(50))))
    assert set(shapes(meta)) == {*FIXED, "47", "48", "49"}


@pytest.mark.parametrize("geometry", [BOX, OUTLINE], ids=["one shape", "two shapes"])
def test_many_threads_learn_without_losing_a_class(geometry):
    meta = ModelMeta()
    names = [[f"class {thread}-{n}" for n in range(20)] for thread in range(16)]
    seen: list[sly.ProjectMeta] = []
    ready = threading.Barrier(len(names))

    def work(own):
        ready.wait()
        for name in own:
            meta.learn(annotation((name, BOX), ("shared", BOX)))
            meta.learn(annotation(("shared", geometry)))
            seen.append(meta.snapshot())

    threads = [threading.Thread(target=work, args=(own,)) for own in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = shapes(meta)
    assert set(found) == {*FIXED, "shared", *(name for own in names for name in own)}
    assert found["shared"] is (sly.Rectangle if geometry is BOX else sly.AnyGeometry)
    assert len(seen) == 320
    assert all(one.get_obj_class("shared") for one in seen)


def test_classes_of_a_fine_tune_come_first_and_go_with_it_but_for_what_answers_had():
    own = [
        sly.ObjClass("kite", sly.Rectangle, [1, 2, 3]),
        sly.ObjClass("boat", sly.Rectangle),
        sly.ObjClass("text", sly.Rectangle),
    ]
    deployed = [tuple(own)]
    meta = ModelMeta(own_classes=lambda: deployed[0])
    assert list(shapes(meta)) == ["kite", "boat", *FIXED]
    assert shapes(meta)["text"] is sly.Polygon
    assert meta.snapshot().get_obj_class("kite").color == [1, 2, 3]
    for one in (annotation(("kite", OUTLINE), ("cat", BOX)), annotation(("cat", BOX))):
        meta.learn(one)
    assert shapes(meta)["kite"] is sly.AnyGeometry
    assert list(shapes(meta)) == ["kite", "boat", *FIXED, "cat"]
    deployed[0] = ()
    assert shapes(meta) == {**FIXED, "kite": sly.Polygon, "cat": sly.Rectangle}
