"""What nobody waits for is left out before the next pass, and what comes between is answered."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_tools import CountingRuntime, answer_between, ask, assert_close, picture

from florence2 import Ask, Failure, Result
from florence2.engine.answering import answer_all
from florence2.engine.ask import Prompt
from florence2.engine.engine import Engine
from florence2.errors import FlorenceError, GenerationCancelledError, RequestError


def gone() -> FlorenceError:
    return GenerationCancelledError("Nobody waits.")


BATCHES = 1, 2


def test_an_ask_given_up_is_not_even_encoded(engine, runtime):
    good = Ask(picture(1), "<CAPTION>", max_new_tokens=4)
    given_up = Ask(picture(2), "<CAPTION>", max_new_tokens=4, stop=gone)
    error, answer = answer_all(engine, [given_up, good])
    assert isinstance(error, GenerationCancelledError)
    assert isinstance(answer, Result)
    assert runtime.num_images == 1


def test_an_ask_given_up_fails_alone_in_a_list(model):
    asks = [ask(picture(1), "<OD>"), ask(picture(1), "<CAPTION>", stop=gone)]
    answer, failure = model.run_many(asks)
    assert_close(answer, model.run_many(asks[:1])[0])
    assert failure == Failure("cancelled", "Nobody waits.")


def test_an_image_that_another_ask_waits_for_is_encoded(engine, runtime):
    given_up = ask(picture(1), "<OD>", stop=gone)
    error, answer = answer_all(engine, [given_up, ask(picture(1), "<CAPTION>")])
    assert isinstance(error, GenerationCancelledError)
    assert isinstance(answer, Result)


def test_each_ask_about_one_image_has_its_own_reason(engine, runtime):
    other = ask(picture(1), "<CAPTION>", stop=lambda: RequestError("Too late."))
    outcomes = answer_all(engine, [ask(picture(1), "<OD>", stop=gone), other])
    assert [str(outcome) for outcome in outcomes] == ["Nobody waits.", "Too late."]
    assert runtime.num_images == 0


def test_images_not_begun_are_left_out_between_two_chunks(engine, runtime):
    def stop():
        return gone() if runtime.num_images == 2 else None

    asks = [ask(picture(seed), "<CAPTION>", stop=stop) for seed in range(4)]
    outcomes = answer_all(engine, asks)
    assert [str(outcome) for outcome in outcomes] == ["Nobody waits."] * 4
    assert runtime.num_images == 2
    assert runtime.batches == []


def test_prompts_not_begun_are_left_out_between_two_chunks(engine, runtime):
    def stop():
        return gone() if len(runtime.batches) == 2 else None

    asks = [ask(picture(1), "<CAPTION>", stop=stop) for _ in range(5)]
    outcomes = answer_all(engine, asks)
    assert sum(isinstance(outcome, Result) for outcome in outcomes) == 2
    assert runtime.batches == [2, 2]


def test_a_cascade_is_given_up_between_its_steps(demo, monkeypatch):
    runtime = CountingRuntime(demo.engine.runtime)
    engine = Engine(
        demo.engine.checkpoint, runtime, image_batch=1, prompt_batch=8, cache_bytes=2**22
    )
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
    [error] = answer_all(engine, [asked])
    assert isinstance(error, GenerationCancelledError)
    assert runtime.batches == [1]


def test_what_is_asked_between_two_passes_changes_nothing(model, engine):
    outer = [ask(picture(seed), "<OD>", num_beams=3) for seed in (1, 2)]
    inner = [ask(picture(seed), "<CAPTION>", num_beams=2) for seed in (2, 3)]
    found = []

    def between_passes():
        if len(found) < 6:
            found.append(None)
            found[-1] = answer_all(engine, inner)

    answers = answer_between(engine, outer, between_passes)
    expected = model.run_many([*outer, *inner])
    for answer, alone in zip(answers, expected[:2], strict=True):
        assert_close(answer, alone)
    assert len(found) == 6
    for outcomes in found:
        for answer, alone in zip(outcomes, expected[2:], strict=True):
            assert_close(answer, alone)


def test_what_is_raised_between_two_passes_comes_through(engine):
    def between_passes():
        raise TimeoutError("too late")

    with pytest.raises(TimeoutError, match="too late"):
        answer_between(engine, [ask(picture(1), "<CAPTION>")], between_passes)
