"""The text that the demo checkpoint's tokenizer is trained on: the scenes' own language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import numpy as np

from florence2.tasks import TASKS
from florence2_demo.examples import examples
from florence2_demo.lexicon import (
    ABSENT_WORDS,
    BACKGROUND_COLOURS,
    COLOURS,
    KINDS,
    NUMBER_WORDS,
    PATTERNS,
    PLURALS,
    SIGN_WORDS,
)
from florence2_demo.scene import make_scene

_TOKENS: Final = re.compile(r"<[^<>]+>")
_FIRST_SEED: Final = 500_000
_EVERYDAY: Final = (
    "and are as be but by can each every find for from has have here how it its more most not of "
    "one or other over people picture photo please some than that their there these they thing "
    "this to under up very was water which who will woman man child hand head face road street "
    "window wall floor light dark old young round square circle triangle animal food fruit toy "
    "sky grass sand stone wood metal glass paper colour number letter word line shape part near "
    "between behind front above below outside inside many few several another any all between "
    "ing er ed ly tion es al ment able ight ound est ness less ful ive ous ent ant ary ory"
)
"""Rare in the corpus on purpose: pieces that shorten other people's words."""


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
    yield _EVERYDAY
    yield f" {_EVERYDAY}"
    for seed in range(_FIRST_SEED, _FIRST_SEED + num_scenes):
        for example in examples(make_scene(seed), np.random.default_rng(seed)):
            yield _TOKENS.sub("", example.text or "")
            yield from filter(None, _TOKENS.split(example.answer))
