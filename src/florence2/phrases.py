"""Phrases that phrase grounding never reports, whatever the model says about them."""

from __future__ import annotations

from typing import Final

# Published in the processor files of the checkpoints; compared as they are, case included.
_PRONOUNS: Final = (
    "it I me mine you your yours he him his she her hers they them their theirs one oneself "
    "we us our ours its myself yourself himself herself itself ourselves yourselves themselves"
)
_POINTERS: Final = "this that these those who whom whose which what"
_AMOUNTS: Final = (
    "all another any anybody anyone anything each everybody everyone everything few many nobody "
    "none several some somebody someone something"
)
_WORDS: Final = "image images the a an lots"
_PHRASES: Final = ("each other", "one another", "the image", "a group", "other objects", "a set")

BANNED_PHRASES: Final = frozenset(
    (*" ".join((_PRONOUNS, _POINTERS, _AMOUNTS, _WORDS)).split(), *_PHRASES)
)
