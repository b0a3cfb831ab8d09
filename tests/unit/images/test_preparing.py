"""Images are prepared once, ahead of the model or by whoever takes them, and then forgotten."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from preparing_tools import (
    PATIENCE_S,
    SIZE_WH,
    Gate,
    file_of,
    picture,
    take,
    take_ahead,
    take_also,
)

from florence2.engine.encoding import Preparer
from florence2.errors import ImageError
from florence2.images import identity
from florence2.pixels import ImageProcessor
from florence2.records import Failure


def test_a_prepared_image_is_the_processors(make):
    image = picture()
    for prepared in (take(make(), image), take_ahead(make(), image)):
        assert prepared.size_wh == (20, 14)
        assert np.array_equal(prepared.scaled, ImageProcessor(size_wh=SIZE_WH).resize(image.image))


def test_every_source_of_one_picture_has_one_hash(make, tmp_path):
    image = picture()
    path = tmp_path / "a.png"
    path.write_bytes(file_of(image))
    preparer = make()
    sources = [image, image.image, np.asarray(image.image), file_of(image), path, str(path)]
    assert len({preparer.take(source).content_hash for source in sources}) == 1


def test_images_that_could_be_answered_otherwise_have_other_hashes(make):
    grey = [np.full((height, width, 3), 90, np.uint8) for width, height in ((5, 7), (7, 5))]
    sources = [*grey, np.full((5, 7, 3), 91, np.uint8)]
    assert len({make().take(source).content_hash for source in sources}) == 3


@pytest.mark.parametrize("is_file", [False, True])
def test_an_image_is_prepared_once_for_all_who_wait_for_it(make, processor, is_file):
    gate = processor.gates[30] = Gate()
    preparer, image = make(), picture(30)
    one, same = (image, image) if not is_file else (file_of(image), bytes(file_of(image)))
    preparer.ahead([one])
    assert gate.begun.wait(PATIENCE_S)
    with ThreadPoolExecutor(2) as pool:
        takers = [pool.submit(preparer.take, source) for source in (one, same)]
        while preparer._jobs[identity(one)].num_takers < 2:
            time.sleep(0.001)
        gate.opened.set()
        results = [taker.result(PATIENCE_S) for taker in takers]
    assert results[0] is results[1]
    assert processor.widths == [30]


def test_what_is_ahead_is_taken_from_there(make, processor):
    preparer, images = make(), [picture(30), picture(31)]
    preparer.ahead(images)
    taken = [preparer.take(image) for image in images]
    assert [one.size_wh[0] for one in taken] == [30, 31]
    assert sorted(processor.widths) == [30, 31]
    assert preparer._jobs == {}


def test_helpers_work_while_nobody_takes(make, processor):
    gate = processor.gates[30] = Gate()
    make().ahead([picture(30)])
    assert gate.begun.wait(PATIENCE_S)
    assert processor.seen[0][1].startswith("florence2-images")


def test_nobody_waits_behind_other_images(busy, processor):
    assert take_also(busy, picture(30)).size_wh == (30, 14)
    assert processor.seen[-1] == ((30, 14), threading.current_thread().name)


def test_an_image_in_hand_is_waited_for(make, processor):
    gate = processor.gates[30] = Gate()
    preparer, image = make(), picture(30)
    preparer.ahead([image])
    assert gate.begun.wait(PATIENCE_S)
    threading.Timer(0.05, gate.opened.set).start()
    assert preparer.take(image).size_wh == (30, 14)
    assert processor.widths == [30]


def test_no_more_than_allowed_is_prepared_ahead(make, processor):
    preparer, images = make(max_ahead=2), [picture(width) for width in (30, 31, 32, 33)]
    preparer.ahead(images)
    assert len(preparer._jobs) == 2
    assert preparer.take(images[3]).size_wh == (33, 14)
    assert ((33, 14), threading.current_thread().name) in processor.seen
    assert preparer.take(images[0]).size_wh == (30, 14)
    assert len(preparer._jobs) == 1
    preparer.also_ahead([images[2]])
    assert len(preparer._jobs) == 2
    assert preparer.take(images[2]).size_wh == (32, 14)


def test_what_comes_besides_replaces_nothing(busy):
    first, second = picture(30), picture(31)
    busy.also_ahead([first])
    busy.also_ahead([second])
    assert len(busy._jobs) == 3


def test_what_comes_next_replaces_what_was_to_come(busy, processor):
    first, second, third = (picture(width) for width in (30, 31, 32))
    busy.ahead([first, second, third])
    assert len(busy._jobs) == 3
    busy.ahead([third])
    assert len(busy._jobs) == 1
    busy.ahead([])
    assert len(busy._jobs) == 0
    processor.gates[99].opened.set()
    busy.close()
    assert processor.widths == [99]


def test_what_was_prepared_before_is_known_and_not_ahead(make):
    preparer, image = make(), picture()
    assert preparer.known_hash(image) is None
    found = preparer.take(image).content_hash
    assert preparer.known_hash(image) == found
    assert preparer.known_hash(picture()) is None
    preparer.ahead([image])
    assert preparer._jobs == {}


def test_what_needs_no_preparing_is_passed_over(make):
    preparer = make()
    preparer.ahead([Failure("bad_image", "It was cut.", None)])
    assert preparer._jobs == {}


def test_an_image_that_cannot_be_opened_is_a_value(make):
    for way in (take, take_ahead, take_also):
        error = way(make(), b"no image")
        assert isinstance(error, ImageError)
        assert error.__traceback__ is None
    assert isinstance(make().take(7), ImageError)


class FaultyProcessor(ImageProcessor):
    def resize(self, image, helpers=None):
        raise MemoryError("no room")


def test_a_fault_is_raised_where_the_image_is_taken():
    preparer = Preparer(FaultyProcessor())
    image = picture()
    for way in (take, take_ahead, take_also):
        with pytest.raises(MemoryError, match="no room"):
            way(preparer, image)
    assert preparer._jobs == {}
    preparer.close()


def test_after_closing_images_are_prepared_by_their_takers(make, processor):
    preparer, image = make(), picture(30)
    preparer.ahead([image])
    preparer.close()
    preparer.close()
    assert preparer.take(image).size_wh == (30, 14)
    preparer.ahead([image])
    assert preparer.take(picture(31)).size_wh == (31, 14)
    assert ((31, 14), threading.current_thread().name) in processor.seen
    assert preparer._jobs == {}


def test_lists_of_several_owners_stand_side_by_side(busy):
    bulk, click = object(), object()
    first, second, third, coming = (picture(width) for width in (30, 31, 32, 33))
    busy.ahead([first, second], bulk)
    busy.ahead([coming])
    busy.ahead([third], click)
    busy.ahead([], click)
    assert set(busy._listed) == {identity(image) for image in (first, second, coming)}
    busy.ahead([second], bulk)
    busy.ahead([])
    assert set(busy._listed) == {identity(second)}
    busy.ahead([], bulk)
    assert (busy._listed, busy._wanted) == ({}, {})


def test_an_image_on_two_lists_stays_until_both_let_go_of_it(busy):
    image, one, other = picture(30), object(), object()
    busy.ahead([image], one)
    busy.ahead([image], other)
    assert busy._jobs[identity(image)].num_takers == 1
    busy.ahead([], one)
    assert identity(image) in busy._listed
    busy.ahead([], other)
    assert identity(image) not in busy._listed


SAME_FILES = {
    "two paths": (Path("a/b.png"), Path("a/b.png")),
    "a path and its text": (Path("a/b.png"), "a/b.png"),
    "two ways of writing one": (Path("a/./b.png"), Path("a//b.png")),
    "a pure path": (PurePosixPath("a/b.png"), Path("a/b.png")),
    "the same bytes": (b"content", bytes(bytearray(b"content"))),
}


@pytest.mark.parametrize(("one", "other"), SAME_FILES.values(), ids=SAME_FILES)
def test_what_is_certainly_one_image_has_one_identity(one, other):
    assert identity(one) == identity(other)


def test_what_could_be_another_image_has_another_identity(tmp_path):
    class BytesPath(os.PathLike):
        def __fspath__(self):
            return b"a.png"

    sources = [Path("a.png"), Path("b.png"), b"a.png", BytesPath(), bytearray(b"a.png")]
    assert len({identity(source) for source in sources}) == len(sources)


def test_a_file_named_twice_is_opened_once(make, processor, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(file_of(picture(30)))
    preparer = make()
    preparer.ahead([Path(str(path)), Path(str(path)), str(path)])
    assert len(preparer._jobs) == 1
    preparer.take(Path(str(path)))
    assert processor.widths == [30]
