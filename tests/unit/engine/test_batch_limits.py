"""What does not fit is not tried again and again, and what memory is free again is used again."""

from __future__ import annotations

import weakref

import pytest
from engine_tools import (
    TORCH_ONLY,
    Busy,
    answer_between,
    ask,
    assert_close,
    captions,
    codes,
    engine_on,
    picture,
)

from florence2 import Ask, Failure, Florence2
from florence2.engine.answering import answer_all
from florence2.engine.ask import prompt_sentence
from florence2.engine.encoding import EncodedImage
from florence2.engine.engine import MOST_PATIENCE, PATIENCE, BatchLimit
from florence2.engine.scheduler import Priority, Scheduler
from florence2.pixels import ImageProcessor
from florence2.records import Region
from florence2.tasks import find_task

BATCHES = 8, 8


def short(count):
    return captions(8, max_new_tokens=2) * count


def fit(limit, batches):
    """So many full batches that fit; what the limit is then."""
    for _ in range(batches):
        limit.fitted(limit.now)
    return limit.now


def lowered(most, now):
    limit = BatchLimit(most)
    limit.lower(now)
    return limit


def test_a_limit_is_the_configured_batch_until_memory_is_short():
    limit = BatchLimit(32)
    assert fit(limit, 3 * PATIENCE) == 32
    for expected in (16, 8, 4, 2, 1):
        limit.lower(limit.smaller(limit.now))
        assert limit.now == expected
    assert limit.smaller(1) == 1


def test_a_lowered_limit_is_raised_by_a_step_up_to_the_configured_batch():
    limit = lowered(32, 4)
    assert fit(limit, PATIENCE - 1) == 4
    steps = [fit(limit, 1), *(fit(limit, PATIENCE) for _ in range(8))]
    assert steps == [*range(8, 33, 4), 32, 32]


def test_a_batch_below_the_limit_says_nothing_about_it():
    limit = lowered(8, 4)
    for _ in range(3 * PATIENCE):
        limit.fitted(3)
    assert limit.now == 4


def test_a_step_that_is_too_large_is_taken_back_and_the_next_comes_later():
    limit = lowered(8, 4)
    waits: list[int] = []
    for _ in range(6):
        waits.append(0)
        while limit.now == 4:
            limit.fitted(4)
            waits[-1] += 1
        assert limit.smaller(limit.now) == 4
        limit.lower(4)
    assert waits == [min(PATIENCE * 2**number, MOST_PATIENCE) for number in range(6)]


def test_a_step_that_fits_makes_the_limit_patient_as_at_first():
    limit = lowered(8, 4)
    fit(limit, PATIENCE)
    limit.lower(4)
    assert fit(limit, 2 * PATIENCE) == 5
    assert fit(limit, PATIENCE) == 6


def test_prompts_that_did_not_fit_are_not_tried_in_that_number_again(engine, runtime):
    runtime.fail_above = 4
    for _ in range(2):
        assert not any(codes(answer_all(engine, short(16))))
    assert runtime.tried == [8] + [4] * 8


# Many passes, of which only the sizes are looked at.
@TORCH_ONLY
def test_when_memory_is_free_again_the_configured_batch_is_reached_again(engine, runtime):
    runtime.fail_above = 4
    answer_all(engine, short(8))
    runtime.fail_above = 8
    answer_all(engine, short(PATIENCE * (4 + 5 + 6 + 7 + 8)))
    assert runtime.tried[-1] == max(runtime.tried) == 8
    assert [size for size in range(4, 9) if size in runtime.tried[3:]] == [4, 5, 6, 7, 8]


def test_a_prompt_that_does_not_fit_alone_costs_the_others_nothing(engine, runtime):
    odd = ask(picture(8), "<REGION_TO_CATEGORY>")
    sentence = prompt_sentence(find_task(odd.task), None, Region(odd.region), picture(8).size)
    runtime.misfit = len(engine.checkpoint.vocabulary.encode_prompt(sentence))
    outcomes = answer_all(engine, [*short(3), odd, *short(12)])
    assert codes(outcomes) == [*[None] * 3, "out_of_memory", *[None] * 12]
    assert engine.prompt_limit.now == 8
    assert runtime.tried[0] == runtime.tried[-1] == 8


@pytest.mark.parametrize("most_beside", [4, 1])
def test_prompts_that_did_not_fit_beside_others_lower_the_limit(engine, runtime, most_beside):
    start = runtime.start
    sessions: list[object] = []

    def crowded(features, *arguments):
        sessions[:] = [one for one in sessions if one() is not None]
        if sessions and len(features) > most_beside:
            raise runtime.no_memory()
        session = start(features, *arguments)
        sessions.append(weakref.ref(session))
        return session

    runtime.start = crowded
    # The short ones end at once, so that others join beside the long one.
    limits = [24, *[2] * 7, *[3] * 8]
    asks = [Ask(picture(8), "<CAPTION>", max_new_tokens=limit) for limit in limits]
    assert not any(codes(answer_all(engine, asks)))
    assert engine.prompt_limit.now == 4


