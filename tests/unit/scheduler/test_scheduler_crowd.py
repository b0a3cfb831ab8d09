"""A crowd of callers who cancel, run out of time and are closed upon: each gets what is its own."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_tools import picture
from scheduler_tools import PATIENCE_S, wait_until

from florence2 import Ask, Result
from florence2.engine.scheduler import Priority
from florence2.errors import QueueFullError, StoppedError

NUM_CALLERS = 64
TASKS = ["<CAPTION>", "<OD>", "<OCR>", "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>", "<NO_TASK>"]
REFUSED = (QueueFullError, StoppedError)


class Caller:
    """One request of a kind drawn by its number, and a check of what came of it."""

    def __init__(self, number):
        draw = random.Random(number)
        self.asks = [
            Ask(
                draw.choice([picture(number % 4), picture(5), "nowhere.jpg"]),
                draw.choice(TASKS),
                num_beams=draw.choice([1, 2]),
                max_new_tokens=draw.choice([3, 8]),
            )
            for _ in range(draw.choice([0, 1, 1, 2, 6]))
        ]
        self.priority = draw.choice(list(Priority))
        self.deadline_s = draw.choice([None, None, 0.0, 0.3])
        self.looks_left = draw.choice([None, None, 0, 1, 3])

    def should_stop(self):
        self.looks_left -= 1
        return self.looks_left < 0

    def run(self, run):
        """What is wrong with the answers, if anything is."""
        is_patient = self.looks_left is None
        try:
            answers = run(
                self.asks,
                priority=self.priority,
                deadline_s=self.deadline_s,
                should_stop=None if is_patient else self.should_stop,
            )
        except REFUSED:
            return None
        if len(answers) != len(self.asks):
            return f"{len(answers)} answers to {len(self.asks)} asks"
        allowed = {
            "bad_image": lambda ask: ask.image == "nowhere.jpg",
            "bad_request": lambda ask: ask.task == "<NO_TASK>",
            "deadline": lambda ask: self.deadline_s is not None,
            "cancelled": lambda ask: not is_patient,
        }
        for ask, answer in zip(self.asks, answers, strict=True):
            if isinstance(answer, Result):
                if answer.task != ask.task:
                    return f"{ask.task} was answered with {answer.task}"
            elif not allowed.get(answer.code, lambda ask: False)(ask):
                return f"{ask} failed with {answer}"
        return None


@pytest.mark.parametrize("is_closed_upon", [False, True])
@pytest.mark.parametrize("sessions_with_room", [1, 100])
def test_everyone_in_a_crowd_gets_the_own_answers_or_the_right_error(
    start, runtime, is_closed_upon, sessions_with_room
):
    threads_before = set(threading.enumerate())
    runtime.has_room_for = sessions_with_room
    scheduler = start(max_batch=4, max_queued=60)
    with ThreadPoolExecutor(NUM_CALLERS) as threads:
        crowd = [
            threads.submit(Caller(number).run, scheduler.run) for number in range(2 * NUM_CALLERS)
        ]
        if is_closed_upon:
            wait_until(lambda: len(runtime.passes) > 10)
            scheduler.close()
        wrong = [one.result(PATIENCE_S) for one in crowd]
    assert [one for one in wrong if one is not None] == []
    assert scheduler.queue_depth == 0
    scheduler.close()
    left = set(threading.enumerate()) - threads_before
    # The engine's helpers that open images stay as long as the engine does.
    assert [thread for thread in left if not thread.name.startswith("florence2-images")] == []
    assert runtime.open_sessions == 0
