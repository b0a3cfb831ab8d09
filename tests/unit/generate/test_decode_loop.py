"""Items that join a running batch are answered as if they were alone, whatever row they get."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch
from tiny_reference import (
    SEEDS,
    Expected,
    Prompts,
    differences,
    expected_answers,
    naive_session,
    network_session,
    random_prompts,
    tiny_model,
)

import florence2.generation.decode
from florence2.errors import FlorenceError
from florence2.generation.decode import DecodeLoop, OpenFlags, PlainSpace, Started
from florence2.records import Answer, GenerationSettings

MODES = [(1, True), (3, True), (3, False), (4, "never")]
COUNT = 30
LIMITS = [1, 2, 3, 5, 9, 16, 24]


class Drip:
    """A source whose items come a few at a time; each session holds what came together."""

    def __init__(self, make, model, prompts: Prompts, beams: int, limits: list[int], seed: int):
        self.make, self.model, self.prompts = make, model, prompts
        self.beams, self.limits = beams, limits
        self.random = random.Random(seed)
        self.left = list(range(len(limits)))
        self.answers: dict[int, Answer | FlorenceError] = {}
        self.rooms: list[tuple[int, int]] = []
        self.reasons: dict[int, FlorenceError] = {}

    def given_up(self) -> Mapping[int, FlorenceError]:
        return {item: why for item, why in self.reasons.items() if item not in self.answers}

    def start(self, room: int) -> Started[int] | None:
        waits = len(self.answers) + len(self.left) < len(self.limits)
        if not self.left or (waits and self.random.random() < 0.4):
            return None
        count = min(self.random.randint(1, room), len(self.left))
        items, self.left = self.left[:count], self.left[count:]
        self.rooms.append((room, count))
        limits = [self.limits[item] for item in items]
        session = self.make(self.model, self.prompts.pick(items), self.beams, limits)
        waited_for = [None if item in self.answers else item for item in items]
        return Started(waited_for, session, limits)

    def settle(self, item: int, answer: Answer | FlorenceError) -> None:
        assert item not in self.answers
        self.answers[item] = answer


def expected_by_limit(model, prompts: Prompts, settings, limits: list[int]) -> list[Expected]:
    tables = {limit: expected_answers(model, prompts, settings, limit) for limit in set(limits)}
    return [tables[limit][item] for item, limit in enumerate(limits)]


@pytest.mark.parametrize("ngram", [0, 3])
@pytest.mark.parametrize(("beams", "early_stopping"), MODES)
def test_whoever_joins_is_answered_as_the_reference_does(beams: int, early_stopping, ngram: int):
    settings = GenerationSettings(
        num_beams=beams, early_stopping=early_stopping, no_repeat_ngram_size=ngram
    )
    for seed in SEEDS:
        model, prompts = tiny_model(seed), random_prompts(seed, COUNT)
        limits = [LIMITS[item % len(LIMITS)] for item in range(COUNT)]
        expected = expected_by_limit(model, prompts, settings, limits)
        for make in (network_session, naive_session):
            source = Drip(make, model, prompts, beams, limits, seed)
            DecodeLoop(source, settings, PlainSpace(), max_rows=5).run()
            found = [source.answers[item] for item in range(COUNT)]
            assert differences(found, expected) == []
            assert any(room < 5 for room, _ in source.rooms)
            assert all(count <= room <= 5 for room, count in source.rooms)


def test_few_free_rows_wait_for_company():
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], COUNT)
    limits = [LIMITS[item % len(LIMITS)] for item in range(COUNT)]
    source = Drip(network_session, model, prompts, 3, limits, 1)
    DecodeLoop(source, GenerationSettings(), PlainSpace(), max_rows=8, least_room=4).run()
    assert len(source.answers) == COUNT
    assert all(room >= 4 for room, _ in source.rooms)
    assert (
        differences(
            [source.answers[item] for item in range(COUNT)],
            expected_by_limit(model, prompts, GenerationSettings(), limits),
        )
        == []
    )


def test_the_place_of_what_is_given_up_is_taken_by_another():
    model, prompts = tiny_model(SEEDS[1]), random_prompts(SEEDS[1], COUNT)
    source = Drip(network_session, model, prompts, 3, [16] * COUNT, 3)
    source.reasons = {item: FlorenceError(f"Nobody waits for {item}.") for item in (0, 7, 8, 21)}
    DecodeLoop(source, GenerationSettings(), PlainSpace(), max_rows=4).run()
    gone = [item for item in range(COUNT) if not isinstance(source.answers[item], Answer)]
    assert gone == [0, 7, 8, 21]
    expected = expected_by_limit(model, prompts, GenerationSettings(), [16] * COUNT)
    stay = [item for item in range(COUNT) if item not in gone]
    found = [source.answers[item] for item in stay]
    assert differences(found, [expected[item] for item in stay]) == []


def test_nan_stays_in_its_row_and_is_gone_with_it():
    model, prompts = tiny_model(SEEDS[2]), random_prompts(SEEDS[2], 6)

    def make(model, part: Prompts, beams: int, limits: list[int]):
        session = network_session(model, part, beams, limits)
        if not source.answers and len(source.left) == 5:
            for layer in session._layers:
                layer.cross_value = torch.full_like(layer.cross_value, float("nan"))
        return session

    source = Drip(make, model, prompts, 3, [6, 20, 9, 9, 9, 9], 0)
    source.random.randint = lambda low, high: 1
    DecodeLoop(source, GenerationSettings(), PlainSpace(), max_rows=2).run()
    expected = expected_by_limit(model, prompts, GenerationSettings(), [6, 20, 9, 9, 9, 9])
    assert not isinstance(source.answers[0], Answer)
    found = [source.answers[item] for item in range(1, 6)]
    assert differences(found, expected[1:]) == []


@pytest.mark.parametrize("lag", [1, 2])
def test_answers_that_arrive_late_are_handed_out_once(monkeypatch: pytest.MonkeyPatch, lag: int):
    original = OpenFlags
    monkeypatch.setattr(florence2.generation.decode, "OpenFlags", lambda **_: original(lag=lag))
    for seed in SEEDS:
        model, prompts = tiny_model(seed), random_prompts(seed, COUNT)
        limits = [LIMITS[item % len(LIMITS)] for item in range(COUNT)]
        source = Drip(network_session, model, prompts, 3, limits, seed)
        passes = iter(range(10**6))
        given_up = source.given_up

        def name_some(source=source, passes=passes, given_up=given_up):
            open_items = set(range(COUNT)) - {*source.answers, *source.left}
            if next(passes) % 5 == 4 and open_items:
                # Among them are some whose answers are on their way already.
                item = min(open_items)
                source.reasons[item] = FlorenceError(f"Nobody waits for {item}.")
            return given_up()

        source.given_up = name_some
        DecodeLoop(source, GenerationSettings(), PlainSpace(), max_rows=5).run()
        assert sorted(source.answers) == list(range(COUNT))
        stay = [item for item in range(COUNT) if item not in source.reasons]
        expected = expected_by_limit(model, prompts, GenerationSettings(), limits)
        found = [source.answers[item] for item in stay]
        assert differences(found, [expected[item] for item in stay]) == []
        assert 0 < len(source.reasons) < COUNT


def test_who_waits_for_an_answer_on_its_way_is_taken_in_after_it(monkeypatch: pytest.MonkeyPatch):
    original = OpenFlags
    monkeypatch.setattr(florence2.generation.decode, "OpenFlags", lambda **_: original(lag=1))
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 3)
    source = Drip(network_session, model, prompts, 3, [5, 24, 9], 0)
    loop = DecodeLoop(source, GenerationSettings(), PlainSpace(), max_rows=2)
    start = source.start

    def start_alone(room: int):
        in_hand = 3 - len(source.left) - len(source.answers)
        source.random.randint = lambda low, high: high
        return None if in_hand else start(room)

    def give_up_the_other():
        if loop._arriving:
            source.reasons[1] = FlorenceError("Nobody waits for 1.")
        return {item: why for item, why in source.reasons.items() if item not in source.answers}

    source.start, source.given_up = start_alone, give_up_the_other
    loop.run()
    assert [isinstance(source.answers[item], Answer) for item in range(3)] == [True, False, True]
    expected = expected_by_limit(model, prompts, GenerationSettings(), [5, 24, 9])
    found = [source.answers[item] for item in (0, 2)]
    assert differences(found, [expected[0], expected[2]]) == []
