"""Images are prepared once, ahead of the model or by whoever takes them, and then forgotten."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from image_tools import PATIENCE_S, SIZE_WH, encoded, noise

from florence2.engine import encoding
from florence2.engine.encoding import PreparedImage, Preparer
from florence2.errors import ImageError
from florence2.images import LoadedImage, identity, open_image
from florence2.pixels import ImageProcessor
from florence2.records import Failure


def picture(width=20, height=14):
    return open_image(noise(width, height))


def pictures(*widths):
    return [picture(width) for width in widths]


def file_of(image):
    return encoded(image.image)


def take(preparer, image):
    return preparer.take(image)


def take_ahead(preparer, image):
    preparer.ahead([image])
    return preparer.take(image)


def take_also(preparer, image):
    preparer.also_ahead([image])
    return preparer.take(image)


def take_twice(preparer, image):
    take_ahead(preparer, image)
    return preparer.take(image)


def forget(preparer, image):
    preparer.ahead([image])
    preparer.ahead([])


def close(preparer, image):
    preparer.ahead([image])
    preparer.close()


TAKING = [take, take_ahead, take_also]


class Held:
    """Says which of some images are still held by anybody else."""

    def __init__(self, *widths):
        self.images = pictures(*widths)
        self.references = [weakref.ref(image) for image in self.images]

    def widths(self):
        self.images.clear()
        return [image.size_wh[0] for ref in self.references if (image := ref()) is not None]


@pytest.fixture
def busy(make, processor):
    """A preparer whose one helper is busy with another image until the gate opens."""
    gate = processor.hold_up(99)
    preparer = make(threads=1, max_ahead=4)
    preparer.ahead([picture(99)], "the busy helper")
    assert gate.begun.wait(PATIENCE_S)
    return preparer


@pytest.mark.parametrize("way", TAKING)
def test_a_prepared_image_is_the_processors(make, way):
    image = picture()
    prepared = way(make(), image)
    assert prepared.size_wh == (20, 14)
    assert np.array_equal(prepared.scaled, ImageProcessor(size_wh=SIZE_WH).resize(image.image))


def test_every_source_of_one_picture_has_one_hash_and_other_pictures_others(make, tmp_path):
    image, preparer = picture(), make()
    path = tmp_path / "a.png"
    path.write_bytes(file_of(image))
    sources = [image, image.image, np.asarray(image.image), file_of(image), path, str(path)]
    assert len({preparer.take(source).content_hash for source in sources}) == 1
    grey = [np.full((height, width, 3), 90, np.uint8) for width, height in ((5, 7), (7, 5))]
    others = [*grey, np.full((5, 7, 3), 91, np.uint8)]
    assert len({preparer.take(source).content_hash for source in others}) == 3


def is_waiting(thread):
    """Whether a thread has come as far as waiting for another one."""
    frame = sys._current_frames().get(thread.ident)
    return frame is not None and frame.f_code is threading.Condition.wait.__code__


@pytest.mark.parametrize("is_file", [False, True])
def test_an_image_is_prepared_once_for_all_who_wait_for_it(make, processor, is_file):
    gate, results = processor.hold_up(30), []
    preparer, image = make(), picture(30)
    one, same = (image, image) if not is_file else (file_of(image), bytes(file_of(image)))
    preparer.ahead([one])
    assert gate.begun.wait(PATIENCE_S)
    takers = [
        threading.Thread(target=lambda source=source: results.append(preparer.take(source)))
        for source in (one, same)
    ]
    for taker in takers:
        taker.start()
    while not all(map(is_waiting, takers)):
        time.sleep(0.001)
    gate.opened.set()
    for taker in takers:
        taker.join(PATIENCE_S)
    assert results[0] is results[1]
    assert processor.widths == [30]


def test_what_is_ahead_is_prepared_by_helpers_and_taken_from_there(make, processor):
    gate, preparer, images = processor.hold_up(30), make(), pictures(30, 31)
    preparer.ahead(images)
    assert gate.begun.wait(PATIENCE_S)
    threading.Timer(0.05, gate.opened.set).start()
    assert [preparer.take(image).size_wh[0] for image in images] == [30, 31]
    assert sorted(processor.widths) == [30, 31]
    assert processor.seen[0][1].startswith("florence2-images")


def test_nobody_waits_behind_other_images(busy, processor):
    assert take_also(busy, picture(30)).size_wh == (30, 14)
    assert processor.seen[-1] == ((30, 14), threading.current_thread().name)


def test_no_more_than_allowed_is_prepared_ahead(make):
    preparer, held = make(max_ahead=2), Held(30, 31, 32, 33)
    first, _, third, last = images = list(held.images)
    preparer.ahead(images)
    assert preparer.take(last).size_wh == (33, 14)
    assert preparer.take(first).size_wh == (30, 14)
    preparer.also_ahead([third])
    del images, first, third, last, _
    assert held.widths() == [31, 32]


def test_what_comes_besides_replaces_nothing(busy):
    held = Held(30, 31)
    for image in held.images:
        busy.also_ahead([image])
    del image
    assert held.widths() == [30, 31]


def test_what_comes_next_replaces_what_was_to_come(busy, processor):
    held = Held(30, 31, 32)
    busy.ahead(held.images)
    busy.ahead(held.images[2:])
    assert held.widths() == [32]
    busy.ahead([])
    assert held.widths() == []
    processor.gates[99].opened.set()
    busy.close()
    assert processor.widths == [99]


def test_lists_of_several_owners_stand_side_by_side(busy):
    held = Held(30, 31, 32, 33)
    first, second, third, coming = held.images
    busy.ahead([first, second], "bulk")
    busy.ahead([coming])
    busy.ahead([third], "click")
    busy.ahead([], "click")
    del first, third, coming
    assert held.widths() == [30, 31, 33]
    busy.ahead([second], "bulk")
    busy.ahead([])
    del second
    assert held.widths() == [31]
    busy.ahead([], "bulk")
    assert held.widths() == []


def test_an_image_on_two_lists_stays_until_both_let_go_of_it(busy):
    held = Held(30)
    busy.ahead(held.images, "one")
    busy.ahead(held.images, "other")
    busy.ahead([], "one")
    assert held.widths() == [30]
    busy.ahead([], "other")
    assert held.widths() == []


def test_what_was_prepared_before_is_known_and_not_ahead(make, processor):
    preparer, image = make(), picture()
    assert preparer.known_hash(image) is None
    found = preparer.take(image).content_hash
    assert (preparer.known_hash(image), preparer.known_hash(picture())) == (found, None)
    preparer.ahead([image, Failure("bad_image", "It was cut.", None)])
    preparer.close()
    assert processor.widths == [20]


@pytest.mark.parametrize("way", TAKING)
@pytest.mark.parametrize("source", [b"no image", 7], ids=["bytes", "a number"])
def test_an_image_that_cannot_be_opened_is_a_value(make, way, source):
    error = way(make(), source)
    assert isinstance(error, ImageError)
    assert error.__traceback__ is None


class FaultyProcessor(ImageProcessor):
    def resize(self, image, helpers=None):
        raise MemoryError("no room")


def test_a_fault_is_raised_where_the_image_is_taken():
    preparer, held = Preparer(FaultyProcessor()), Held(30, 31, 32)
    for way, image in zip(TAKING, held.images, strict=True):
        with pytest.raises(MemoryError, match="no room"):
            way(preparer, image)
    del image
    preparer.close()
    assert held.widths() == []


def test_after_closing_images_are_prepared_by_their_takers(make, processor):
    preparer, held = make(), Held(30)
    preparer.ahead(held.images)
    preparer.close()
    preparer.close()
    assert preparer.take(held.images[0]).size_wh == (30, 14)
    preparer.ahead(held.images)
    assert preparer.take(picture(31)).size_wh == (31, 14)
    assert ((31, 14), threading.current_thread().name) in processor.seen
    assert held.widths() == []


def test_an_image_of_the_engines_own_holds_pixels_only_while_it_is_scaled(
    make, monkeypatch, budget
):
    monkeypatch.setattr(encoding, "open_pixels", lambda: budget)
    file = file_of(picture())
    for source in (file, file[:-30], np.zeros((1, 9_000, 3), np.uint8)):
        make().take(source)
        assert budget.held == 0


def test_a_prepared_image_is_taken_as_it_is_and_not_by_another_checkpoint(make):
    preparer, (width, height) = make(), SIZE_WH
    prepared = preparer.prepare(picture())
    preparer.ahead([prepared])
    assert preparer.take(prepared) is prepared
    other = PreparedImage((40, 30), "0" * 32, np.zeros((height + 1, width, 3), np.uint8))
    assert "prepare it again" in str(preparer.take(other))


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


def test_what_could_be_another_image_has_another_identity():
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
    preparer.take(Path(str(path)))
    preparer.close()
    assert processor.widths == [30]


@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("way", [*TAKING, take_twice, forget, close])
def test_nothing_is_held_afterwards(way, state, make, processor, request):
    preparer = request.getfixturevalue("busy") if state == "busy" else make()
    if state == "busy" and way is close:
        processor.gates[99].opened.set()
    image = picture()
    held = [weakref.ref(image), weakref.ref(image.image)]
    prepared = way(preparer, image)
    if prepared is not None:
        held.append(weakref.ref(prepared.scaled))
    del image, prepared
    if state == "idle":
        # A helper that had begun what is forgotten lets go of it when it is done.
        preparer.close()
    gc.disable()
    try:
        assert [reference() for reference in held] == [None] * len(held)
    finally:
        gc.enable()


def test_many_threads_each_get_their_own_image(make):
    preparer, held = make(threads=3, max_ahead=5), Held(*range(20, 32))
    images = list(held.images)
    expected = [ImageProcessor(size_wh=SIZE_WH).resize(image.image) for image in images]

    def ask(seed):
        dice = random.Random(seed)
        for _ in range(60):
            number = dice.randrange(len(images))
            image = LoadedImage(images[number].image) if dice.random() < 0.3 else images[number]
            prepared = dice.choice([*TAKING, take_twice, forget])(preparer, image)
            assert prepared is None or isinstance(prepared, PreparedImage)
            assert prepared is None or np.array_equal(prepared.scaled, expected[number])

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(ask, seed) for seed in range(8)]:
            done.result(PATIENCE_S)
    preparer.ahead([])
    preparer.close()
    images.clear()
    assert held.widths() == []
