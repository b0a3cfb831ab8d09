"""A device that fails for good, memory that is short, and a click beside bulk work."""

from __future__ import annotations

import threading

import pytest
from engine_tools import captions, codes, picture
from scheduler_tools import at_pass, held, wait_until

from florence2 import Ask
from florence2.engine.scheduler import Priority
from florence2.pixels import ImageProcessor

ASSERT = "CUDA error: device-side assert triggered"


@pytest.mark.parametrize("priority", Priority)
@pytest.mark.parametrize("number", [0, 1, 4], ids=["images", "first", "later"])
def test_requests_in_hand_and_those_that_wait_get_the_devices_error(
    start, send_to, runtime, priority, number
):
    told: list[str] = []
    scheduler = start(on_lost=lambda: told.append(threading.current_thread().name))
    send = send_to(scheduler)
    at_pass(runtime, number, lambda: setattr(runtime, "lost", ASSERT))
    with held(scheduler):
        one = send.queued(captions(1, 2), priority=priority)
        other = send.queued(captions(*range(3, 12)), priority=priority)
    outcomes = [*one.get(), *other.get()]
    assert codes(outcomes) == ["device_lost"] * 11
    assert ASSERT in outcomes[0].message
    assert codes(scheduler.run(captions(1))) == ["device_lost"]
    assert told == ["florence2-model"]


def test_a_click_that_meets_the_error_leaves_none_of_the_bulk_batch_unanswered(
    scheduler, runtime, send
):
    clicks = []

    def before_pass():
        if len(runtime.passes) == 5 and not clicks:
            clicks.append(send.queued(captions(9)))
        elif len(runtime.passes) == 6:
            runtime.lost = ASSERT

    runtime.before_pass = before_pass
    bulk = scheduler.run(captions(1, 2, 3), priority=Priority.BULK)
    assert codes(bulk + clicks[0].get()) == ["device_lost"] * 4


def test_a_device_that_works_is_not_reported(start):
    told: list[None] = []
    scheduler = start(on_lost=lambda: told.append(None))
    assert codes(scheduler.run(captions(1))) == [None]
    scheduler.call(lambda: None)
    assert told == []


def test_a_lack_of_memory_of_the_program_is_a_fault_and_not_a_loop(scheduler):
    def short():
        raise MemoryError("no room in the program")

    failures = scheduler.run(captions(1, 2, stop=short), priority=Priority.BULK)
    assert codes(failures) == ["internal_error"] * 2
    assert codes(scheduler.run(captions(1), priority=Priority.BULK)) == [None]


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
            clicks.append(send.queued(captions(9, max_new_tokens=3)))
        return prepared

    engine.preparer.take = taken
    answers = scheduler.run(bulk, priority=Priority.BULK)
    assert codes(answers + clicks[0].get()) == [None] * 9
    assert len(scaled) == len(set(scaled)) == 9


def test_a_click_waits_for_one_short_pass_on_a_slow_device(scheduler, runtime):
    """Two images took a second, so from then on one is run at a time."""
    runtime.item_s = 0.5
    scheduler.run(captions(1, 2, 3, 4, 5), priority=Priority.BULK)
    assert runtime.image_batches == [2, 1, 1, 1]
