"""Prompts that come at random to be searched, and the recorded buffers they are searched in."""

from __future__ import annotations

import copy
import functools
import random

from tiny_reference import (
    differences,
    expected_answers,
    our_network,
    random_prompts,
    tiny_model,
)

from florence2.errors import FlorenceError
from florence2.generation.beam_search import Nearby
from florence2.generation.decode import DecodeLoop, Started
from florence2.generation.kv_cache import DecoderSession
from florence2.records import Answer, GenerationSettings
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.decode_graphs import DecodePool

COUNT = 24
LIMITS = [1, 2, 3, 5, 9, 16, 24, 39]


@functools.cache
def network_of(seed: int, device: str):
    """One of the tiny networks on a device."""
    network = our_network(tiny_model(seed))
    return copy.deepcopy(network).to(device).prepare_for_inference()


class Crowd:
    """A source of prompts that come at random, a few at a time; ``meanwhile`` is called between."""

    def __init__(
        self, seed: int, settings: GenerationSettings, limits: list[int], device: str = "cpu"
    ):
        self.model, self.prompts = tiny_model(seed), random_prompts(seed, len(limits))
        self.network, self.device = network_of(seed, device), device
        self.settings, self.limits = settings, limits
        self.random = random.Random(seed)
        self.left = list(range(len(limits)))
        self.answers: dict[int, Answer | FlorenceError] = {}
        self.reasons: dict[int, FlorenceError] = {}
        self.meanwhile = lambda: None
        self.alter = lambda items, session: None

    def given_up(self):
        self.meanwhile()
        in_hand = [item for item in self.reasons if item not in {*self.left, *self.answers}]
        return {item: self.reasons[item] for item in in_hand}

    def start(self, room: int):
        waits = len(self.answers) + len(self.left) < len(self.limits)
        if not self.left or (waits and self.random.random() < 0.5):
            return None
        count = min(self.random.randint(1, room), len(self.left))
        items, self.left = self.left[:count], self.left[count:]
        limits = [self.limits[item] for item in items]
        part = self.prompts.pick(items)
        states, mask = part.states.to(self.device), part.mask.bool().to(self.device)
        session = DecoderSession(self.network, states, mask, self.settings.num_beams, max(limits))
        self.alter(items, session)
        return Started(items, session, limits)

    def settle(self, item: int, answer: Answer | FlorenceError):
        assert item not in self.answers
        self.answers[item] = answer

    def run(self, space, max_rows: int = 6, nearby: Nearby | None = None):
        DecodeLoop(self, self.settings, space, max_rows=max_rows, nearby=nearby).run()
        return [self.answers[item] for item in range(len(self.limits))]

    def differing(self, items: list[int] | None = None) -> list[int]:
        """The items, of all or of these, that the reference answers otherwise."""
        tables = {
            limit: expected_answers(self.model, self.prompts, self.settings, limit)
            for limit in set(self.limits)
        }
        items = list(range(len(self.limits))) if items is None else items
        expected = [tables[self.limits[item]][item] for item in items]
        return differences([self.answers[item] for item in items], expected)


class Place:
    """A pool for one of the tiny models, with what records for it."""

    def __init__(self, seed: int, recorder=None, max_idle_bytes: int = 2**30, device: str = "cpu"):
        self.recorder = recorder
        self.graphs = GraphRunner(recorder)
        self.pool = DecodePool(network_of(seed, device), self.graphs, max_idle_bytes)

    def free_memory(self):
        self.graphs.clear()
        self.pool.clear()


def mixed_limits(count: int = COUNT) -> list[int]:
    return [LIMITS[item % len(LIMITS)] for item in range(count)]


def settings_of(beams: int = 3, early_stopping: bool | str = True, ngram: int = 3):
    return GenerationSettings(
        num_beams=beams, early_stopping=early_stopping, no_repeat_ngram_size=ngram
    )
