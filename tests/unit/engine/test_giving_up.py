"""What nobody waits for is left out before the next pass, and what comes between is answered."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_tools import (
    CountingRuntime,
    answer_between,
    ask,
    assert_all_close,
    assert_close,
    captions,
    codes,
    engine_on,
    picture,
)

from florence2 import Ask, Failure
from florence2.engine.answering import answer_all
from florence2.engine.ask import Prompt
from florence2.errors import GenerationCancelledError, RequestError

BATCHES = 1, 2


def gone():
    return GenerationCancelledError("Nobody waits.")


def too_late():
    return RequestError("Too late.")


BEFORE_THEIR_TURN = {
    # name: (each ask's image and why it is given up, the images that are encoded)
    "an image that nobody waits for": ([(2, gone), (1, None)], 1),
    "an image that another ask waits for": ([(1, gone), (1, None)], 1),
    "each ask about one image has its own reason": ([(1, gone), (1, too_late)], 0),
}


@pytest.mark.parametrize(("asked", "num_images"), BEFORE_THEIR_TURN.values(), ids=BEFORE_THEIR_TURN)
def test_what_is_given_up_before_its_turn(engine, runtime, asked, num_images):
    outcomes = answer_all(engine, [ask(picture(s), "<CAPTION>", stop=stop) for s, stop in asked])
    for outcome, (_, stop) in zip(outcomes, asked, strict=True):
        assert codes([outcome]) == [None if stop is None else stop().code]
        assert stop is None or str(outcome) == str(stop())
    assert runtime.num_images == num_images


def test_an_ask_given_up_fails_alone_in_a_list(model):
    asks = [ask(picture(1), "<OD>"), ask(picture(1), "<CAPTION>", stop=gone)]
    answer, failure = model.run_many(asks)
    assert_close(answer, model.run_many(asks[:1])[0])
    assert failure == Failure("cancelled", "Nobody waits.")


def test_images_not_begun_are_left_out_between_two_passes(engine, runtime):
    def stop():
        return gone() if runtime.num_images == 2 else None

    outcomes = answer_all(engine, captions(0, 1, 2, 3, stop=stop))
    assert [str(outcome) for outcome in outcomes] == ["Nobody waits."] * 4
    assert runtime.num_images == 2
    assert runtime.batches == []


def test_prompts_not_begun_are_left_out_between_two_batches(engine, runtime):
    def stop():
        return gone() if len(runtime.batches) == 2 else None

    outcomes = answer_all(engine, captions(*[1] * 5, max_new_tokens=16, stop=stop))
    assert codes(outcomes).count(None) == 2
    assert runtime.batches == [2, 2]


def test_a_cascade_is_given_up_between_its_steps(demo, monkeypatch):
    runtime = CountingRuntime(demo.engine.runtime)
    engine = engine_on(demo, runtime, 1, 8)
    whole = Ask(picture(14), "<OD>+<REGION_TO_DESCRIPTION>")
    [complete] = answer_all(engine, [whole])
    assert len(complete.steps) > 1
    runtime.batches.clear()
    finished: list[int] = []
    result = Prompt.result

    def answered(*arguments):
        finished.append(1)
        return result(*arguments)

    monkeypatch.setattr(Prompt, "result", answered)
    asked = replace(whole, stop=lambda: gone() if finished else None)
    assert codes(answer_all(engine, [asked])) == ["cancelled"]
    assert runtime.batches == [1]


def test_what_is_asked_between_two_passes_changes_nothing(model, engine):
    outer = [ask(picture(seed), "<OD>", num_beams=3) for seed in (1, 2)]
    inner = [ask(picture(seed), "<CAPTION>", num_beams=2) for seed in (2, 3)]
    found = []

    def before_pass():
        if len(found) < 6:
            found.append(None)
            found[-1] = answer_all(engine, inner)

    answers = answer_between(engine, outer, before_pass)
    expected = model.run_many([*outer, *inner])
    assert_all_close(answers, expected[:2])
    assert len(found) == 6
    for outcomes in found:
        assert_all_close(outcomes, expected[2:])
