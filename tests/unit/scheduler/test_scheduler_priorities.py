"""What comes next: actions, then clicks before bulk, and neither kind starves the other."""

from __future__ import annotations

from itertools import groupby

import pytest
from engine_tools import assert_all_close, captions
from scheduler_tools import at_pass, held

from florence2 import Ask
from florence2.engine.work_queue import Action, Priority, Request, WorkQueue
from florence2.errors import StoppedError

CLICK, BULK = Priority


def click_at(number, runtime, send):
    """A click that comes when the pass of this number is about to begin."""
    return at_pass(runtime, number, lambda: send.queued(captions(9)))


def steps_of(runtime):
    return [name for name in runtime.passes if name != "images"]


def test_a_click_is_answered_between_two_passes_of_a_bulk_batch(
    model, runtime, scheduler, send, reports
):
    bulk = [*captions(1, 2), *captions(3, num_beams=2)]
    clicks = click_at(5, runtime, send)
    answers = scheduler.run(bulk, priority=BULK) + clicks[0].get()
    # The images of the bulk batch, four passes of its session, all of the click's, the rest.
    steps = steps_of(runtime)
    assert steps[:5] == [1, 1, 1, 1, 2]
    after_click = len(steps) - steps[::-1].index(2)
    assert set(steps[4:after_click]) == {2}
    assert 1 in steps[after_click:]
    assert [priority for priority, _ in groupby(report.priority for report in reports)] == [
        CLICK,
        BULK,
    ]
    assert_all_close(answers, model.run_many([*bulk, *captions(9)]))


def test_a_click_does_not_wait_for_the_images_of_a_bulk_batch(runtime, scheduler, send):
    clicks = click_at(1, runtime, send)
    scheduler.run(captions(1, 2, 3, 4, 5, 6), priority=BULK)
    clicks[0].get()
    # Two passes over two images each, then the click's image and steps, then the last two.
    assert runtime.passes[:4] == ["images", "images", "images", 1]
    assert runtime.passes[runtime.passes.index(2) - 1] == "images"


def test_a_click_joins_another_click(runtime, scheduler, send):
    clicks = click_at(4, runtime, send)
    scheduler.run(captions(1, 2))
    clicks[0].get()
    # Its first pass is its own; then both go on together.
    assert steps_of(runtime).count(2) == 1
    assert steps_of(runtime)[-1] == 1


def test_a_click_without_room_beside_a_bulk_batch_is_answered_right_after_it(
    model, runtime, scheduler, send, reports
):
    runtime.has_room_for = 1
    clicks = click_at(5, runtime, send)
    bulk = captions(1, 2, 3, 4, 5, 6, 7, 8, 10, 11)
    answers = scheduler.run(bulk, priority=BULK) + clicks[0].get()
    assert_all_close(answers, model.run_many([*bulk, *captions(9)]))
    answered = [
        (priority, sum(report.prompts for report in group))
        for priority, group in groupby(reports, lambda report: report.priority)
    ]
    assert answered == [(BULK, 8), (CLICK, 1), (BULK, 2)]


def test_clicks_that_wait_go_before_bulk(scheduler, send, reports):
    with held(scheduler):
        sent = [send.queued(captions(1), priority=BULK), send.queued(captions(2))]
    sent[0].get(), sent[1].get()
    assert [report.priority for report in reports] == [CLICK, BULK]


def test_bulk_gets_on_although_clicks_never_cease(send, scheduler, runtime, reports):
    clicks = []

    def another_click():
        if runtime.open_sessions and runtime.passes[-1] != "images":
            clicks.append(send.queued(captions(9, max_new_tokens=3)))

    with held(scheduler):
        bulk = send.queued(captions(1, max_new_tokens=6), priority=BULK)
        clicks.append(send.queued(captions(9, max_new_tokens=3)))
        runtime.before_pass = another_click
    assert bulk.get()[0].text is not None
    runtime.before_pass = lambda: None
    for click in clicks:
        click.get()
    assert BULK in [report.priority for report in reports]


def of(names, priority=CLICK, max_batch=4):
    """A request with an ask for each name; the letter of a name is its image."""
    return Request([Ask(name[0], name) for name in names.split()], priority, max_batch)


ORDERS = {
    # name: (asks in a batch, each request's priority and asks, the batches)
    "an image's asks come together": (4, [(CLICK, "a1 b1 c1 a2 b2 c2")], ["a1 a2 b1 b2", "c1 c2"]),
    "requests take turns by image": (2, [(BULK, "a b c"), (BULK, "x y z")], ["a x", "b y", "c z"]),
    "the rest of an image comes next": (
        4,
        [(CLICK, "a1 a2 a3 b"), (CLICK, "x1 x2 x3 y")],
        ["a1 a2 a3 x1", "x2 x3 b y"],
    ),
    "more asks about an image than a batch has": (
        2,
        [(CLICK, "a1 a2 a3"), (CLICK, "x")],
        ["a1 a2", "x a3"],
    ),
    "clicks first, then bulk in turn": (2, [(BULK, "x"), (CLICK, "a b c")], ["a b", "x", "c"]),
}


@pytest.mark.parametrize(("max_batch", "requests", "batches"), ORDERS.values(), ids=ORDERS)
def test_the_order_in_which_asks_are_begun(max_batch, requests, batches):
    queue = WorkQueue(max_batch, max_queued=100)
    for priority, names in requests:
        queue.add(of(names, priority, max_batch))
    assert queue.num_waiting == len(" ".join(batches).split())
    begun = [" ".join(one.ask.task for one in queue.next_work()) for _ in batches]
    assert begun == batches
    assert queue.num_waiting == 0


def test_an_action_comes_before_everything_that_waits():
    queue = WorkQueue(4, max_queued=100)
    queue.add(of("a"))
    action = Action(lambda: queue.num_waiting)
    queue.add_action(action)
    assert queue.joining(CLICK, room=4, num_in_hand=0) == []
    assert queue.next_work() is action
    action.run()
    assert action.done.result() == 1
    assert [one.ask.task for one in queue.next_work()] == ["a"]


def test_closing_stops_actions_and_asks_that_wait():
    queue = WorkQueue(4, max_queued=100)
    request, action = of("a b"), Action(lambda: None)
    queue.add(request)
    queue.add_action(action)
    queue.close()
    assert queue.next_work() == []
    assert [failure.code for failure in request.results()] == ["not_deployed"] * 2
    with pytest.raises(StoppedError):
        action.done.result()
