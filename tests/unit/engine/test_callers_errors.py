"""What the code of a caller raises is the caller's, also where a device could have raised it."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_tools import CountingRuntime, picture

from florence2 import Ask, Result
from florence2.engine.answering import answer_all, encode_all
from florence2.engine.engine import Engine, PromptList
from florence2.tasks import find_task

ERRORS = {
    "no memory in Python": MemoryError("the caller's"),
    "no memory of the caller's own GPU work": torch.OutOfMemoryError("the caller's"),
    "as a driver says it": RuntimeError("CUDA error: out of memory, the caller's"),
    "anything else": KeyError("the caller's"),
}


@pytest.fixture
def runtime(model):
    return CountingRuntime(model.engine.runtime)


@pytest.fixture
def engine(model, runtime):
    return Engine(
        model.engine.checkpoint, runtime, image_batch=1, prompt_batch=2, cache_bytes=2**22
    )


@pytest.fixture(params=ERRORS.values(), ids=ERRORS)
def error(request):
    return request.param


class FaultyFeed(PromptList):
    """A feed that fails at one of its methods, at one of its calls."""

    def __init__(self, prompts, where: str, at_call: int, error: Exception):
        super().__init__(prompts)
        self.where, self.calls_left, self.error = where, at_call, error

    def _called(self, where):
        if where == self.where:
            self.calls_left -= 1
            if not self.calls_left:
                raise self.error

    def take(self, room, settings):
        self._called("take")
        return super().take(room, settings)

    def settle(self, prompt, outcome):
        self._called("settle")
        super().settle(prompt, outcome)


def prompts(engine, count):
    [image] = engine.encode([picture(1)])
    settings = engine.checkpoint.generation
    task = find_task("<CAPTION>")
    return [engine.prepare(task, image, None, None, settings) for _ in range(count)]


def assert_free(engine):
    """Another thread gets an answer: nobody holds the engine."""
    outcomes: list[object] = []
    asks = [Ask(picture(1), "<CAPTION>", max_new_tokens=3)]
    thread = threading.Thread(target=lambda: outcomes.extend(answer_all(engine, asks)))
    thread.start()
    thread.join(30)
    assert isinstance(outcomes[0], Result)


@pytest.mark.parametrize("where", ["take", "settle"])
@pytest.mark.parametrize("at_call", [1, 2], ids=["first", "with prompts in hand"])
def test_what_a_feed_raises_comes_through(engine, error, where, at_call):
    feed = FaultyFeed(prompts(engine, 3), where, at_call, error)
    with pytest.raises(type(error)) as caught:
        engine.answer_feed(feed)
    assert caught.value is error
    assert engine.prompt_limit.now == 2
    assert_free(engine)


@pytest.mark.parametrize("at_call", [1, 4], ids=["with nothing in hand", "with prompts in hand"])
def test_what_is_raised_between_passes_of_prompts_comes_through(engine, error, at_call):
    calls: list[None] = []

    def between_passes():
        calls.append(None)
        if len(calls) == at_call:
            raise error

    with pytest.raises(type(error)) as caught:
        engine.answer(prompts(engine, 3), between_passes)
    assert caught.value is error
    assert len(calls) == at_call
    assert_free(engine)


@pytest.mark.parametrize("at_call", range(1, 5))
def test_what_is_raised_between_passes_of_images_comes_through(engine, runtime, error, at_call):
    calls: list[None] = []

    def between_passes():
        calls.append(None)
        if len(calls) == at_call:
            raise error

    with pytest.raises(type(error)) as caught:
        encode_all(engine, [picture(1), picture(2)], between_passes=between_passes)
    assert caught.value is error
    assert len(calls) == at_call
    assert engine.image_limit.now == 1
    assert_free(engine)


def test_what_says_which_images_come_next_may_fail_too(engine, error):
    def coming():
        raise error

    with pytest.raises(type(error)) as caught:
        encode_all(engine, [picture(1)], coming=coming)
    assert caught.value is error
    assert_free(engine)


@pytest.mark.parametrize("at_call", [1, 2, 4], ids=["image", "prompt", "with prompts in hand"])
def test_what_a_stop_raises_comes_through(engine, error, at_call):
    calls: list[None] = []

    def stop():
        calls.append(None)
        if len(calls) == at_call:
            raise error

    asks = [Ask(picture(1), "<CAPTION>", max_new_tokens=6, stop=stop)]
    with pytest.raises(type(error)) as caught:
        answer_all(engine, asks)
    assert caught.value is error
    assert_free(engine)


def test_no_memory_of_the_device_with_nothing_in_hand_comes_through(engine, runtime, monkeypatch):
    """Nobody is there whose batch could be made smaller."""
    from florence2.generation.decode import DecodeLoop

    def short(loop):
        raise torch.OutOfMemoryError("no memory left")

    asked = prompts(engine, 1)
    with monkeypatch.context() as patched:
        patched.setattr(DecodeLoop, "run", short)
        with pytest.raises(torch.OutOfMemoryError):
            engine.answer(asked)
    assert_free(engine)
