"""What the model's thread does next: actions, then asks by priority, request and image."""

from __future__ import annotations

import pytest

from florence2 import Ask
from florence2.engine.work_queue import Action, Priority, Request, WorkQueue
from florence2.errors import StoppedError

CLICK, BULK = Priority


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
