"""A task prompt with its text in one line, and what is said about one that is none."""

from __future__ import annotations

import pytest

from florence2.errors import RequestError
from serve.answering import task_and_text

PROMPTS = {
    "a token": ("<OD>", ("<OD>", None)),
    "a token and text": (
        "<OPEN_VOCABULARY_DETECTION> a car",
        ("<OPEN_VOCABULARY_DETECTION>", "a car"),
    ),
    "a cascade": (
        "<CAPTION> + <CAPTION_TO_PHRASE_GROUNDING>",
        ("<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>", None),
    ),
    "a name": ("caption", ("<CAPTION>", None)),
}


@pytest.mark.parametrize(("prompt", "parts"), PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_is_a_task_and_its_text(prompt, parts):
    assert task_and_text(prompt) == parts


REFUSED = {
    "nothing": (None, "and nothing was received"),
    "empty": ("", "and nothing was received"),
    "a number": (5, "and 5 was received"),
    "a long list": (["x" * 5000] * 100, r"\.\.\."),
}


@pytest.mark.parametrize(("prompt", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_prompt_is_refused_in_one_short_sentence(prompt, words):
    with pytest.raises(RequestError, match=words) as refused:
        task_and_text(prompt)
    assert len(str(refused.value)) < 250