def test_clicks_that_did_not_fit_beside_a_batch_in_hand_lower_nothing(engine, runtime):
    clicked: list[object] = []

    def click():
        if not clicked and runtime.batches:
            clicked.append(None)
            runtime.fail_above = 2
            clicked[:] = answer_all(engine, short(5))
            runtime.fail_above = 8

    outcomes = answer_between(engine, short(8), click)
    assert codes([*outcomes, *clicked]) == [None] * 13
    assert runtime.tried == [8, 5, 2, 2, 1]
    assert engine.prompt_limit.now == 8


def test_a_batch_that_nothing_of_fits_fails_one_by_one(engine, runtime):
    runtime.fail_above = 0
    assert codes(answer_all(engine, short(4))) == ["out_of_memory"] * 4
    runtime.fail_above = 8
    assert codes(answer_all(engine, short(1))) == [None]


def test_images_that_did_not_fit_are_not_tried_in_that_number_again(engine, runtime):
    runtime.images_fail_above = 2
    for first in (0, 10):
        encoded = engine.encode([picture(first + seed) for seed in range(9)])
        assert all(isinstance(one, EncodedImage) for one in encoded)
    assert runtime.images_tried == [8, 4, 2, 2, 4, 2, 2, 1, 2, 2, 2, 2, 1]


def test_an_image_that_does_not_fit_alone_fails_alone(model, runtime):
    counted = Florence2(engine_on(model, runtime, 2, 2))
    runtime.images_fail_above = 0
    failures = counted.run_many([ask(picture(seed), "<CAPTION>") for seed in range(3)])
    assert codes(failures) == ["out_of_memory"] * 3
    assert isinstance(failures[0], Failure)
    runtime.images_fail_above = 2
    expected = model.run("<CAPTION>", picture(1), max_new_tokens=4)
    assert_close(counted.run("<CAPTION>", picture(1), max_new_tokens=4), expected)


def test_an_image_for_which_the_computer_has_no_memory_fails_alone(engine, monkeypatch):
    resize = ImageProcessor.resize

    def without_memory(self, image, helpers=None):
        if image.width == 33:
            raise MemoryError
        return resize(self, image, helpers)

    monkeypatch.setattr(ImageProcessor, "resize", without_memory)
    large = picture(1).resize((33, 40))
    outcomes = answer_all(engine, [*short(1), Ask(large, "<CAPTION>"), *short(1)])
    assert codes(outcomes) == [None, "out_of_memory", None]
    assert engine.image_limit.now == 8


PASSES = {
    # The first pass has nothing to go by; at load the self-test is it.
    "a slow device": (0.1, [8, 2, 2, 2, 2]),
    "one image is the least": (3.0, [8] + [1] * 8),
    "a fast device": (0.001, [8, 8]),
}


@pytest.mark.parametrize(("item_s", "passes"), PASSES.values(), ids=PASSES)
def test_a_pass_that_someone_may_wait_for_is_as_long_as_was_said(engine, runtime, item_s, passes):
    runtime.item_s = item_s
    engine.encode([picture(seed) for seed in range(16)], asker=Busy())
    assert runtime.image_batches == passes


def test_where_nobody_waits_only_memory_counts(engine, runtime):
    runtime.item_s = 3.0
    engine.encode([picture(seed) for seed in range(16)])
    answer_all(engine, short(16))
    assert runtime.image_batches == runtime.batches == [8, 8]


@pytest.mark.parametrize("has_clicks", [True, False])
def test_a_scheduler_without_clicks_leaves_its_batches_whole(engine, runtime, has_clicks):
    runtime.item_s = 3.0
    scheduler = Scheduler(engine, max_batch=16, has_clicks=has_clicks)
    asks = [Ask(picture(seed), "<CAPTION>", max_new_tokens=2) for seed in range(16)]
    try:
        assert not any(codes(scheduler.run(asks, priority=Priority.BULK)))
    finally:
        scheduler.close()
    assert (runtime.image_batches == [8, 8]) is not has_clicks


def test_prompts_are_encoded_in_passes_of_that_length_too_and_searched_together(engine, runtime):
    image = engine.encode([picture(8)])[0]
    asks = [Ask(image, "<CAPTION>", max_new_tokens=9)] * 8
    answer_between(engine, asks, lambda: None)
    runtime.batches.clear()
    runtime.item_s = 0.1
    counts: list[int] = []
    outcomes = answer_between(engine, asks * 2, lambda: counts.append(len(runtime.batches)))
    assert not any(codes(outcomes))
    assert runtime.batches[0] == 8
    assert set(runtime.batches[1:]) == {2}
    # Between any two of them whoever waits has a turn.
    assert set(range(1, len(runtime.batches))) <= set(counts)


def test_a_device_that_became_faster_gets_larger_passes_again(engine, runtime):
    runtime.item_s = 3.0
    engine.encode([picture(seed) for seed in range(9)], asker=Busy())
    runtime.item_s = 0.001
    engine.encode([picture(seed) for seed in range(9, 18)], asker=Busy())
    # What is made ready beside a pass is as much as was known before it.
    assert runtime.image_batches == [8, 1, 1, 1, 7]
