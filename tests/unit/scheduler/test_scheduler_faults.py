"""A device that fails for good, memory that is short, and a click beside bulk work."""

from __future__ import annotations

import threading
import weakref

import pytest
from scheduler_tools import PATIENCE_S, captions, held, picture, wait_until

from florence2 import Ask, Failure, Result
from florence2.engine.scheduler import Priority
from florence2.images import open_image
from florence2.pixels import ImageProcessor

ASSERT = "CUDA error: device-side assert triggered"


@pytest.mark.parametrize("priority", Priority)
@pytest.mark.parametrize("at_pass", [0, 1, 4], ids=["images", "first", "later"])
def test_requests_in_hand_and_those_that_wait_get_the_devices_error(
    start, send_to, runtime, priority, at_pass
):
    told: list[str] = []
    scheduler = start(on_lost=lambda: told.append(threading.current_thread().name))

    def before_pass():
        if len(runtime.passes) == at_pass:
            runtime.lost = ASSERT

    runtime.before_pass = before_pass
    with held(scheduler):
        one = send_to(scheduler, captions(1, 2), priority=priority)
        wait_until(lambda: scheduler.queue_depth == 2)
        other = send_to(scheduler, captions(*range(3, 12)), priority=priority)
        wait_until(lambda: scheduler.queue_depth == 11)
    outcomes = [*one.result(PATIENCE_S), *other.result(PATIENCE_S)]
    assert [outcome.code for outcome in outcomes] == ["device_lost"] * 11
    assert ASSERT in outcomes[0].message
    [later] = scheduler.run(captions(1))
    assert later.code == "device_lost"
    assert told == ["florence2-model"]


def test_a_click_that_meets_the_error_leaves_none_of_the_bulk_batch_unanswered(
    scheduler, runtime, send
):
    clicks = []

    def before_pass():
        if len(runtime.passes) == 5 and not clicks:
            clicks.append(None)
            clicks[0] = send(captions(9))
            wait_until(lambda: scheduler.queue_depth > 0)
        elif len(runtime.passes) == 6:
            runtime.lost = ASSERT

    runtime.before_pass = before_pass
    bulk = scheduler.run(captions(1, 2, 3), priority=Priority.BULK)
    assert [outcome.code for outcome in bulk] == ["device_lost"] * 3
    assert clicks[0].result(PATIENCE_S)[0].code == "device_lost"


def test_a_device_that_works_is_not_reported(start, engine):
    told: list[None] = []
    scheduler = start(on_lost=lambda: told.append(None))
    assert isinstance(scheduler.run(captions(1))[0], Result)
    scheduler.call(lambda: None)
    assert told == []


def test_a_lack_of_memory_of_the_program_is_a_fault_and_not_a_loop(scheduler, runtime):
    def short():
        raise MemoryError("no room in the program")

    failures = scheduler.run(captions(1, 2, stop=short), priority=Priority.BULK)
    assert [failure.code for failure in failures] == ["internal_error"] * 2
    assert isinstance(scheduler.run(captions(1), priority=Priority.BULK)[0], Result)


@pytest.mark.parametrize("at_look_up", [0, 3], ids=["first batch", "later"])
def test_a_click_drops_nothing_that_was_prepared_for_bulk(
    scheduler, engine, send, monkeypatch, at_look_up
):
    """Every image is scaled once, and the bulk's next ones are there when their turn comes."""
    scaled: list[tuple[int, int]] = []
    resize = ImageProcessor.resize

    def noted(self, image, helpers=None):
        scaled.append(image.size)
        return resize(self, image, helpers)

    monkeypatch.setattr(ImageProcessor, "resize", noted)
    bulk = [
        Ask(picture(seed).resize((90 + seed, 80)), "<CAPTION>", max_new_tokens=3)
        for seed in range(8)
    ]
    clicks = []
    take = engine.preparer.take

    def taken(image):
        prepared = take(image)
        if image.size[0] == 90 + at_look_up:
            # All that follow are ready; the click is answered before the next one is taken.
            wait_until(lambda: len(scaled) == 8)
            clicks.append(send(captions(9, max_new_tokens=3)))
            wait_until(lambda: scheduler.queue_depth > 0)
        return prepared

    engine.preparer.take = taken
    answers = scheduler.run(bulk, priority=Priority.BULK)
    assert isinstance(clicks[0].result(PATIENCE_S)[0], Result)
    assert not [answer for answer in answers if isinstance(answer, Failure)]
    assert len(scaled) == 9
    assert len(set(scaled)) == 9


def test_a_click_waits_for_one_short_pass_on_a_slow_device(scheduler, runtime, send):
    """Two images took a second, so from then on one is run at a time."""
    runtime.pass_s = 1.0
    sizes: list[int] = []
    encode = runtime.encode_bytes

    def noted(images, table):
        sizes.append(len(images))
        return encode(images, table)

    runtime.encode_bytes = noted
    scheduler.run(captions(1, 2, 3, 4, 5), priority=Priority.BULK)
    assert sizes == [2, 1, 1, 1]


def test_an_image_of_a_request_given_up_before_its_turn_is_let_go_of(scheduler, engine, send):
    is_cancelled = threading.Event()
    image = open_image(picture(1))
    gone = weakref.ref(image)
    with held(scheduler):
        cancelled = send([Ask(image, "<CAPTION>")], should_stop=is_cancelled.is_set)
        wait_until(lambda: engine.preparer.known_hash(gone()) is not None)
        is_cancelled.set()
        cancelled.result(PATIENCE_S)
        del image
        wait_until(lambda: gone() is None)
