"""The text that the demo checkpoint's tokenizer is trained on: the scenes' own language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import numpy as np

from florence2.tasks import TASKS
from florence2.training.answers import examples
from florence2.training.scene import make_scene
from florence2.training.words import (
    ABSENT_WORDS,
    BACKGROUND_COLOURS,
    COLOURS,
    KINDS,
    NUMBER_WORDS,
    PATTERNS,
    PLURALS,
    SIGN_WORDS,
)

_TOKENS: Final = re.compile(r"<[^<>]+>")
_FIRST_SEED: Final = 500_000


def tokenizer_texts(num_scenes: int = 1500) -> Iterator[str]:
    """Prompts and answers of ``num_scenes`` scenes, and every word often enough to be a token.

    Words appear at the start of a text and after a space, which byte-level tokens tell apart.
    """
    for _ in range(num_scenes // 5):
        for task in TASKS:
            yield task.sentence.replace("{input}", "")
        for words in (KINDS, COLOURS, tuple(PLURALS.values()), BACKGROUND_COLOURS, PATTERNS):
            yield from words
            yield f" {' '.join(words)}"
        yield f" {' '.join(NUMBER_WORDS)}"
    for _ in range(num_scenes // 15):
        yield from SIGN_WORDS
        yield f" {' '.join((*SIGN_WORDS, *ABSENT_WORDS))}"
    for seed in range(_FIRST_SEED, _FIRST_SEED + num_scenes):
        for example in examples(make_scene(seed), np.random.default_rng(seed)):
            yield _TOKENS.sub("", example.text or "")
            yield from filter(None, _TOKENS.split(example.answer))
