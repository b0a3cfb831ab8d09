"""What the code of an asker raises is the asker's, also where a device could have raised it."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_tools import Busy, captions, picture

from florence2 import Result
from florence2.engine.answering import answer, answer_all
from florence2.engine.ask import Prompt
from florence2.generation.decode import DecodeLoop

ERRORS = {
    "no memory in Python": MemoryError("the asker's"),
    "no memory of the asker's own GPU work": torch.OutOfMemoryError("the asker's"),
    "as a driver says it": RuntimeError("CUDA error: out of memory, the asker's"),
    "anything else": KeyError("the asker's"),
}


BATCHES = 1, 2


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


@pytest.mark.parametrize(("owner", "method"), NOT_THE_BATCHES.values(), ids=NOT_THE_BATCHES)
def test_what_no_smaller_batch_would_help_comes_through(engine, error, monkeypatch, owner, method):
    def fails(*_):
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(owner, method, fails)
    assert_comes_through(engine, error, lambda: answer_all(engine, captions(1, 1, 1)))
