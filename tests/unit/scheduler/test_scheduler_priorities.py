"""A click is answered inside the bulk batch in hand, and neither kind starves the other."""

from __future__ import annotations

from itertools import groupby

from scheduler_tools import PATIENCE_S, assert_same, captions, held, wait_until

from florence2.engine.scheduler import Priority


def click_during(runtime, scheduler, send, at_pass: int):
    """Sends a click when the given pass is about to begin, and lets it join the queue."""
    clicks = []

    def before_pass():
        if len(runtime.passes) == at_pass and not clicks:
            clicks.append(None)
            clicks[0] = send(captions(9))
            wait_until(lambda: scheduler.queue_depth > 0)

    runtime.before_pass = before_pass
    return clicks


def test_a_click_is_answered_between_two_passes_of_a_bulk_batch(
    model, runtime, scheduler, send, reports
):
    bulk = [*captions(1, 2), *captions(3, num_beams=2)]
    clicks = click_during(runtime, scheduler, send, at_pass=5)
    answers = scheduler.run(bulk, priority=Priority.BULK)
    [answer] = clicks[0].result(PATIENCE_S)
    # The images of the bulk batch, four passes of its session, all of the click's, the rest.
    steps = [name for name in runtime.passes if name != "images"]
    assert steps[:5] == [1, 1, 1, 1, 2]
    after_click = len(steps) - steps[::-1].index(2)
    assert set(steps[4:after_click]) == {2}
    assert 1 in steps[after_click:]
    assert [priority for priority, _ in groupby(report.priority for report in reports)] == [
        Priority.INTERACTIVE,
        Priority.BULK,
    ]
    assert_same(answer, model.run_many(captions(9))[0])
    for mine, alone in zip(answers, model.run_many(bulk), strict=True):
        assert_same(mine, alone)


def test_a_click_does_not_wait_for_the_images_of_a_bulk_batch(runtime, scheduler, send):
    clicks = click_during(runtime, scheduler, send, at_pass=1)
    scheduler.run(captions(1, 2, 3, 4, 5, 6), priority=Priority.BULK)
    clicks[0].result(PATIENCE_S)
    # Two passes over two images each, then the click's image and steps, then the last two.
    assert runtime.passes[:4] == ["images", "images", "images", 1]
    assert runtime.passes[runtime.passes.index(2) - 1] == "images"


def test_a_click_joins_another_click(runtime, scheduler, send):
    clicks = click_during(runtime, scheduler, send, at_pass=4)
    scheduler.run(captions(1, 2))
    clicks[0].result(PATIENCE_S)
    steps = [name for name in runtime.passes if name != "images"]
    # Its first pass is its own; then both go on together.
    assert steps.count(2) == 1
    assert steps[-1] == 1


def test_a_click_without_room_beside_a_bulk_batch_is_answered_right_after_it(
    model, runtime, scheduler, send, reports
):
    runtime.has_room_for = 1
    clicks = click_during(runtime, scheduler, send, at_pass=5)
    bulk = captions(1, 2, 3, 4, 5, 6, 7, 8, 10, 11)
    answers = scheduler.run(bulk, priority=Priority.BULK)
    [answer] = clicks[0].result(PATIENCE_S)
    assert_same(answer, model.run_many(captions(9))[0])
    for mine, alone in zip(answers, model.run_many(bulk), strict=True):
        assert_same(mine, alone)
    answered = [
        (priority, sum(report.prompts for report in group))
        for priority, group in groupby(reports, lambda report: report.priority)
    ]
    assert answered == [(Priority.BULK, 8), (Priority.INTERACTIVE, 1), (Priority.BULK, 2)]


def test_clicks_that_wait_go_before_bulk(scheduler, send, reports):
    with held(scheduler):
        bulk = send(captions(1), priority=Priority.BULK)
        wait_until(lambda: scheduler.queue_depth == 1)
        click = send(captions(2))
        wait_until(lambda: scheduler.queue_depth == 2)
    bulk.result(PATIENCE_S), click.result(PATIENCE_S)
    assert [priority for priority, _ in groupby(report.priority for report in reports)] == [
        Priority.INTERACTIVE,
        Priority.BULK,
    ]


def test_bulk_gets_on_although_clicks_never_cease(send, scheduler, runtime, reports):
    clicks = []

    def another_click():
        if runtime.open_sessions == 0 or runtime.passes[-1] == "images":
            return
        clicks.append(send(captions(9, max_new_tokens=3)))
        wait_until(lambda: scheduler.queue_depth > 0)

    with held(scheduler):
        bulk = send(captions(1, max_new_tokens=6), priority=Priority.BULK)
        wait_until(lambda: scheduler.queue_depth == 1)
        clicks.append(send(captions(9, max_new_tokens=3)))
        wait_until(lambda: scheduler.queue_depth == 2)
        runtime.before_pass = another_click
    assert bulk.result(PATIENCE_S)[0].text is not None
    runtime.before_pass = lambda: None
    for click in clicks:
        click.result(PATIENCE_S)
    assert Priority.BULK in [report.priority for report in reports]
