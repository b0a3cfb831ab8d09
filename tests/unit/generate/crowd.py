"""Prompts that come at random, a few at a time, to be searched by the decode loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tiny_reference import (
    Expected,
    differences,
    expected_answers,
    network_session,
    random_prompts,
    tiny_model,
)

from florence2.errors import FlorenceError
from florence2.generation.decode import DecodeBatch, DecodeLoop, EncodedItems, Session
from florence2.records import Answer, GenerationSettings

COUNT = 24
MODES = [(1, True), (3, True), (3, False), (4, "never")]


def settings_of(
    beams: int = 3, early_stopping: bool | str = True, ngram: int = 3
) -> GenerationSettings:
    return GenerationSettings(
        num_beams=beams, early_stopping=early_stopping, no_repeat_ngram_size=ngram
    )


def mixed_limits(count: int = COUNT) -> list[int]:
    limits = [1, 2, 3, 5, 9, 16, 24, 39]
    return [limits[item % len(limits)] for item in range(count)]


class Crowd:
    """A source of prompts that come at random; ``meanwhile`` is called before every pass.

    ``reasons`` gives prompts up once they are in hand, and also before if ``names_waiting``.
    ``rooms`` are the rooms it was asked for and how many came; ``alter`` may spoil the states of
    the prompts that are to come.
    """

    def __init__(
        self,
        seed: int,
        settings: GenerationSettings,
        limits: Sequence[int],
        device: str = "cpu",
        session: Callable[..., Session] = network_session,
    ):
        self.model, self.prompts = tiny_model(seed), random_prompts(seed, len(limits))
        self.settings, self.limits, self.device = settings, limits, device
        self.session = session
        self.meanwhile: Callable[[], object] = lambda: None
        self.alter: Callable[[list[int], object], object] = lambda items, states: None
        self.names_waiting = False
        self.begin(seed)

    def begin(self, seed: int) -> None:
        """All prompts once more."""
        self.random = random.Random(seed)
        self.left = list(range(len(self.limits)))
        self.answers: dict[int, Answer | FlorenceError] = {}
        self.reasons: dict[int, FlorenceError] = {}
        self.rooms: list[tuple[int, int]] = []

    @property
    def in_hand(self) -> set[int]:
        return set(range(len(self.limits))) - {*self.left, *self.answers}

    def give_up(self, *items: int) -> None:
        self.reasons |= {item: FlorenceError(f"Nobody waits for {item}.") for item in items}

    def given_up(self):
        self.meanwhile()
        named = {*self.in_hand, *(self.left if self.names_waiting else ())} - {*self.answers}
        return {item: why for item, why in self.reasons.items() if item in named}

    def start(self, room: int):
        self.left = [item for item in self.left if item not in self.answers]
        if not self.left or (self.in_hand and self.random.random() < 0.5):
            return None
        count = min(self.random.randint(1, room), len(self.left))
        items, self.left = self.left[:count], self.left[count:]
        self.rooms.append((room, count))
        part = self.prompts.pick(items)
        self.alter(items, part.states)
        limits = [self.limits[item] for item in items]
        session = self.session(
            self.model, part, self.settings.num_beams, limits, device=self.device
        )
        return EncodedItems(items, session, limits)

    def settle(self, item: int, answer: Answer | FlorenceError):
        assert item not in self.answers
        self.answers[item] = answer

    def run(self, batch: DecodeBatch | None = None, max_rows: int = 6, **options):
        batch = DecodeBatch(self.settings) if batch is None else batch
        DecodeLoop(self, batch, max_rows=max_rows, **options).run()
        return [self.answers[item] for item in range(len(self.limits))]

    def failed(self) -> list[int]:
        """The items that have an error for an answer."""
        return sorted(i for i, one in self.answers.items() if not isinstance(one, Answer))

    def differing(self) -> list[int]:
        """The items that have an answer, and another one than the reference gives."""
        items = [item for item in range(len(self.limits)) if item not in self.failed()]
        expected = expected_by_limit(self.model, self.prompts, self.settings, self.limits)
        found = differences([self.answers[item] for item in items], [expected[i] for i in items])
        return [items[at] for at in found]


def expected_by_limit(model, prompts, settings, limits: Sequence[int]) -> list[Expected]:
    tables = {limit: expected_answers(model, prompts, settings, limit) for limit in set(limits)}
    return [tables[limit][item] for item, limit in enumerate(limits)]
