"""What was asked is let go of with its answer, without waiting for the garbage collector."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
from engine_tools import captions, codes, engine_on, picture
from scheduler_tools import WatchedRuntime, at_pass, held, wait_until

from florence2 import Ask
from florence2.engine.scheduler import Priority, Scheduler
from florence2.errors import StoppedError
from florence2.images import open_image

BAD_ASKS = {
    "no such image": Ask("nowhere.jpg", "<CAPTION>"),
    "a damaged image": Ask(b"no image at all", "<CAPTION>"),
    "an unknown task": Ask(picture(2), "<NO_TASK>"),
    "no beams": Ask(picture(2), "<CAPTION>", num_beams=0),
    "a text too much": Ask(picture(2), "<CAPTION>", "a dog"),
    "no region": Ask(picture(2), "<REGION_TO_CATEGORY>", region=(1, 2, 3)),
}


@pytest.fixture(autouse=True)
def _no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("bad", BAD_ASKS.values(), ids=BAD_ASKS)
def test_a_bad_click_during_a_bulk_batch_keeps_no_session_alive(scheduler, runtime, send, bad):
    clicks = at_pass(runtime, 5, lambda: send.queued([bad]))
    scheduler.run(captions(1), priority=Priority.BULK)
    assert codes(clicks[0].get()) != [None]
    assert scheduler.call(lambda: runtime.open_sessions) == 0


@pytest.mark.parametrize("given_up", [False, True])
def test_the_images_of_a_request_go_with_it(scheduler, given_up):
    image = open_image(picture(1))
    gone = weakref.ref(image)
    asks = [Ask(image, "<CAPTION>"), Ask(image, "<NO_TASK>")]
    scheduler.run(asks, should_stop=lambda: given_up)
    del image, asks
    # One that was given up at once may be in a helper's hands still.
    wait_until(lambda: gone() is None)


def test_an_image_of_a_request_given_up_before_its_turn_is_let_go_of(scheduler, engine, send):
    is_cancelled = threading.Event()
    image = open_image(picture(1))
    gone = weakref.ref(image)
    with held(scheduler):
        cancelled = send([Ask(image, "<CAPTION>")], should_stop=is_cancelled.is_set)
        wait_until(lambda: engine.preparer.known_hash(gone()) is not None)
        is_cancelled.set()
        cancelled.get()
        del image
        wait_until(lambda: gone() is None)


def test_what_closing_stops_is_let_go_of_too(model):
    runtime = WatchedRuntime(model.engine.runtime)
    scheduler = Scheduler(engine_on(model, runtime))
    image = open_image(picture(1))
    gone = weakref.ref(image)
    at_pass(runtime, 4, scheduler.close)
    with pytest.raises(StoppedError, match="No checkpoint is deployed"):
        scheduler.run([Ask(image, "<CAPTION>")], priority=Priority.BULK)
    scheduler.close()
    del image
    assert gone() is None
    assert runtime.open_sessions == 0


def test_what_is_answered_is_let_go_of_while_the_batch_that_answered_it_goes_on(
    scheduler, runtime, send
):
    """A server with enough clients is one batch without end."""
    gone: list[weakref.ref[object]] = []
    requests, sent_at = [], []
    alive: list[list[bool]] = []

    def ask_again():
        passes = len(runtime.passes)
        if sent_at and passes - sent_at[-1] >= 6:
            # It took four tokens at most, so it is on its way to the caller.
            requests[-1].get()
        if len(requests) < 3 and (not requests or requests[-1].done()):
            image = open_image(picture(len(requests) + 1))
            gone.append(weakref.ref(image))
            requests.append(send.queued([Ask(image, "<CAPTION>", max_new_tokens=4)]))
            sent_at.append(passes)
        elif len(requests) == 3 and requests[-1].done():
            alive.append([one() is not None for one in gone])

    runtime.before_pass = ask_again
    # Long answers, so that there is always something in hand beside them.
    answers = scheduler.run([Ask(picture(9), "<DETAILED_CAPTION>")] * 3)
    assert not any(codes(answers))
    assert alive
    assert alive[-1] == [False] * 3
