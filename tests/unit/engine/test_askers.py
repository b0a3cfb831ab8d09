"""What an asker gives up is left out, and what its code raises is its own."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from engine_tools import (
    TORCH_ONLY,
    Busy,
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

from florence2 import Ask, Failure, Result
from florence2.engine.answering import answer, answer_all
from florence2.engine.ask import Prompt
from florence2.errors import GenerationCancelledError, RequestError
from florence2.generation.decode import DecodeLoop

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


ERRORS = {
    "no memory in Python": MemoryError("the asker's"),
    "no memory of the asker's own GPU work": torch.OutOfMemoryError("the asker's"),
    "as a driver says it": RuntimeError("CUDA error: out of memory, the asker's"),
    "anything else": KeyError("the asker's"),
}


@pytest.fixture(params=ERRORS.values(), ids=ERRORS)
def error(request):
    return request.param


class Faulty(Busy):
    """An asker that brings asks a few at a time, and fails in one of its methods at one call."""

    def __init__(self, where, at_call, error, asks=()):
        super().__init__(asks=asks)
        self.calls = []
        faulty = getattr(self, where)

        def call(*arguments):
            self.calls.append(where)
            if len(self.calls) == at_call:
                raise error
            return faulty(*arguments)

        setattr(self, where, call)

    def next_asks(self, room):
        taken, self._asks = self._asks[:room], self._asks[room:]
        return [(object(), ask) for ask in taken]


FAULTS = {
    # name: (method, at which call; 2 of 3 asks are in hand at first)
    "the first asks": ("next_asks", 1),
    "asks beside prompts in hand": ("next_asks", 2),
    "the first outcome": ("settle", 1),
    "an outcome beside prompts in hand": ("settle", 2),
    "before a pass with nothing in hand": ("before_pass", 1),
    "before a pass with prompts in hand": ("before_pass", 5),
    "the images that come next": ("coming_images", 1),
}


def assert_comes_through(engine, error, work):
    """The error itself is raised, no limit is lowered for it, and nobody holds the engine."""
    with pytest.raises(type(error)) as caught:
        work()
    assert caught.value is error
    assert (engine.image_limit.now, engine.prompt_limit.now) == BATCHES
    outcomes: list[object] = []
    asks = captions(1, max_new_tokens=3)
    thread = threading.Thread(target=lambda: outcomes.extend(answer_all(engine, asks)))
    thread.start()
    thread.join(30)
    assert isinstance(outcomes[0], Result)


# The words of these errors are torch's.
@TORCH_ONLY
@pytest.mark.parametrize(("where", "at_call"), FAULTS.values(), ids=FAULTS)
def test_what_a_caller_raises_comes_through(engine, error, where, at_call):
    asker = Faulty(where, at_call, error, captions(1, 1, 1))
    assert_comes_through(engine, error, lambda: answer(engine, asker))
    assert len(asker.calls) == at_call


@pytest.mark.parametrize("at_call", range(1, 5))
def test_what_is_raised_between_passes_of_images_comes_through(engine, error, at_call):
    asker = Faulty("before_pass", at_call, error)
    images = [picture(1), picture(2)]
    assert_comes_through(engine, error, lambda: engine.encode(images, asker=asker))
    assert len(asker.calls) == at_call


@pytest.mark.parametrize("at_call", [1, 2, 4], ids=["image", "prompt", "with prompts in hand"])
def test_what_a_stop_raises_comes_through(engine, error, at_call):
    calls: list[None] = []

    def stop():
        calls.append(None)
        if len(calls) == at_call:
            raise error

    asks = captions(1, max_new_tokens=6, stop=stop)
    assert_comes_through(engine, error, lambda: answer_all(engine, asks))


NOT_THE_BATCHES = {
    # Nobody is there whose batch could be made smaller.
    "a loop with nothing in hand": (DecodeLoop, "run"),
    "an answer that is made a result of": (Prompt, "result"),
}


# The words of these errors are torch's.
@TORCH_ONLY
@pytest.mark.parametrize(("owner", "method"), NOT_THE_BATCHES.values(), ids=NOT_THE_BATCHES)
def test_what_no_smaller_batch_would_help_comes_through(engine, error, monkeypatch, owner, method):
    def fails(*_):
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(owner, method, fails)
    assert_comes_through(engine, error, lambda: answer_all(engine, captions(1, 1, 1)))
